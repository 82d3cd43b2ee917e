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

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.conv_stages import (
    ConvMlp,
    ConvStem,
    NormedPyramid,
    NormedStage,
    rename_stages,
    row_block_key,
    start_convolutions,
)
from selectra.layers.drop import rising_rates
from selectra.layers.image import ConvNorm, Mlp, start_linear
from selectra.layers.image_model import LAST
from selectra.mixers import S6, Discretisation, EinFFT, MonarchMLP, RowBlock, make_s6
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

ChannelMixer = Literal["einfft", "monarch", "mlp", "none"]
# Norms before channel mixers and behind stages; all others have PyTorch's.
EPS = 1e-6


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
class Simba(NormedPyramid):
    """SiMBA's classifier, for images of any size.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        d_stem: Width inside the stem.
        dims: Width of every stage.
        depths: Blocks of every stage.
        channel_mixer: What mixes the channels of a token; "none" leaves Mamba alone, to see what the mixer is worth.
        mlp_ratios: Inner width of the MLP or the Monarch maps over the width of each stage.
        n_blocks: Blocks of EinFFT and of Monarch matrices.
        d_state: State size per channel of the Mambas.
        d_conv: Width of their short convolutions.
        expand: Their inner width over the width of their stage.
        discretisation: How their recurrence is made; others than Mamba's show what that buys.
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
        discretisation: Discretisation = "mamba",
        patch_size: int = 4,
        token_labels: bool = False,
        drop_path: float = 0.0,
        start: Literal["mamba", "shipped"] = "mamba",
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, in_channels=in_channels, d_stem=d_stem, patch_size=patch_size)
        if not dims or not len(dims) == len(depths) == len(mlp_ratios):
            raise ConfigError(f"dims={dims}, depths={depths}, mlp_ratios={mlp_ratios}: needs one of each for a stage")

        def block(d_model: int, channel: nn.Module | None, drop_path: float = 0.0) -> RowBlock:
            mamba = make_s6(discretisation, d_model, d_state, d_conv, expand)
            return RowBlock(d_model, mamba, channel, drop_path, EPS)

        def channel(d_model: int, ratio: int | float, mlp: Callable[[int, int], nn.Module]) -> nn.Module | None:
            return make_channel_mixer(channel_mixer, d_model, int(ratio * d_model), n_blocks, mlp)

        embeds = [
            ConvStem(in_channels, d_stem, dims[0], patch_size),
            *(ConvNorm(*widths, 3, 2, 1) for widths in pairwise(dims)),
        ]
        rates = iter(rising_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            NormedStage(embed, [block(d, channel(d, ratio, ConvMlp), next(rates)) for _ in range(depth)], d, EPS)
            for embed, d, depth, ratio in zip(embeds, dims, depths, mlp_ratios, strict=True)
        )
        self.class_block: RowBlock | None = block(dims[-1], channel(dims[-1], mlp_ratios[-1], Mlp))
        self.head = nn.Linear(dims[-1], n_classes)
        self.aux_head: nn.Linear | None = nn.Linear(dims[-1], n_classes) if token_labels else None
        self._start(start)
        self.describe(in_channels, dims, [patch_size * 2**i for i in range(len(dims))], range(len(dims)), "token")

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

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        found = super().group_matcher(coarse)
        return found if coarse else {**found, "blocks": [*found["blocks"], (r"^class_block", LAST)]}

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return rename(state)

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return [module for module in self.modules() if isinstance(module, RowBlock)]

    def _start(self, start: str) -> None:
        mambas = [module for module in self.modules() if isinstance(module, S6)]
        start_linear(self.modules(), () if start == "shipped" else (mamba.dt_proj for mamba in mambas))
        start_convolutions(self.modules())


def make_channel_mixer(
    kind: ChannelMixer, d_model: int, d_hidden: int, n_blocks: int, mlp: Callable[[int, int], nn.Module]
) -> nn.Module | None:
    if kind not in get_args(ChannelMixer):
        raise ConfigError(f"channel_mixer={kind!r}: takes {', '.join(map(repr, get_args(ChannelMixer)))}")
    if kind == "none":
        return None
    if kind == "mlp":
        return mlp(d_model, d_hidden)
    return EinFFT(d_model, n_blocks) if kind == "einfft" else MonarchMLP(d_model, d_hidden, n_blocks)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official classifier's keys under ours."""
    prefix = "post_network.0."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    stages = rename_stages({k: v for k, v in state.items() if not k.startswith(prefix)})
    return stages | {f"class_block.{row_block_key(key)}": value for key, value in own.items()}
