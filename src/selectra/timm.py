"""Selectra's image models as timm models: importing this module registers all of them, under `selectra_NAME`.

    import timm, selectra.timm
    model = timm.create_model("selectra_vim_tiny", num_classes=10, in_chans=13, img_size=(96, 160))

What timm promises of its models holds: `create_model` with `num_classes`, `in_chans`, `img_size`, `drop_rate`,
`drop_path_rate`, `global_pool`, `features_only`, `out_indices` and `checkpoint_path`; `forward_features`,
`forward_head`, `forward_intermediates`, `prune_intermediate_layers`, `reset_classifier`, `set_grad_checkpointing`,
`group_matcher`, `no_weight_decay`, `feature_info` and `pretrained_cfg`. Other arguments are those of the model's class.

No weights are hosted. `pretrained=FILE` and `checkpoint_path=FILE` read official files and our own; of a file with an
average of weights beside the last ones, `checkpoint_path`, which timm reads, takes the average. TorchScript is not
promised: the scan chooses its kernel at run time. `torch.compile` and `torch.export` are the ways.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from selectra.errors import ConfigError, DataError
from selectra.layers.image_model import ImageModel, Pyramid
from selectra.pretrained import fit_state, load_pretrained, strip
from selectra.registry import Entry, models
from selectra.spec import Spec

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models._features import FeatureGetterNet
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"selectra.timm needs {error.name}, which the extra 'vision' brings: pip install 'selectra[vision]'"
    ) from error

import selectra.models  # noqa: F401

__all__: list[str] = []
PREFIX = "selectra_"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Features(FeatureGetterNet):
    """What `features_only=True` gives: grids, channels first; without `out_indices` those of the model's `features`."""

    def __init__(self, model: ImageModel, out_indices: Any = None, norm: bool | None = None, **options: Any) -> None:
        indices = tuple(model.seen) if out_indices is None else out_indices
        super().__init__(model, indices, norm=model.normed_features if norm is None else norm, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of every module; the state of the whole model is taken, too."""
        if strict and state_dict.keys() != self.state_dict().keys():
            fitted, _ = fit_state(self.model, strip(dict(state_dict)))
            state_dict = {f"model.{key}": value for key, value in fitted.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the model."""
        assert isinstance(self.model, ImageModel)
        self.model.set_grad_checkpointing(enable)


def build(
    entry: Entry,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str | None = None,
    output_stride: int = 32,
    device: Any = None,
    dtype: Any = None,
    **arguments: Any,
) -> ImageModel:
    """A registered image model from timm's arguments.

    Args:
        entry: What is built.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the images.
        img_size: Pixels of the images' sides. Where positions are learned, they are for this size; all models take
            images of any size.
        drop_rate: Share of the classifier's inputs that training leaves out.
        drop_path_rate: Rate at which the last block is left out in training; earlier ones less often.
        global_pool: What the classifier reads of the last level; by default what the paper's model does.
        output_stride: Not to be changed: there are no dilated forms.
        device: Where to put it.
        dtype: In which precision.
        arguments: Others of the model's class.

    Raises:
        ConfigError: An argument that there is not, or a value that does not fit.
    """
    if not 0 <= drop_rate < 1:
        raise ConfigError(f"drop_rate={drop_rate}: must be at least 0 and less than 1")
    if output_stride != 32:
        raise ConfigError(f"output_stride={output_stride}: takes 32; there are no dilated forms")
    own: dict[str, Any] = {"n_classes": max(num_classes, 1), "in_channels": in_chans, "drop_path": drop_path_rate}
    if img_size is not None and "img_size" in entry.parameters():
        own["img_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
    model = models.build(Spec(entry.name, **{**own, **arguments}))
    assert isinstance(model, ImageModel)
    model.head_drop.p = drop_rate
    if num_classes < 1 or global_pool not in (None, model.global_pool):
        model.reset_classifier(num_classes, global_pool)
    model.fit = _fit_model
    return model.to(device=device, dtype=dtype)


def create(entry: Entry, pretrained: bool | str | Path = False, **options: Any) -> nn.Module:
    """What `timm.create_model` calls; `pretrained` may also be a file.

    Raises:
        ConfigError: As `build`.
        DataError: The file cannot be read, or is of another model.
    """
    path = None if isinstance(pretrained, bool) else Path(pretrained)
    overlay = options.get("pretrained_cfg_overlay")
    if overlay and "file" in overlay and "num_classes" not in overlay:
        # Where these differ timm leaves the classifier out; whether the file's fits is seen by its shape.
        options["pretrained_cfg_overlay"] = {**overlay, "num_classes": options.get("num_classes", 1000)}
    net = build_model_with_cfg(
        partial(build, entry),
        PREFIX + entry.name,
        path is None and bool(pretrained),
        feature_cfg={"feature_cls": Features, "out_indices": None, "output_fmt": "NCHW"},
        pretrained_filter_fn=_fit_pretrained,
        **options,
    )
    if path is not None:
        load_pretrained(net.model if isinstance(net, Features) else net, path)
    return net


def _fit_pretrained(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """For files that timm reads itself, as `pretrained_cfg` names them."""
    return fit_state(model, strip(dict(state)), "the file")[0]


def _fit_model(model: nn.Module, state: Mapping[str, Any], strict: bool) -> Mapping[str, Any]:
    """A state in the model's names and shapes; one that is not to be whole may be a part, but not of another model."""
    ours = model.state_dict()
    if strict and state.keys() == ours.keys() and all(state[key].shape == own.shape for key, own in ours.items()):
        return state
    if strict:
        return fit_state(model, strip(dict(state)))[0]
    if state and not state.keys() & ours.keys():
        raise DataError(f"the state has no parameter of this {type(model).__name__}: is it of another model?")
    return state


def _cfg(entry: Entry) -> dict[str, Any]:
    """timm's description of a model without weights."""
    target: Any = entry.target
    return {
        **{"input_size": (3, 224, 224), "pool_size": (7, 7) if issubclass(target, Pyramid) else None},
        **{"num_classes": 1000, "interpolation": "bicubic", "crop_pct": 0.875, **IMAGENET, "classifier": "head"},
        **{"first_conv": target.first_conv(**entry.defaults), "paper_ids": entry.source},
    }


def _entrypoint(entry: Entry) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool | str | Path = False, **options: Any) -> nn.Module:
        return create(entry, pretrained, **options)

    entrypoint.__name__ = entrypoint.__qualname__ = PREFIX + entry.name
    entrypoint.__doc__ = entry.summary
    return entrypoint


def _is_registered(entry: Entry) -> bool:
    return isinstance(entry.target, type) and issubclass(entry.target, ImageModel) and entry.size != "smoke"


ENTRIES = {PREFIX + name: models.entry(name) for name in models.names("image") if _is_registered(models.entry(name))}
default_cfgs = generate_default_cfgs({name: _cfg(entry) for name, entry in ENTRIES.items()})
for _entry in ENTRIES.values():
    register_model(_entrypoint(_entry))
