"""SiMBA: a pyramid of Mamba and spectral channel mixers, Patro and Agneeswaran 2024, arXiv:2403.15360.

A convolutional stem makes a grid of tokens; in four stages, with halved sides between them, blocks mix the tokens by a
Mamba, row by row, and their channels by EinFFT, by Monarch matrices or by an MLP; a class token, the mean of the last
grid's tokens, passes one more block and is read.

Source: github.com/badripatro/simba, 44865e4: `classification/simba.py`.
Glossary: D d_model, N d_state; S, B and L are the sizes small, base and large.

Departures, paper and official code against each other and against this:
  channel mixer  the code has the MLP in place, and EinFFT by an edit (`cm_type`); sizes here are named after theirs,
                 and those without a name have EinFFT, the paper's. Monarch has no code: two maps around a GELU here
  FFT axes       the paper's text has it along the channels, its appendix along the tokens, the code along tokens and
                 blocks of channels, not along rows and columns; so does this
  directions     the paper's Alg. 1 scans both ways, the code one way; so does this
  Alg. 1         has no second layer and no soft threshold in one listing; the code has both
  Eq. 8          is the bilinear rule where the text says zero-order hold; the code has Mamba's, as here
  results        the text says 82.7 and 83.9 % for S (EinFFT) and L, the tables 81.7 and 84.4 %; published parameter
                 counts include the auxiliary head (`token_labels=True`); models trained with token labels, here and in
                 the comparison, stand beside others; L with the MLP is called unstable
  class block    its Mamba sees one token alone, so nothing recurs in it and its A has no effect
  token labels   training on them mixes tokens and gives scores of every token; here both modes give what the official
                 evaluation does: class scores plus half of the tokens' greatest. Users report not-a-numbers in official
                 training without them (badripatro/simba#6, open)
  training       the text has a rate of 1e-5, its table and the script 1e-3; 300 or 310 epochs; drop path 0.1 in the
                 paper and the configuration, 0.05 in the repository's command
  start          the official code draws the steps' projections anew and zeroes their bias, so that all steps start at
                 0.69; here they start as Mamba does (`start="shipped"` for the other)
"""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import ConvNorm, Mlp, convolve, require_image, start_linear
from selectra.layers.image_model import LAST, Pyramid, leave_out
from selectra.layers.norm import LayerNorm
from selectra.mixers import S6, EinFFT, MonarchMLP
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

ChannelMixer = Literal["einfft", "monarch", "mlp"]
# Norms before channel mixers and behind stages; all others have PyTorch's.
EPS = 1e-6


class ConvMlp(Mlp):
    """Two linear maps around a depthwise 3 x 3 convolution over the grid and a GELU."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__(d_model, d_hidden)
        self.dwconv = nn.Conv2d(d_hidden, d_hidden, 3, padding=1, groups=d_hidden)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        return self.fc2(F.gelu(convolve(self.dwconv, self.fc1(x))))


class Block(nn.Module):
    """Mamba along the grid's rows, then a mixer of channels, each behind a norm and added to its input."""

    def __init__(self, d_model: int, mamba: S6, channel: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(d_model), LayerNorm(d_model, eps=EPS)
        self.mamba, self.channel, self.drop_path = mamba, channel, DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        grid = x.shape[1:3]
        x = x + self.drop_path(self.mamba(self.norm1(x).flatten(1, 2)).unflatten(1, grid))
        y = self.norm2(x)
        # MLPs stay on the grid; the others mix a sequence of tokens.
        y = self.channel(y) if isinstance(self.channel, Mlp) else self.channel(y.flatten(1, 2)).unflatten(1, grid)
        return x + self.drop_path(y)


class Stem(nn.Module):
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


class Stage(nn.Module):
    """The way to a resolution, blocks at it, and a norm."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], d_model: int) -> None:
        super().__init__()
        self.embed, self.blocks = embed, nn.Sequential(*blocks)
        self.norm: nn.LayerNorm | None = LayerNorm(d_model, eps=EPS)


SMALL: dict[str, Any] = {}
BASE: dict[str, Any] = {"d_stem": 64, "dims": (64, 128, 320, 512), "depths": (3, 4, 12, 3)}
LARGE: dict[str, Any] = {"d_stem": 64, "dims": (96, 192, 384, 512), "depths": (3, 6, 18, 3)}


@models.register(
    "simba",
    kind="image",
    source="arXiv:2403.15360",
    smoke={"d_stem": 4, "dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2), "d_state": 4},
    small=SMALL,
    base=BASE,
    large=LARGE,
    small_mlp=SMALL | {"channel_mixer": "mlp"},
    base_mlp=BASE | {"channel_mixer": "mlp"},
    large_mlp=LARGE | {"channel_mixer": "mlp"},
    small_monarch=SMALL | {"channel_mixer": "monarch"},
    base_monarch=BASE | {"channel_mixer": "monarch"},
    large_monarch=LARGE | {"channel_mixer": "monarch"},
)
class Simba(Pyramid):
    """SiMBA's classifier, for images of any size.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        d_stem: Width inside the stem.
        dims: Width of every stage.
        depths: Blocks of every stage.
        channel_mixer: What mixes the channels of a token.
        mlp_ratios: Inner width of the MLP or the Monarch maps over the width of each stage.
        n_blocks: Blocks of EinFFT and of Monarch matrices.
        d_state: State size per channel of the Mambas.
        d_conv: Width of their short convolutions.
        expand: Their inner width over the width of their stage.
        patch_size: Pixels of a token's side behind the stem; the official one is 4.
        token_labels: Add half of the tokens' greatest scores, by a head of their own.
        drop_path: Rate at which the last block's branches are left out in training; earlier ones less often.
        start: The steps' projections at the start as Mamba has them, or as the official code.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        d_stem: int = 32,
        dims: tuple[int, ...] = (64, 128, 320, 448),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        channel_mixer: ChannelMixer = "einfft",
        mlp_ratios: tuple[int | float, ...] = (8, 8, 4, 4),
        n_blocks: int = 4,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int | float = 2,
        patch_size: int = 4,
        token_labels: bool = False,
        drop_path: float = 0.0,
        start: Literal["mamba", "shipped"] = "mamba",
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, in_channels=in_channels, d_stem=d_stem, patch_size=patch_size)
        if not dims or not len(dims) == len(depths) == len(mlp_ratios):
            raise ConfigError(f"dims={dims}, depths={depths}, mlp_ratios={mlp_ratios}: needs one of each for a stage")

        def mamba(d_model: int) -> S6:
            return S6(d_model, d_state, d_conv, expand)

        def channel(d_model: int, ratio: int | float, mlp: Callable[[int, int], nn.Module]) -> nn.Module:
            return make_channel_mixer(channel_mixer, d_model, int(ratio * d_model), n_blocks, mlp)

        embeds = [
            Stem(in_channels, d_stem, dims[0], patch_size),
            *(ConvNorm(*widths, 3, 2, 1) for widths in pairwise(dims)),
        ]
        rates = iter(rising_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            Stage(embed, [Block(d, mamba(d), channel(d, ratio, ConvMlp), next(rates)) for _ in range(depth)], d)
            for embed, d, depth, ratio in zip(embeds, dims, depths, mlp_ratios, strict=True)
        )
        self.class_block: Block | None = Block(dims[-1], mamba(dims[-1]), channel(dims[-1], mlp_ratios[-1], Mlp))
        self.head = nn.Linear(dims[-1], n_classes)
        self.aux_head: nn.Linear | None = nn.Linear(dims[-1], n_classes) if token_labels else None
        self._start(start)
        self.describe(in_channels, dims, [patch_size * 2**i for i in range(len(dims))], range(len(dims)), "token")

    level_name, normed_features = "stages", True

    def run(
        self, x: Float[Tensor, "b c H W"], after: Collection[int]
    ) -> tuple[list[Float[Tensor, "b h w d"]], tuple[int, ...]]:
        """The grids behind some stages; all but the last stage's are normalised, since the next one reads them so."""
        grids = []
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            x = stage.embed(x)
            for block in stage.blocks:
                x = self.through(block, x)
            # From the last one the class token is made before the norm.
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
        # The last norm belongs to the head, which makes a class token before it.
        return state.permute(0, 3, 1, 2)

    def pools(self) -> tuple[str, ...]:
        return (*super().pools(), *(("token",) if self.class_block is not None else ()))

    def pool(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        grid = x.permute(0, 2, 3, 1)
        if self.global_pool == "token":
            assert self.class_block is not None
            token = self.class_block(grid.mean((1, 2), keepdim=True))
            return self.normed(token, len(self.stages) - 1)[:, 0, 0]
        return super().pool(self.normed(grid, len(self.stages) - 1).permute(0, 3, 1, 2))

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Tensor:
        """Scores of the classes; a head of tokens' labels adds half of their greatest."""
        y = super().forward_head(x, pre_logits)
        if self.aux_head is None or pre_logits:
            return y
        tokens = self.normed(x.permute(0, 2, 3, 1), len(self.stages) - 1)
        return y + 0.5 * self.aux_head(tokens).flatten(1, 2).amax(1)

    def get_classifier(self) -> Any:
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            aux_head = self.new_head(num_classes)
            self.aux_head = aux_head if isinstance(aux_head, nn.Linear) else None

    def drop_head(self) -> None:
        super().drop_head()
        self.class_block = None

    def cut(self, stop: int, prune_norm: bool) -> None:
        self.stages = self.stages[: stop + 1]
        if prune_norm and stop + 1 == len(self.feature_info):
            leave_out(self.stages[-1], "norm")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^stages\.(\d+)\.embed", (-1,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", LAST),
            (r"^class_block", LAST),
        ]
        return {"stem": r"^stages\.0\.embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @classmethod
    def first_conv(cls, **arguments: Any) -> str:
        return "stages.0.embed.conv.0"

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return rename(state, len(self.stages))

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def _norm(self, x: Float[Tensor, "b h w d"], level: int) -> Float[Tensor, "b h w d"]:
        stage = self.stages[level]
        assert isinstance(stage, Stage)
        return x if stage.norm is None else stage.norm(x)

    @torch.no_grad()
    def _start(self, start: str) -> None:
        mambas = [module for module in self.modules() if isinstance(module, S6)]
        start_linear(self.modules(), () if start == "shipped" else (mamba.dt_proj for mamba in mambas))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def make_channel_mixer(
    kind: ChannelMixer, d_model: int, d_hidden: int, n_blocks: int, mlp: Callable[[int, int], nn.Module]
) -> nn.Module:
    if kind not in get_args(ChannelMixer):
        raise ConfigError(f"channel_mixer={kind!r}: takes {', '.join(map(repr, get_args(ChannelMixer)))}")
    if kind == "mlp":
        return mlp(d_model, d_hidden)
    return EinFFT(d_model, n_blocks) if kind == "einfft" else MonarchMLP(d_model, d_hidden, n_blocks)


def rename(state: dict[str, Tensor], n_stages: int) -> dict[str, Tensor]:
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
            ours = f"stages.{stage}.blocks.{_block_key(rest)}"
        elif kind == "norm" and stage >= 0:
            ours = f"stages.{stage}.norm.{rest}"
        elif key.startswith("post_network.0."):
            ours = f"class_block.{_block_key(rest.removeprefix('0.'))}"
        else:
            ours = key
        # Whoever changes a state's precision as a whole makes a count of batches a fraction too.
        renamed[ours] = value.long() if key.endswith("num_batches_tracked") and value.is_floating_point() else value
    return renamed


def rename_block(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_block_key(key): value for key, value in state.items()}


def _block_key(key: str) -> str:
    key = key.replace("attn.norm.", "norm1.").replace("attn.mamba.", "mamba.")
    return key.replace("mlp.dwconv.dwconv.", "channel.dwconv.").replace("mlp.", "channel.")
