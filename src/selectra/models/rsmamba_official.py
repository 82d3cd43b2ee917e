"""Official weights of RSMamba: what reads the options of the official classes."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.image import Size, remove_tokens
from selectra.mixers import S6
from selectra.models.rsmamba import EPS, PathMixer, Paths, RSMamba, rename, rename_classifier
from selectra.official import Official, checked_options, reads

ARCHITECTURES = {
    **dict.fromkeys(("s", "small"), (192, 16, 384)),
    **dict.fromkeys(("b", "base"), (192, 24, 384)),
    **dict.fromkeys(("l", "large"), (256, 36, 512)),
    **dict.fromkeys(("h", "huge"), (320, 48, 640)),
}
ARCHITECTURE_KEYS = ("embed_dims", "num_layers", "feedforward_channels")
OFFICIAL_PATHS: dict[str, Paths] = {
    "forward": "forward",
    "forward_reverse_mean": "reverse_mean",
    "forward_reverse_gate": "reverse_gate",
    "forward_reverse_shuffle_mean": "shuffle_mean",
    "forward_reverse_shuffle_gate": "shuffle_gate",
}
# Of transformers' Mamba, under our names.
LAYER_KEYS = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "time_step_rank": "dt_rank",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
}
BACKBONE = "KyanChen/RSMamba:RSMamba"
OutType = Literal["featmap", "avg_featmap", "cls_token", "raw"]


class Backbone(nn.Module):
    """RSMamba without its head, channels first, called with the orders of its third paths if need be."""

    def __init__(self, backbone: RSMamba, out_type: OutType, out_indices: Sequence[int], final_norm: bool) -> None:
        super().__init__()
        self.backbone, self.out_type = backbone, out_type
        depth = len(backbone.layers)
        self.after = [i + depth if i < 0 else i for i in out_indices]
        if not all(0 <= i < depth for i in self.after) or sorted(set(self.after)) != self.after:
            raise ConfigError(f"option 'out_indices' is {list(out_indices)}; it takes rising numbers of {depth} layers")
        self.final_norm = final_norm
        del backbone.head
        if not final_norm:
            del backbone.ln1
        if out_type == "avg_featmap":
            backbone.ln2 = nn.LayerNorm(backbone.feature_dims[-1], eps=EPS)
        else:
            backbone.ln2 = None

    def forward(self, x: Float[Tensor, "b c H W"], *orders: Tensor) -> tuple[Tensor, ...]:
        given = [order.long() for order in orders]
        if given and len(given) != len(self.backbone.layers):
            raise ConfigError(f"{len(given)} orders were given to {len(self.backbone.layers)} layers")
        states, grid = self.backbone.run(x, self.after, given or None)
        if self.final_norm and self.after[-1] == len(self.backbone.layers) - 1:
            states[-1] = self.backbone.ln1(states[-1])
        return tuple(self._formed(state, grid) for state in states)

    def _formed(self, x: Float[Tensor, "b l d"], grid: tuple[int, int]) -> Tensor:
        """As the official code does, which looks for the middle token in the middle of all."""
        slots = {"head": [0], "tail": [x.shape[1] - 1], "middle": [x.shape[1] // 2]}.get(self.backbone.kind, [])
        if self.out_type == "raw":
            return x
        if self.out_type == "cls_token":
            return x[:, slots[0]]
        tokens = remove_tokens(x, slots)
        if self.out_type == "featmap":
            return tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        assert self.backbone.ln2 is not None
        return self.backbone.ln2(tokens.mean(1))


class OfficialClassifier(Official):
    """RSMamba with its head, which is given the token that the official code takes for the class token."""

    model: RSMamba

    def forward(self, x: Float[Tensor, "b c H W"]) -> tuple[Tensor]:
        if self.model.kind != "middle":
            return (self.model(x),)
        tokens = self.model.forward_features(x)
        # Of an odd number of patches the middle of all tokens is behind the one that was put into theirs.
        return (self.model.head(tokens[:, tokens.shape[1] // 2]),)


@reads(BACKBONE)
def read_rsmamba(
    *,
    arch: str | dict[str, int] = "base",
    pe_type: Literal["learnable"] = "learnable",
    path_type: str = "forward_reverse_shuffle_gate",
    cls_position: Literal["none", "head", "tail", "middle"] = "none",
    img_size: Size = 224,
    patch_size: int = 16,
    in_channels: int = 3,
    out_indices: int | tuple[int, ...] = -1,
    drop_rate: Literal[0] = 0,
    norm_cfg: dict[str, Any] | None = None,
    final_norm: bool = True,
    out_type: OutType = "avg_featmap",
    frozen_stages: Literal[-1, 0] = -1,
    interpolate_mode: str = "bicubic",
    patch_cfg: dict[str, int] | None = None,
    layer_cfgs: dict[str, int | bool] | None = None,
    init_cfg: Any = None,
) -> Official:
    """The backbone; `interpolate_mode` and `init_cfg` have no effect on what loaded weights compute there."""
    norm, patches, layers = norm_cfg or {}, patch_cfg or {}, layer_cfgs or {}
    _require_keys("patch_cfg", patches, ("stride",))
    _require_keys("layer_cfgs", layers, (*LAYER_KEYS, "use_mambapy"))
    _require_keys("norm_cfg", norm, ("type", "eps"))
    if norm.get("type", "LN") != "LN":
        raise ConfigError(f"option 'norm_cfg' has type {norm['type']!r}; it takes 'LN'")
    if path_type not in OFFICIAL_PATHS:
        raise ConfigError(f"option 'path_type' is {path_type!r}; it takes {', '.join(map(repr, OFFICIAL_PATHS))}")
    if out_type == "cls_token" and cls_position == "none":
        raise ConfigError("option 'out_type' is 'cls_token', and 'cls_position' is 'none': there is no class token")
    d_model, depth, d_inner = _architecture(arch)
    model = RSMamba(
        n_classes=1,
        in_channels=in_channels,
        img_size=img_size,
        patch_size=patch_size,
        stride=patches.get("stride", patch_size),
        d_model=d_model,
        depth=depth,
        paths=OFFICIAL_PATHS[path_type],
        pool="mean" if cls_position == "none" else cls_position,
        test_shuffle="random",
    )
    own = {LAYER_KEYS[key]: value for key, value in layers.items() if key in LAYER_KEYS}
    for layer in model.layers:
        assert isinstance(layer, PathMixer)
        layer.mamba = S6(d_model, **{"expand": d_inner / d_model, **own})
    indices = (out_indices,) if isinstance(out_indices, int) else out_indices
    backbone = Backbone(model, out_type, indices, final_norm)
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = norm.get("eps", 1e-5 if norm_cfg else EPS)
    return Official(backbone, rename)


@reads("KyanChen/RSMamba:ImageClassifier")
def read_classifier(
    *, backbone: dict[str, Any], head: dict[str, Any], neck: None = None, train_cfg: Any = None, init_cfg: Any = None
) -> Official:
    """The whole classifier as the official configurations have it, which is what the released files hold.

    Orders of the third paths are seeded, as `RSMamba` has them at test time.
    """
    _require_keys("head", head, ("type", "num_classes", "in_channels", "init_cfg", "loss", "topk"))
    if "num_classes" not in head:
        raise ConfigError(f"option 'head' is {head}; it needs 'num_classes'")
    options = checked_options(BACKBONE, {key: value for key, value in backbone.items() if key != "type"})
    if options.get("out_type", "avg_featmap") not in ("avg_featmap", "cls_token"):
        raise ConfigError(f"option 'out_type' is {options['out_type']!r}; a head takes 'avg_featmap' or 'cls_token'")
    if options.get("out_indices", -1) != -1 or not options.get("final_norm", True):
        raise ConfigError("options 'out_indices' and 'final_norm' take -1 and True below a head")
    body = read_rsmamba(**options).model
    assert isinstance(body, Backbone)
    model = body.backbone
    if (model.ln2 is None) == (model.kind == "mean"):
        raise ConfigError("options 'out_type' and 'cls_position': a head reads the mean without a class token, or it")
    model.head, model.test_shuffle = nn.Linear(model.feature_dims[-1], head["num_classes"]), "seeded"
    return OfficialClassifier(model, rename_classifier)


def _architecture(arch: str | dict[str, int]) -> tuple[int, int, int]:
    """Width, layers and inner width."""
    if isinstance(arch, str):
        if arch.lower() not in ARCHITECTURES:
            raise ConfigError(f"option 'arch' is {arch!r}; it takes {', '.join(map(repr, ARCHITECTURES))}")
        return ARCHITECTURES[arch.lower()]
    _require_keys("arch", arch, ARCHITECTURE_KEYS)
    if "embed_dims" not in arch or "num_layers" not in arch:
        raise ConfigError(f"option 'arch' is {arch}; it needs 'embed_dims' and 'num_layers'")
    return arch["embed_dims"], arch["num_layers"], arch.get("feedforward_channels", 2 * arch["embed_dims"])


def _require_keys(option: str, given: dict[str, Any], allowed: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ConfigError(f"option '{option}' has {', '.join(map(repr, unknown))}; it takes {', '.join(allowed)}")
