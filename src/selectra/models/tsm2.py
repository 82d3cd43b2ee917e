"""Time Series MambaMixer (TSM2), Behrouz, Santacatterina and Zabih 2024, arXiv:2403.19888, Sec. 5.1.

Each variate is cut into patches; blocks mix selectively along time (one way) and across variates (both ways), fed by
weighted averages of all earlier features; a linear head reads the last block's channel mixer.

Glossary: L and Lyr seq_len and depth, M n_series, D d_model, N d_state.

Departures: there is no official code, and the paper leaves these open. Each is an argument; defaults were chosen on
ETTh1's validation windows at seq_len = horizon = 96.
  patch_len, stride     not given; overlapping patches that end at the last value
  d_model ... expand    not given
  window_norm           the paper names none; each window is normalised by its own statistics, as its rivals are
  norm                  "2D normalization on both time and feature dimensions": layer norm over (patch, feature)
                        jointly, before each mixer and before the head; "batch" is TSMixer's other one, over the batch
                        for each (patch, feature)
  residual              the averages stand "contrary to simple skip connections"; here each mixer's input is added to
                        its output as well, which lowers the validation error by 1 %
  dropout               not given; after each mixer and before the head
  without               not in the paper: leaves one part out, to see what it is worth
  quantiles             not in the paper; one head output for each, which may cross
  future                covariates are common to all variates here, so the channel mixer reads across covariates, each
                        a vector made from its whole course, and all variates get the same projection
  past                  the paper does not treat them apart: here they are further variates, whose forecast is dropped
Positions are learned. The order of variates in the channel scan is the data's. Missing values enter as marked gaps.
"""

from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.embed import PatchEmbedSeries
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.norm import BatchNorm2d, LayerNorm
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers import S6, SelectiveChannel, WeightedAverage
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

Norm = Literal["patch_feature", "feature", "batch"]
Without = Literal["nothing", "time", "channels", "averages"]


class Block(nn.Module):
    """One MambaMixer layer: a token mixer along time within a variate, a channel mixer across variates at a time.

    Tokens are `(b, s, p, d)`: batch, series, patch, feature.
    """

    calls: ClassVar = ("mix_tokens", "mix_channels")
    """What the model calls in place of the block itself; sharding and recomputing read it."""

    def __init__(
        self, n_patches: int, d_model: int, norm: str, dropout: float, without: Without = "nothing", **mixer: Any
    ) -> None:
        super().__init__()
        if without != "time":
            self.token_norm, self.token = norm_2d(norm, n_patches, d_model), S6(d_model, **mixer)
        if without != "channels":
            self.channel_norm = norm_2d(norm, n_patches, d_model)
            self.channel = SelectiveChannel(d_model, **mixer)
        self.dropout = nn.Dropout(dropout)

    def mix_tokens(self, x: Float[Tensor, "b s p d"]) -> Float[Tensor, "b s p d"]:
        y = self.token(self.token_norm(x).flatten(0, 1))  # (b s) p d
        return self.dropout(y).unflatten(0, x.shape[:2])

    def mix_channels(self, x: Float[Tensor, "b s p d"]) -> Float[Tensor, "b s p d"]:
        across = self.channel_norm(x).transpose(1, 2)  # b p s d
        y = self.channel(across.flatten(0, 1)).unflatten(0, across.shape[:2])
        return self.dropout(y).transpose(1, 2)


class Auxiliary(nn.Module):
    """What covariates say, each kind as long as the window and appended to it: `x || Z_proj || S_proj`.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_future: Number of covariates known over the horizon too.
        n_static: Number of covariates of a series that are constant in time.
        d_model: Width of a covariate's vector in the mixer.
        mixer: The mixer's sizes.
    """

    def __init__(self, seq_len: int, horizon: int, n_future: int, n_static: int, d_model: int, **mixer: Any) -> None:
        super().__init__()
        self.counts = {"future": n_future, "static": n_static}
        self.length = seq_len * (1 + sum(n > 0 for n in self.counts.values()))
        if n_future:
            self.embed, self.mix = nn.Linear(seq_len + horizon, d_model), SelectiveChannel(d_model, **mixer)
            self.future = nn.Linear(n_future * d_model, seq_len)
        if n_static:
            self.static = nn.Linear(n_static, seq_len)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        observed: Bool[Tensor, "b l s"] | None,
        future: Float[Tensor, "b t f"] | None,
        static: Float[Tensor, "b s e"] | None,
    ) -> tuple[Float[Tensor, "b m s"], Bool[Tensor, "b m s"] | None]:
        """The longer window, and what of it is observed."""
        for kind, given in (("future", future), ("static", static)):
            if (given is not None) != (self.counts[kind] > 0):
                what = "missing" if given is None else "given"
                raise ConfigError(f"{kind} covariates are {what}; TSM2 was built with n_{kind}={self.counts[kind]}")
        parts = [x]
        if future is not None:
            mixed = self.mix(self.embed(future.transpose(1, 2)))  # b f d
            parts.append(self.future(mixed.flatten(1))[:, :, None].expand_as(x))
        if static is not None:
            parts.append(self.static(static).transpose(1, 2))
        if observed is not None:
            observed = torch.cat([observed, *(torch.ones_like(observed) for _ in parts[1:])], 1)
        return torch.cat(parts, 1), observed


@models.register(
    "tsm2",
    kind="series",
    source="arXiv:2403.19888",
    takes=("observed", "past", "future", "static"),
    smoke={"d_model": 8, "depth": 1, "d_state": 4, "patch_len": 8, "stride": 4},
    base={},
    large={"d_model": 32, "depth": 2, "d_state": 16},
)
class TSM2(nn.Module):
    """Selective mixing along time and across variates, for forecasting many series at once.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        d_model: Width of a token.
        depth: Number of blocks.
        d_state: State size per channel of the mixers.
        d_conv: Width of their short convolutions.
        expand: Their inner width over `d_model`.
        patch_len: Values in a patch.
        stride: Values from one patch's start to the next.
        window_norm: What is removed from each window and given back to its forecast.
        norm: The norm before each mixer: over (patch, feature) jointly, over features alone, or over the batch for
            each (patch, feature).
        residual: Add each mixer's input to its output, beside the weighted averages.
        dropout: Rate after each mixer and before the head.
        without: A part that is left out: the mixer along time, the one across variates, or the weighted averages, for
            which each mixer then reads the newest features alone.
        quantiles: Levels to forecast in place of one value; adds a last axis.
        n_future: Number of covariates known over the horizon too.
        n_static: Number of covariates of a series that are constant in time.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        d_model: int = 16,
        depth: int = 1,
        d_state: int = 8,
        d_conv: int = 4,
        expand: int | float = 2,
        patch_len: int = 16,
        stride: int = 8,
        window_norm: WindowNorm = "instance",
        norm: Norm = "patch_feature",
        residual: bool = True,
        dropout: float = 0.2,
        without: Without = "nothing",
        quantiles: tuple[float, ...] = (),
        n_future: int = 0,
        n_static: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(seq_len=seq_len, n_series=n_series, depth=depth)
        require_rate(dropout=dropout)
        if without not in get_args(Without):
            raise ConfigError(f"without={without!r}: takes {', '.join(map(repr, get_args(Without)))}")
        self.residual, self.without = residual, without
        self.revin = RevIN(n_series, window_norm)
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.auxiliary = Auxiliary(seq_len, horizon, n_future, n_static, d_model, **mixer)
        self.embed = PatchEmbedSeries(self.auxiliary.length, d_model, patch_len, stride)
        n_patches = self.embed.n_patches
        self.layers = nn.ModuleList(Block(n_patches, d_model, norm, dropout, without, **mixer) for _ in range(depth))
        self.average = None if without == "averages" else WeightedAverage(depth)
        self.norm_f = norm_2d(norm, n_patches, d_model)
        self.dropout = nn.Dropout(dropout)
        self.head = ForecastHead(n_patches * d_model, horizon, quantiles)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b horizon s *q"]:
        """The forecast; covariates of the past are further variates."""
        x, statistics = self.revin(x, observed)
        n_series = x.shape[2]
        if past is not None:
            x = torch.cat([x, past.to(x.dtype)], 2)
            observed = None if observed is None else F.pad(observed, (0, past.shape[2]), value=True)
            static = None if static is None else F.pad(static, (0, 0, 0, past.shape[2]))
        y = self.features(*self.auxiliary(x, observed, future, static))[:, :n_series]
        return self.revin.inverse(self.head(self.dropout(self.norm_f(y)).flatten(2)), statistics)

    def features(
        self, x: Float[Tensor, "b l s"], observed: Bool[Tensor, "b l s"] | None = None
    ) -> Float[Tensor, "b s p d"]:
        """The last block's output for a normalised window, longer by what covariates say."""
        tokens = [self.embed(x, observed)]
        channels = list(tokens)
        for layer in self.blocks():
            before = channels[-1] if self.average is None else self.average.token_input(tokens, channels)
            tokens.append(before if self.without == "time" else self._add(before, layer.mix_tokens(before)))
            before = tokens[-1] if self.average is None else self.average.channel_input(tokens, channels)
            channels.append(before if self.without == "channels" else self._add(before, layer.mix_channels(before)))
        return channels[-1]

    def _add(self, before: Tensor, after: Tensor) -> Tensor:
        return before + after if self.residual else after

    def blocks(self) -> list[Block]:
        """What to shard and to checkpoint."""
        return [layer for layer in self.layers if isinstance(layer, Block)]


def norm_2d(kind: str, n_patches: int, d_model: int) -> nn.Module:
    """A norm over (patch, feature) jointly, over features alone, or over the batch for each (patch, feature)."""
    if kind not in get_args(Norm):
        raise ConfigError(f"norm={kind!r}: takes {', '.join(map(repr, get_args(Norm)))}")
    if kind == "batch":
        return BatchNorm2d(n_patches, d_model)
    return LayerNorm([n_patches, d_model]) if kind == "patch_feature" else nn.LayerNorm(d_model)
