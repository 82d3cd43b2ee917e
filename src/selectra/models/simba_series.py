"""SiMBA for series: Mamba along time and a channel mixer, Patro and Agneeswaran 2024, arXiv:2403.15360.

Each series is cut into patches. A block mixes patches by Mamba and then the features of each patch by EinFFT, by
Monarch matrices or by an MLP, each behind a norm and added to the stream.

The paper's series code was never released (its repository holds image classification alone), so this is a reading: the
block is the released one, and nothing about patches, sizes or the head is known.

Source: the block is `Block_mamba` of github.com/badripatro/simba, 44865e4, `classification/simba.py`.
Glossary: D d_model, N d_state.

Departures, all of them our choices:
  patches        each series alone, in overlapping patches that end at the last value, with learned positions
  d_model, depth not given; d_state, d_conv and expand are those of the released block
  mlp            the released one has a 3 x 3 depthwise convolution over the image's grid; here 3 wide along the patches
  monarch        not in the released code; two Monarch maps (Dao et al. 2022, arXiv:2204.00595) around a GELU
  dropout        after each mixer, in place of dropped paths
  window_norm    the paper names none; each window is normalised by its own statistics, as its rivals are
  head           one linear map of all patches' features
EinFFT's transform along the patches shows each patch those after it: inside the look-back window, never beyond it.
Missing values enter as marked gaps.
"""

from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.embed import PatchEmbedSeries
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers import S6, Discretisation, EinFFT, MonarchMLP, make_s6
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

ChannelMixer = Literal["einfft", "monarch", "mlp", "none"]
# The released block's norm.
EPS = 1e-6


class ConvMLP(nn.Module):
    """Two linear maps around a depthwise convolution along the patches and a GELU."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, d_hidden), nn.Linear(d_hidden, d_model)
        self.dwconv = nn.Conv1d(d_hidden, d_hidden, 3, padding=1, groups=d_hidden)

    def forward(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        hidden = self.dwconv(self.fc1(x).transpose(1, 2)).transpose(1, 2)
        return self.fc2(F.gelu(hidden))


class Block(nn.Module):
    """SiMBA's block: Mamba along the tokens, then a mixer of their channels."""

    def __init__(self, d_model: int, mamba: S6, channel: nn.Module | None, dropout: float) -> None:
        super().__init__()
        # The norm before Mamba is inside of the released `MambaLayer`, with PyTorch's eps.
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = None if channel is None else nn.LayerNorm(d_model, eps=EPS)
        self.mamba, self.channel, self.dropout = mamba, channel, nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        x = x + self.dropout(self.mamba(self.norm1(x)))
        if self.channel is None or self.norm2 is None:
            return x
        return x + self.dropout(self.channel(self.norm2(x)))


@models.register(
    "simba_series",
    kind="series",
    source="arXiv:2403.15360",
    takes=("observed",),
    smoke={"d_model": 8, "depth": 1, "d_state": 4, "patch_len": 8, "stride": 4},
    base={},
    monarch={"channel_mixer": "monarch"},
    mlp={"channel_mixer": "mlp"},
)
class SimbaSeries(nn.Module):
    """SiMBA on the patches of each series; our reading, no series code was released.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        d_model: Width of a token.
        depth: Number of blocks.
        channel_mixer: What mixes the features of a token; "none" leaves Mamba alone, to see what the mixer is worth.
        n_blocks: Blocks of EinFFT and of Monarch matrices.
        mlp_ratio: Inner width of the Monarch or MLP mixer over `d_model`.
        d_state: State size per channel of the Mambas.
        d_conv: Width of their short convolutions.
        expand: Their inner width over `d_model`.
        discretisation: How their recurrence is made; others than Mamba's show what that buys.
        patch_len: Values in a patch.
        stride: Values from one patch's start to the next.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate after each mixer and before the head.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        d_model: int = 32,
        depth: int = 2,
        channel_mixer: ChannelMixer = "einfft",
        n_blocks: int = 4,
        mlp_ratio: int = 4,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int | float = 2,
        discretisation: Discretisation = "mamba",
        patch_len: int = 16,
        stride: int = 8,
        window_norm: WindowNorm = "instance",
        dropout: float = 0.1,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        require_sizes(n_series=n_series, depth=depth, n_blocks=n_blocks, mlp_ratio=mlp_ratio)
        require_rate(dropout=dropout)
        self.revin = RevIN(n_series, window_norm)
        self.embed = PatchEmbedSeries(seq_len, d_model, patch_len, stride)

        def channel() -> nn.Module | None:
            if channel_mixer == "none":
                return None
            if channel_mixer == "einfft":
                return EinFFT(d_model, n_blocks)
            if channel_mixer == "monarch":
                return MonarchMLP(d_model, mlp_ratio * d_model, n_blocks)
            if channel_mixer == "mlp":
                return ConvMLP(d_model, mlp_ratio * d_model)
            raise ConfigError(f"channel_mixer={channel_mixer!r}: takes {', '.join(map(repr, get_args(ChannelMixer)))}")

        self.layers = nn.Sequential(
            *(
                Block(d_model, make_s6(discretisation, d_model, d_state, d_conv, expand), channel(), dropout)
                for _ in range(depth)
            )
        )
        self.norm_f, self.dropout = nn.LayerNorm(d_model), nn.Dropout(dropout)
        self.head = ForecastHead(self.embed.n_patches * d_model, horizon, quantiles)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b horizon s *q"]:
        """The forecast."""
        refuse_covariates(self, past=past, future=future, static=static)
        x, statistics = self.revin(x, observed)
        tokens = self.embed(x, observed)  # b s p d
        y = self.norm_f(self.layers(tokens.flatten(0, 1))).unflatten(0, tokens.shape[:2])
        return self.revin.inverse(self.head(self.dropout(y).flatten(2)), statistics)
