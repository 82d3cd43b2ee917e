"""VMamba: a pyramid of cross-scan blocks, Liu et al. 2024, arXiv:2401.10166.

An image becomes a grid of patches; four stages of residual blocks mix it by selective scans along rows and columns in
both directions, and between stages its sides are halved.

Source: github.com/MzeroMiko/VMamba, 2ed52ea: `classification/models/vmamba.py`, `vmamba.py`, `classification/configs/
vssm/*.yaml`.
Glossary: C the first of dims, N d_state, K the four routes; SS2D is `CrossScan2d` here. "Vanilla" is the first
version's model (forward type v0: gate, N = 16, no MLP); the sizes with s1 and s2 are the second's (v05_noz: no gate,
N = 1, with MLP), named after expand and the number of blocks in the third stage.

Departures, paper and official code against each other and against this:
  start         the official code at its last version draws the steps' projections anew with all linear maps, so that
                the special start of their weights is lost, and keeps that of their biases; what made the released
                checkpoints kept both, and so does this (`start="shipped"` for the other)
  results       the first paper reports 83.2 % for VMamba-B, the repository 83.7 %; of vanilla T 4.5 GFLOPs were first
                stated and 5.6 later; training is slower than Swin's, as the authors say (MzeroMiko/VMamba#234)
  precision     scans are float32 inside whatever the activations are, as in v05; v0 also scans float32 inputs
  forward types those with fewer routes (which keep four sets of parameters), other norms or activations after the scan
                are not built, no weights have them; the code names types of Mamba-2 ("m0") and lacks what they call
  B bar         the paper prints (delta A)^-1 (exp(delta A) - I) delta B; all code, this too, has delta B
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import ConvNorm, Mlp, NormedPatches, PatchMerging, require_image, start_linear
from selectra.layers.image_model import LAST, Pyramid
from selectra.layers.norm import LayerNorm
from selectra.mixers import CrossPaths, CrossScan2d
from selectra.mixers.cross_scan_2d import ROUTES, require_grid
from selectra.mixers.sizes import mixer_sizes, require_sizes
from selectra.registry import models

Stem = Literal["patches", "convolutions"]
Downsample = Literal["merge", "conv2", "conv3"]


class UngatedCrossScan2d(CrossPaths):
    """SS2D as the second version has it ("noz"): no gate, so half the input projection.

    Args:
        d_model: Width of the residual stream.
        d_state: State size per channel and route.
        d_conv: Side of the depthwise convolution.
        expand: Width between the projections over `d_model`.
        dt_rank: Rank of the steps' projections; "auto" is `ceil(d_model / 16)`.
        conv_bias: Whether the convolution has a bias.
        routes: Which routes are scanned.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 1,
        d_conv: int = 3,
        expand: int | float = 1,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        conv_bias: bool = False,
        routes: tuple[str, ...] = ROUTES,
    ) -> None:
        d_inner, rank = mixer_sizes(d_model, d_state, d_conv, expand, dt_rank)
        super().__init__(d_inner, d_state, d_conv, rank, conv_bias=conv_bias, routes=routes)
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, d_inner, bias=False)
        self.out_norm = LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b h w d_model"]) -> Float[Tensor, "b h w d_model"]:
        require_grid(x, self.d_model)
        return self.out_proj(self.out_norm(self.mix(self.in_proj(x))))


class Block(nn.Module):
    """A mixer and, where `mlp` is given, an MLP, each behind a norm and added to its input."""

    def __init__(self, d_model: int, mixer: nn.Module, mlp: nn.Module | None, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer, self.drop_path = LayerNorm(d_model), mixer, DropPath(drop_path)
        self.norm2 = None if mlp is None else LayerNorm(d_model)
        self.mlp = mlp

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        x = x + self.drop_path(self.mixer(self.norm(x)))
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvStem(nn.Module):
    """Two overlapping convolutions, each with half of the patch as its stride, and a norm after each."""

    def __init__(self, in_channels: int, d_model: int, patch_size: int) -> None:
        super().__init__()
        stride = patch_size // 2
        if patch_size % 2 or d_model % 2:
            raise ConfigError(f"patch_size={patch_size}, d_model={d_model}: stem='convolutions' needs even numbers")
        self.in_channels = in_channels
        self.first = ConvNorm(in_channels, d_model // 2, stride + 1, stride, 1)
        self.second = ConvNorm(d_model // 2, d_model, stride + 1, stride, 1)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b h w d"]:
        require_image(x, self.in_channels)
        return self.second(F.gelu(self.first(x.permute(0, 2, 3, 1))))


class Stage(nn.Module):
    """Blocks at one resolution, and the way to the next."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


def _second_version(expand: int, depths: tuple[int, ...], width: int = 96) -> dict[str, Any]:
    return {
        **{"depths": depths, "dims": tuple(width * 2**i for i in range(4)), "d_state": 1, "expand": expand},
        **{"gate": False, "conv_bias": False, "mlp_ratio": 4.0, "stem": "convolutions", "downsample": "conv3"},
    }


@models.register(
    "vmamba",
    kind="image",
    source="arXiv:2401.10166",
    smoke={"dims": (8, 16), "depths": (1, 1), "d_state": 4},
    tiny={},
    small={"depths": (2, 2, 27, 2)},
    base={"depths": (2, 2, 27, 2), "dims": (128, 256, 512, 1024)},
    tiny_s2l5=_second_version(2, (2, 2, 5, 2)),
    small_s2l15=_second_version(2, (2, 2, 15, 2)),
    base_s2l15=_second_version(2, (2, 2, 15, 2), 128),
    tiny_s1l8=_second_version(1, (2, 2, 8, 2)),
    small_s1l20=_second_version(1, (2, 2, 20, 2)),
    base_s1l20=_second_version(1, (2, 2, 20, 2), 128),
)
class VMamba(Pyramid):
    """VMamba's classifier; "tiny", "small" and "base" are the vanilla sizes. Images of any size of a patch or more.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        dims: Width of every stage.
        depths: Blocks of every stage.
        d_state: State size per channel and route.
        expand: Width between a mixer's projections over that of its stage.
        dt_rank: Rank of the steps' projections; "auto" is `ceil(d_model / 16)`.
        gate: Whether mixers have one.
        conv_bias: Whether their convolutions have a bias.
        d_conv: Side of their convolutions.
        routes: Which routes through the grid they scan; fewer than all four show what the others are worth.
        mlp_ratio: Inner width of the MLP after each mixer over that of its stage; 0 for no MLP.
        stem: Patches by one map, or by two overlapping convolutions.
        downsample: Between stages: patch merging, or a convolution with side 2 or 3.
        patch_size: Pixels of a patch's side.
        drop_path: Rate at which the last block's branches are left out in training; earlier ones less often.
        start: The steps' projections at the start as Mamba has them, or drawn anew as in the last official version.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 9, 2),
        d_state: int = 16,
        expand: int | float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        gate: bool = True,
        conv_bias: bool = True,
        d_conv: int = 3,
        routes: tuple[str, ...] = ROUTES,
        mlp_ratio: float = 0.0,
        stem: Stem = "patches",
        downsample: Downsample = "merge",
        patch_size: int = 4,
        drop_path: float = 0.0,
        start: Literal["mamba", "shipped"] = "mamba",
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, in_channels=in_channels, patch_size=patch_size)
        if len(dims) != len(depths) or not dims:
            raise ConfigError(f"dims={dims} and depths={depths}: needs one of each for every stage")
        self.patch_embed = _stem(stem)(in_channels, dims[0], patch_size)
        mixer = partial(
            CrossScan2d if gate else UngatedCrossScan2d,
            **{"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank, "conv_bias": conv_bias},
            routes=routes,
        )
        rates = iter(rising_rates(drop_path, sum(depths)))

        def block(d_model: int) -> Block:
            mlp = Mlp(d_model, int(mlp_ratio * d_model)) if mlp_ratio > 0 else None
            return Block(d_model, mixer(d_model), mlp, next(rates))

        ways: list[nn.Module | None] = [_downsample(downsample, d_in, d_out) for d_in, d_out in pairwise(dims)]
        self.layers = nn.ModuleList(
            Stage([block(d_model) for _ in range(depth)], way)
            for d_model, depth, way in zip(dims, depths, [*ways, None], strict=True)
        )
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], n_classes)
        start_linear(self.modules())
        if start == "shipped":
            for path in self.modules():
                if isinstance(path, CrossPaths):
                    nn.init.trunc_normal_(path.dt_proj, std=0.02)
        strides = [patch_size * 2**i for i in range(len(dims))]
        self.describe(in_channels, dims, strides, range(len(dims)), "avg")

    def run(
        self, x: Float[Tensor, "b c H W"], after: Collection[int]
    ) -> tuple[list[Float[Tensor, "b h w d"]], tuple[int, ...]]:
        """The grids behind the blocks of some stages."""
        x, grids = self.patch_embed(x), []
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                x = self.through(block, x)
            if i in after:
                grids.append(x)
            if len(grids) == len(after):
                break
            if stage.downsample is not None:
                x = stage.downsample(x)
        return grids, ()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [(r"^layers\.(\d+)\.downsample", LAST), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm\.", LAST)]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    @classmethod
    def first_conv(cls, *, stem: Stem = "patches", **arguments: Any) -> str:
        return "patch_embed.proj" if stem == "patches" else "patch_embed.first.conv"

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return rename(state, self)

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return [module for module in self.modules() if isinstance(module, Block)]


def _stem(kind: str) -> Any:
    if kind not in get_args(Stem):
        raise ConfigError(f"stem={kind!r}: takes {', '.join(map(repr, get_args(Stem)))}")
    return NormedPatches if kind == "patches" else ConvStem


def _downsample(kind: str, d_in: int, d_out: int) -> nn.Module:
    if kind not in get_args(Downsample):
        raise ConfigError(f"downsample={kind!r}: takes {', '.join(map(repr, get_args(Downsample)))}")
    if kind == "merge":
        return PatchMerging(d_in, d_out)
    return ConvNorm(d_in, d_out, 2, 2, 0) if kind == "conv2" else ConvNorm(d_in, d_out, 3, 2, 1)


def rename(state: dict[str, Tensor], model: VMamba) -> dict[str, Tensor]:
    """Names of the last version's two files, and of the first version's checkpoints."""
    ways = [stage.downsample for stage in model.layers if isinstance(stage, Stage) and stage.downsample is not None]
    # Of a model that was cut behind its first stage the state says it.
    is_merge = isinstance(ways[0], PatchMerging) if ways else any(".downsample.2." in key for key in state)
    downsample = {"1.": "norm.", "2.": "reduction."} if is_merge else {"1.": "conv.", "3.": "norm."}
    if isinstance(model.patch_embed, ConvStem):
        stem = {"0.": "first.conv.", "2.": "first.norm.", "5.": "second.conv.", "7.": "second.norm."}
    else:
        stem = {"0.": "proj.", "2.": "norm."}
    parts = [
        ("patch_embed.", stem),
        (".downsample.", downsample),
        ("classifier.", {"norm.": "norm.", "head.": "head."}),
    ]
    renamed = {}
    for key, value in state.items():
        ours = key.replace(".self_attention.", ".mixer.").replace(".op.", ".mixer.").replace(".ln_1.", ".norm.")
        for prefix, names in parts:
            before, found, after = ours.partition(prefix)
            for theirs, name in names.items():
                if found and after.startswith(theirs):
                    ours = before + ("" if prefix == "classifier." else prefix) + name + after[len(theirs) :]
                    break
        name, tensor = _mixer_parameter(ours, value)
        renamed[name] = tensor
    return renamed


PIXEL_MAPS = ("proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")
MIXER = {
    "A_logs": "A_log",
    "Ds": "D",
    "dt_projs_bias": "dt_bias",
    "x_proj_weight": "x_proj",
    "x_proj.weight": "x_proj",
    "dt_projs_weight": "dt_proj",
    "dt_projs.weight": "dt_proj",
}


def _mixer_parameter(key: str, value: Tensor) -> tuple[str, Tensor]:
    before, found, name = key.partition(".mixer.")
    if found and name in MIXER:
        # A product of every route may be stored as one grouped convolution.
        value = value.flatten(1) if name.endswith(".weight") else value
        rest = () if name in ("Ds", "dt_projs_bias") else value.shape[-1:]
        fits = value.numel() > 0 and value.numel() % (4 * math.prod(rest)) == 0
        return f"{before}.mixer.{MIXER[name]}", value.reshape(4, -1, *rest) if fits else value
    # Linear maps may be stored as convolutions of one pixel.
    is_pixel = value.dim() == 4 and value.shape[2:] == (1, 1) and key.endswith(PIXEL_MAPS)
    return key, value.flatten(1) if is_pixel else value
