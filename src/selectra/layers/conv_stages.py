"""What SiMBA and Samba share around their blocks: a stem of convolutions, and stages that hand on normalised grids."""

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.image import ConvNorm, Mlp, convolve, require_image
from selectra.layers.image_model import LAST, Pyramid, leave_out
from selectra.layers.norm import LayerNorm


class ConvMlp(Mlp):
    """Two linear maps around a depthwise 3 x 3 convolution over the grid and a GELU."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__(d_model, d_hidden)
        self.dwconv = nn.Conv2d(d_hidden, d_hidden, 3, padding=1, groups=d_hidden)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        return self.fc2(F.gelu(convolve(self.dwconv, self.fc1(x))))


class ConvStem(nn.Module):
    """Convolutions with batch norm that make a token of `patch_size` pixels a side: a quarter of an image's sides."""

    def __init__(self, in_channels: int, d_hidden: int, d_model: int, patch_size: int = 4) -> None:
        super().__init__()
        if patch_size % 2:
            raise ConfigError(f"patch_size={patch_size}: needs an even number")
        self.in_channels = in_channels
        widths, shapes = (in_channels, d_hidden, d_hidden, d_hidden), ((7, patch_size // 2, 3), (3, 1, 1), (3, 1, 1))
        self.conv = nn.Sequential()
        for (d_in, d_out), (kernel, stride, padding) in zip(pairwise(widths), shapes, strict=True):
            self.conv.append(nn.Conv2d(d_in, d_out, kernel, stride, padding, bias=False))
            self.conv.extend([nn.BatchNorm2d(d_out), nn.ReLU()])
        self.proj = ConvNorm(d_hidden, d_model, 3, 2, 1)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b h w d"]:
        require_image(x, self.in_channels)
        return self.proj(self.conv(x).permute(0, 2, 3, 1))


class NormedStage(nn.Module):
    """The way to a resolution, blocks at it, and a norm."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], d_model: int, eps: float) -> None:
        super().__init__()
        self.embed, self.blocks = embed, nn.Sequential(*blocks)
        self.norm: nn.LayerNorm | None = LayerNorm(d_model, eps=eps)


class NormedPyramid(Pyramid):
    """Stages with a norm behind each; the next stage reads what is normalised. The last norm belongs to the head.

    Subclasses make `stages`, a list of `NormedStage`.
    """

    stages: nn.ModuleList
    level_name, normed_features = "stages", True

    def run(
        self, x: Float[Tensor, "b c H W"], after: Collection[int]
    ) -> tuple[list[Float[Tensor, "b h w d"]], tuple[int, ...]]:
        """The grids behind some stages; all but the last stage's are normalised, since the next one reads them so."""
        grids = []
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, NormedStage)
            x = stage.embed(x)
            for block in stage.blocks:
                x = self.through(block, x)
            # The head pools the last one before the norm.
            if i + 1 < len(self.feature_info):
                x = self._norm(x, i)
            if i in after:
                grids.append(x)
            if len(grids) == len(after):
                break
        return grids, ()

    def normed(self, state: Float[Tensor, "b h w d"], level: int) -> Float[Tensor, "b h w d"]:
        return self._norm(state, level) if level + 1 == len(self.feature_info) else state

    def out(self, state: Float[Tensor, "b h w d"], level: int) -> Float[Tensor, "b d h w"]:
        return state.permute(0, 3, 1, 2)

    def cut(self, stop: int, prune_norm: bool) -> None:
        self.stages = self.stages[: stop + 1]
        if prune_norm and stop + 1 == len(self.feature_info):
            leave_out(self.stages[-1], "norm")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^stages\.(\d+)\.embed", (-1,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", LAST),
        ]
        return {"stem": r"^stages\.0\.embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @classmethod
    def first_conv(cls, **arguments: Any) -> str:
        return "stages.0.embed.conv.0"

    def _norm(self, x: Float[Tensor, "b h w d"], level: int) -> Float[Tensor, "b h w d"]:
        stage = self.stages[level]
        assert isinstance(stage, NormedStage)
        return x if stage.norm is None else stage.norm(x)


@torch.no_grad()
def start_convolutions(modules: Iterable[nn.Module]) -> None:
    """Start the 2D convolutions among these so that their outputs' variance is kept backwards: 2 over the fan out."""
    for module in modules:
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def rename_stages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official code's keys of stem, stages and their norms under ours; others stay."""
    renamed = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        kind, stage = first[:-1], int(first[-1]) - 1 if first[-1:].isdigit() else -1
        if kind == "patch_embed" and stage >= 0:
            # The norm and the convolution before it are one module here; the stem has others before.
            own = {"proj": "conv", "norm": "norm"}
            name, _, last = rest.partition(".")
            inner = f"{own[name]}.{last}" if name in own else rest
            ours = f"stages.{stage}.embed.{'proj.' if stage == 0 and name in own else ''}{inner}"
        elif kind == "block" and stage >= 0:
            ours = f"stages.{stage}.blocks.{row_block_key(rest)}"
        elif kind == "norm" and stage >= 0:
            ours = f"stages.{stage}.norm.{rest}"
        else:
            ours = key
        # Whoever changes a state's precision as a whole makes a count of batches a fraction too.
        renamed[ours] = value.long() if key.endswith("num_batches_tracked") and value.is_floating_point() else value
    return renamed


def row_block_key(key: str) -> str:
    """An official `Block_mamba`'s key under ours."""
    key = key.replace("attn.norm.", "norm1.").replace("attn.mamba.", "mamba.")
    return key.replace("mlp.dwconv.dwconv.", "channel.dwconv.").replace("mlp.", "channel.")
