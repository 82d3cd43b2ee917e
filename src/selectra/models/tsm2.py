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
                        jointly, before each mixer and before the head; TSMixer, its model, also has batch norm
  residual              the averages stand "contrary to simple skip connections"; here each mixer's input is added to
                        its output as well, which lowers the validation error by 1 %
  dropout               not given; after each mixer and before the head
  quantiles             not in the paper; one head output for each, which may cross
Positions are learned. The order of variates in the channel scan is the data's. Missing values enter as marked gaps.
Auxiliary covariates come through the wrapper common to all models, not through the paper's concatenation.
"""

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.embed import PatchEmbedSeries
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers import S6, SelectiveChannel, WeightedAverage
from selectra.registry import models


class Block(nn.Module):
    """One MambaMixer layer: a token mixer along time within a variate, a channel mixer across variates at a time.

    Tokens are `(b, s, p, d)`: batch, series, patch, feature.
    """

    def __init__(self, n_patches: int, d_model: int, norm: str, dropout: float, **mixer: Any) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = norm_2d(norm, n_patches, d_model), norm_2d(norm, n_patches, d_model)
        self.token, self.channel = S6(d_model, **mixer), SelectiveChannel(d_model, **mixer)
        self.dropout = nn.Dropout(dropout)

    def mix_tokens(self, x: Float[Tensor, "b s p d"]) -> Float[Tensor, "b s p d"]:
        y = self.token(self.token_norm(x).flatten(0, 1))  # (b s) p d
        return self.dropout(y).unflatten(0, x.shape[:2])

    def mix_channels(self, x: Float[Tensor, "b s p d"]) -> Float[Tensor, "b s p d"]:
        across = self.channel_norm(x).transpose(1, 2)  # b p s d
        y = self.channel(across.flatten(0, 1)).unflatten(0, across.shape[:2])
        return self.dropout(y).transpose(1, 2)


@models.register(
    "tsm2",
    kind="series",
    source="arXiv:2403.19888",
    takes=("observed",),
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
        norm: The norm before each mixer: over (patch, feature) jointly, or over features alone.
        residual: Add each mixer's input to its output, beside the weighted averages.
        dropout: Rate after each mixer and before the head.
        quantiles: Levels to forecast in place of one value; adds a last axis.
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
        norm: Literal["patch_feature", "feature"] = "patch_feature",
        residual: bool = True,
        dropout: float = 0.2,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        for name, value in (("horizon", horizon), ("n_series", n_series), ("depth", depth)):
            if value < 1:
                raise ConfigError(f"{name}={value}: needs at least 1")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout={dropout}: must be at least 0 and less than 1")
        if any(not 0 < level < 1 for level in quantiles):
            raise ConfigError(f"quantiles={quantiles}: each must lie between 0 and 1")
        self.horizon, self.quantiles, self.residual = horizon, quantiles, residual
        self.revin = RevIN(n_series, window_norm)
        self.embed = PatchEmbedSeries(seq_len, d_model, patch_len, stride)
        n_patches = self.embed.n_patches
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.layers = nn.ModuleList(Block(n_patches, d_model, norm, dropout, **mixer) for _ in range(depth))
        self.average = WeightedAverage(depth)
        self.norm_f = norm_2d(norm, n_patches, d_model)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_patches * d_model, horizon * max(1, len(quantiles)))

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b horizon s"] | Float[Tensor, "b horizon s q"]:
        refuse_covariates(self, past=past, future=future, static=static)
        x, statistics = self.revin(x, observed)
        y = self.features(x, observed)
        y = self.head(self.dropout(self.norm_f(y)).flatten(2))  # b s (horizon q)
        y = y.unflatten(2, (self.horizon, -1)).transpose(1, 2)  # b horizon s q
        return self.revin.inverse(y if self.quantiles else y.squeeze(3), statistics)

    def features(
        self, x: Float[Tensor, "b l s"], observed: Bool[Tensor, "b l s"] | None = None
    ) -> Float[Tensor, "b s p d"]:
        """The last block's output for a normalised window."""
        tokens = [self.embed(x, observed)]
        channels = list(tokens)
        for layer in self.blocks():
            before = self.average.token_input(tokens, channels)
            after = layer.mix_tokens(before)
            tokens.append(before + after if self.residual else after)
            before = self.average.channel_input(tokens, channels)
            after = layer.mix_channels(before)
            channels.append(before + after if self.residual else after)
        return channels[-1]

    def blocks(self) -> list[Block]:
        """What to shard and to checkpoint."""
        return [layer for layer in self.layers if isinstance(layer, Block)]


def norm_2d(kind: str, n_patches: int, d_model: int) -> nn.LayerNorm:
    """A norm over (patch, feature) jointly, or over features alone."""
    if kind not in ("patch_feature", "feature"):
        raise ConfigError(f"norm={kind!r}: takes 'patch_feature' or 'feature'")
    return nn.LayerNorm([n_patches, d_model] if kind == "patch_feature" else [d_model])
