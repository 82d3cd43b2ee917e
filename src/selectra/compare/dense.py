"""What `selectra compare detection` and `selectra compare segmentation` train: one head above several backbones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Optim, Run, Spec, Train

Dense = Literal["detection", "segmentation"]
# Backbones of 4.5 to 5.2 million parameters; their plain ones have patches of 8 pixels.
STAGES = {"dims": (48, 96, 192, 384), "depths": (2, 2, 3, 2)}
BACKBONES: Mapping[str, Spec] = MappingProxyType(
    {
        "vmamba": Spec("vmamba_tiny_s1l8", **STAGES), "vim": Spec("vim_tiny", patch_size=8, depth=15),
        "convnext": Spec("convnext_tiny", dims=STAGES["dims"], depths=(2, 2, 6, 2)),
        "resnet": Spec("resnet_18", dims=(48, 96, 168, 336)),
        "swin": Spec("swin_tiny", n_heads=(2, 4, 8, 16), **STAGES),
        "vit": Spec("vit_tiny", patch_size=8, depth=10),
    }
)  # fmt: skip
# One of each kind, of 0.2 to 0.3 million.
SMALL = {"dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1)}
QUICK_BACKBONES: Mapping[str, Spec] = MappingProxyType(
    {
        "vmamba": Spec("vmamba_tiny_s1l8", **SMALL), "convnext": Spec("convnext_tiny", **SMALL),
        "swin": Spec("swin_tiny", n_heads=(1, 2, 4, 8), **SMALL),
    }
)  # fmt: skip
# Pixels of the sides, of a user's own images; drawn ones have theirs.
SIDE, QUICK_SIDE = 320, 128
VERBS: Mapping[Dense, str] = MappingProxyType({"detection": "find objects in", "segmentation": "segment"})
METRICS: Mapping[Dense, str] = MappingProxyType({"detection": "map50", "segmentation": "miou"})


@dataclass(frozen=True)
class DenseQuestion:
    """What a study of backbones below one head is made of.

    Args:
        base: The run that they share.
        models: The head above each backbone, by the backbone's name.
        backbones: These backbones.
        title: What is done with the data, for the question.
        metric: What decides; more of it is better.
    """

    base: Run
    models: Mapping[str, Spec]
    backbones: Mapping[str, Spec]
    title: str
    metric: str


def ask_dense(kind: Dense, file: str | None, names: Sequence[str], quick: bool, img_size: int | None) -> DenseQuestion:
    """The question for a user's folder, or for drawn shapes.

    Args:
        kind: "detection" or "segmentation".
        file: A folder, a zip file, or a public set's name; None is drawn shapes.
        names: Backbones; none are the usual ones.
        quick: For a first look within minutes.
        img_size: Pixels of the square that detection brings images to, or that segmentation sees in training.

    Raises:
        ConfigError: A backbone is unknown, or no model of images.
    """
    usual = QUICK_BACKBONES if quick else BACKBONES
    backbones = {name: _backbone(name, usual, kind) for name in names or usual}
    side = img_size or (None if file is None else QUICK_SIDE if quick else SIDE)
    where = {} if file is None else {"path": file}
    width, steps = (64 if quick else 128), 200 if quick else 2000
    if kind == "detection":
        # Training's zoom is beside the size at which an image fits into the crop, which is evaluation's.
        views: dict[str, Any] = {} if side is None else {"crop": side, "zoom": (0.8, 1.25)}
        seen = {} if side is None else {"short_side": side, "long_side": side}
        head = Spec("retinanet_base", d_pyramid=width, **seen)
        data, task = Spec("objects", **where, **views, flip=0.5), Spec("detection", select="map50")
    else:
        views = {} if side is None else {"crop": side, "zoom": (0.5, 2.0)}
        head = Spec("upernet_base", d_decoder=width)
        data, task = Spec("masks", **where, **views, flip=0.5), Spec("segmentation")
    name = "drawn shapes" if file is None else Path(file).name
    base = Run(
        name=name,
        model=head,
        data=data,
        task=task,
        optim=Optim(lr=1e-3, weight_decay=0.05, warmup_steps=steps // 20, clip=1.0),
        train=Train(steps=steps, batch_size=16, eval_every=max(1, steps // (4 if quick else 8))),
    )
    above = {name: head.replace(backbone=spec) for name, spec in backbones.items()}
    return DenseQuestion(base, above, backbones, f"{VERBS[kind]} {name}", METRICS[kind])


def _backbone(name: str, usual: Mapping[str, Spec], kind: Dense) -> Spec:
    spec = usual.get(name) or BACKBONES.get(name) or Spec(name)
    found = models.entry(spec.name).kind
    if found != "image":
        raise ConfigError(
            f"'{name}' is a model of kind '{found}'; `compare {kind}` sets models of images below one head, such as "
            f"{', '.join(BACKBONES)}, or any of `selectra list models --kind image`."
        )
    return spec
