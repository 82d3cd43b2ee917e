"""RSMamba: a Mamba of remote-sensing images along three paths, Chen et al. 2024, arXiv:2403.19654.

Overlapping patches become tokens with learned positions. Every layer scans them forwards, backwards and in a random
order with the same Mamba, and adds a weighted sum of the three, with weights from the means of what they gave.

Source: github.com/KyanChen/RSMamba, 3fa3056: `mmpretrain/rsmamba/models/models.py`, `configs/rsmamba/*`; its mixer is
`MambaMixer` of transformers, its patches are mmcv's.
Glossary: N d_state, L tokens.

Departures, paper and official code against each other and against this:
  random order  is drawn anew for every layer and call also at test time in the code, so that results change; here it is
                fixed by `seed` then (`test_shuffle="random"` for the other, `"none"` for no shuffle)
  one norm      before the mixers is shared by all layers, which the paper's figure does not show; so it is here
  Eq. 7         weighs the tokens side by side and takes means after; the code takes means first, which is the same
  projections   are linear and see one token, so they act once on what three paths share; the code has them three times
  middle token  the code inserts it at L // 2 and reads (L + 1) // 2, which is a token of the image where L is odd; here
                it is the class token, and in what `from_official` gives it is the code's
  head_tail     as position of the class token fails in the code; it is not built
  start         steps start as Mamba's; with some versions of transformers the official mixer's start as linear maps do
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import (
    PaddedPatchEmbed,
    Size,
    insert_token,
    quarters,
    remove_tokens,
    resize_positions,
    start_linear,
)
from selectra.mixers import S6
from selectra.mixers.sizes import require_sizes
from selectra.official import Official, checked_options, reads
from selectra.registry import models

Paths = Literal["forward", "reverse_mean", "reverse_gate", "shuffle_mean", "shuffle_gate"]
Pool = Literal["mean", "middle", "head", "tail"]
TestShuffle = Literal["seeded", "random", "none"]
EPS = 1e-6


class PathMixer(nn.Module):
    """One Mamba along several orders of the same tokens, and the sum of what it gives.

    Args:
        mamba: Shared by all paths.
        paths: "reverse" adds the backward path to the forward one, "shuffle" a given order too; "mean" and "gate" say
            what the sum's weights are.
    """

    def __init__(self, mamba: S6, paths: Paths) -> None:
        super().__init__()
        kind, _, weights = paths.partition("_")
        n_paths = {"forward": 1, "reverse": 2, "shuffle": 3}[kind]
        self.mamba, self.n_paths = mamba, n_paths
        self.gate = nn.Linear(n_paths * mamba.d_model, n_paths, bias=False) if weights == "gate" else None

    def forward(self, x: Float[Tensor, "b l d"], order: Int64[Tensor, " l"] | None = None) -> Float[Tensor, "b l d"]:
        """Mix; the third path visits the tokens in this order."""
        u, z = self.mamba.in_proj(x).chunk(2, dim=-1)
        ys = [self.mamba.mix_whole(u, z)]
        if self.n_paths > 1:
            ys.append(self.mamba.mix_whole(u, z, reverse=True))
        if self.n_paths > 2:
            assert order is not None
            ys.append(self.mamba.mix_whole(u[:, order], z[:, order])[:, torch.argsort(order)])
        if self.gate is None:
            total = sum(ys[1:], ys[0]) / self.n_paths if self.n_paths > 1 else ys[0]
            return self.mamba.out_proj(total)
        means = self.mamba.out_proj(torch.stack([y.mean(1) for y in ys], dim=1))  # b paths d
        weights = self.gate(means.flatten(1)).softmax(-1).to(ys[0].dtype)
        return self.mamba.out_proj(torch.einsum("bk,kbld->bld", weights, torch.stack(ys)))


def fixed_order(length: int, seed: int, device: torch.device) -> Int64[Tensor, " length"]:
    """A permutation that looks random and depends on length and seed alone, on every device alike."""
    mask = 0xFFFFFFFF
    keys = torch.arange(length, device=device) + (seed + 1) * 0x9E3779B1 % mask
    # Murmur's last steps; products stay below 2^63.
    for _ in range(2):
        keys = ((keys ^ (keys >> 16)) & mask) * 0x45D9F3B & mask
    return torch.argsort(keys ^ (keys >> 16), stable=True)


BASE: dict[str, Any] = {}
LARGE: dict[str, Any] = {"d_model": 256, "depth": 36}
HUGE: dict[str, Any] = {"d_model": 320, "depth": 48}


@models.register(
    "rsmamba",
    kind="image",
    source="arXiv:2403.19654",
    smoke={"d_model": 16, "depth": 2, "d_state": 4, "patch_size": 8, "stride": 4},
    small={"depth": 16},
    base=BASE,
    large=LARGE,
    huge=HUGE,
)
class RSMamba(nn.Module):
    """RSMamba's classifier; positions are learned for `img_size` and resized for images of another size.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        img_size: Pixels of the images' sides, or height and width.
        patch_size: Pixels of a patch's side.
        stride: Pixels from one patch to the next; images are padded below and on the right.
        d_model: Width of a token.
        depth: Number of layers.
        d_state: State size per channel.
        d_conv: Width of the short convolutions.
        expand: Width between the mixers' projections over `d_model`.
        paths: Forward alone; with the backward path; or with a random order too; and how they are summed.
        pool: What the head reads: the tokens' mean, normalised once more, or a class token at a place among them.
        test_shuffle: Outside of training, an order fixed by `seed`, one drawn anew for every call, or the given one.
        seed: Of the orders outside of training.
        drop_path: Rate at which the last layer's branch is left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: Size = 224,
        patch_size: int = 16,
        stride: int = 8,
        d_model: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        paths: Paths = "shuffle_gate",
        pool: Pool = "mean",
        test_shuffle: TestShuffle = "seeded",
        seed: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, depth=depth)
        for name, value, allowed in (
            ("paths", paths, Paths),
            ("pool", pool, Pool),
            ("test_shuffle", test_shuffle, TestShuffle),
        ):
            if value not in get_args(allowed):
                raise ConfigError(f"{name}={value!r}: takes {', '.join(map(repr, get_args(allowed)))}")
        self.pool, self.test_shuffle, self.seed = pool, test_shuffle, seed
        self.patch_embed = PaddedPatchEmbed(in_channels, d_model, patch_size, stride, bias=False)
        self.grid = self.patch_embed.grid(img_size)
        n_tokens = self.grid[0] * self.grid[1]
        extra = len(self.slots(n_tokens))
        self.no_decay = ("pos_embed", "cls_token")[: 1 + extra]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model)) if extra else None
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens + extra, d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.pre_norm = nn.LayerNorm(d_model, eps=EPS)
        self.layers = nn.ModuleList(PathMixer(S6(d_model, d_state, d_conv, expand), paths) for _ in range(depth))
        self.drops = nn.ModuleList(map(DropPath, rising_rates(drop_path, depth)))
        self.ln1 = nn.LayerNorm(d_model, eps=EPS)
        self.ln2 = nn.LayerNorm(d_model, eps=EPS) if pool == "mean" else None
        self.head = nn.Linear(d_model, n_classes)
        start_linear([self.head])
        self.seen = quarters(depth)
        self.feature_dims = (d_model,) * len(self.seen)
        self.feature_strides = (stride,) * len(self.seen)

    def slots(self, n_tokens: int) -> tuple[int, ...]:
        """Where the class token stands among `n_tokens` others."""
        return {"middle": (n_tokens // 2,), "head": (0,), "tail": (n_tokens,)}.get(self.pool, ())

    def features(self, x: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b h w d"]]:
        """The grid behind each quarter of the layers, normalised as the last one is; all have one resolution."""
        states, grid = self.run(x, self.seen)
        slots = self.slots(grid[0] * grid[1])
        return [remove_tokens(self.ln1(state), slots).unflatten(1, grid) for state in states]

    def embed(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        """What the head reads."""
        (state,), grid = self.run(x, self.seen[-1:])
        state = self.ln1(state)
        slots = self.slots(grid[0] * grid[1])
        return state[:, slots[0]] if self.ln2 is None else self.ln2(state.mean(1))

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n_classes"]:
        """Scores of the classes, before a softmax."""
        return self.head(self.embed(x))

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return _rename_classifier(state)

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return list(self.layers)

    def run(
        self, x: Float[Tensor, "b c H W"], after: Sequence[int], orders: Sequence[Tensor] | None = None
    ) -> tuple[list[Float[Tensor, "b l d"]], tuple[int, int]]:
        """The tokens behind some of the layers, not normalised, and the grid's sides.

        Args:
            x: The images.
            after: Numbers of the layers.
            orders: An order of the tokens, the class token among them, for every layer's third path.
        """
        x = self.patch_embed(x)
        grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        slots = self.slots(x.shape[1])
        if self.cls_token is not None:
            x = insert_token(x, self.cls_token, slots[0])
        x = x + resize_positions(self.pos_embed, self.grid, grid, self.slots(self.grid[0] * self.grid[1]), slots)
        states = []
        for i, (layer, drop) in enumerate(zip(self.layers, self.drops, strict=True)):
            order = self.order(x.shape[1], i, x.device) if orders is None else orders[i]
            x = x + drop(layer(self.pre_norm(x), order))
            if i in after:
                states.append(x)
        return states, grid

    def order(self, length: int, layer: int, device: torch.device) -> Int64[Tensor, " length"]:
        """In which a layer's third path visits the tokens."""
        if self.training or self.test_shuffle == "random":
            return torch.randperm(length, device=device)
        if self.test_shuffle == "none":
            return torch.arange(length, device=device)
        return fixed_order(length, self.seed * len(self.layers) + layer, device)


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
        slots = {"head": [0], "tail": [x.shape[1] - 1], "middle": [x.shape[1] // 2]}.get(self.backbone.pool, [])
        if self.out_type == "raw":
            return x
        if self.out_type == "cls_token":
            return x[:, slots[0]]
        tokens = remove_tokens(x, slots)
        if self.out_type == "featmap":
            return tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        assert self.backbone.ln2 is not None
        return self.backbone.ln2(tokens.mean(1))


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
    return Official(backbone, _rename)


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
    if (model.ln2 is None) == (model.pool == "mean"):
        raise ConfigError("options 'out_type' and 'cls_position': a head reads the mean without a class token, or it")
    model.head, model.test_shuffle = nn.Linear(model.feature_dims[-1], head["num_classes"]), "seeded"
    return Official(model, _rename_classifier)


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


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        number, _, last = rest.partition(".")
        if first == "layers":
            ours = f"layers.{number}.mamba.{last}"
        elif first == "gate_layers":
            ours = f"layers.{number}.gate.{last.removeprefix('0.')}"
        elif first == "patch_embed":
            ours = key.replace(".projection.", ".proj.")
        else:
            ours = key
        renamed[f"backbone.{ours}"] = value
    return renamed


def _rename_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    body = _rename({key.removeprefix("backbone."): value for key, value in state.items()})
    return {key.removeprefix("backbone.").replace("head.fc.", "head."): value for key, value in body.items()}
