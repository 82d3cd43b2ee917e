"""ModernTCN: large depthwise convolutions along time, Luo and Wang 2024 (ICLR), "ModernTCN: A Modern Pure Convolution
Structure for General Time Series Analysis".

A series is cut into patches, each a vector; a wide depthwise convolution mixes patches of one feature of a series, a
small network mixes the features of each series, another the series of each feature.

Source: github.com/luodhhh/ModernTCN, fd517d6: `ModernTCN-Long-term-forecasting/models/ModernTCN.py`, `scripts/*.sh`.
Glossary: M n_series, D d_model, P patch_len, S stride, N patches, r ffn_ratio.

Departures:
  stages      one stage, as in all of the scripts; the code's further stages, their fusion and its embedding of time are
              never run there
  kernels     the two branches of a convolution stay apart; the code can merge them for inference, which changes nothing
  missing     missing values take no part in the statistics and are then filled with the last observed value
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.missing import carry_forward
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

# From the official scripts at horizon 96.
SIZES: dict[str, dict[str, Any]] = {
    "etth1": {},
    "ettm1": {"depth": 3, "ffn_ratio": 8},
    "weather": {"ffn_ratio": 8, "dropout": 0.4},
}


def depthwise(channels: int, kernel: int) -> nn.Sequential:
    """One branch of a large-kernel convolution."""
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(channels))


class GroupedMlp(nn.Sequential):
    """Two maps around a GELU, of each group of channels by itself."""

    def __init__(self, channels: int, hidden: int, groups: int, dropout: float) -> None:
        super().__init__(
            nn.Conv1d(channels, hidden, 1, groups=groups), nn.Dropout(dropout), nn.GELU(),
            nn.Conv1d(hidden, channels, 1, groups=groups), nn.Dropout(dropout),
        )  # fmt: skip


class Block(nn.Module):
    """Along time by depthwise convolutions, among the features of a series, among the series of a feature; residual."""

    def __init__(
        self, n_series: int, d_model: int, d_ff: int, ffn_ratio: int, kernels: tuple[int, int], dropout: float
    ) -> None:
        super().__init__()
        channels, (large_kernel, small_kernel) = n_series * d_model, kernels
        self.large, self.small = depthwise(channels, large_kernel), depthwise(channels, small_kernel)
        self.norm = nn.BatchNorm1d(d_model)
        self.features = GroupedMlp(channels, n_series * d_ff, n_series, dropout)
        self.series = GroupedMlp(channels, ffn_ratio * channels, d_model, dropout)

    def forward(self, x: Float[Tensor, "b s d n"]) -> Float[Tensor, "b s d n"]:
        shape = x.shape
        flat = x.flatten(1, 2)
        y = self.large(flat) + self.small(flat)
        y = self.norm(y.view(-1, *shape[2:])).reshape(flat.shape)
        y = self.features(y).view(shape).transpose(1, 2)  # b d s n
        return x + self.series(y.flatten(1, 2)).view(y.shape).transpose(1, 2)


@models.register(
    "modern_tcn",
    kind="series",
    source="openreview.net/forum?id=vpJMJerXHU",
    takes=("observed",),
    smoke={"d_model": 4, "large_kernel": 5, "small_kernel": 3},
    base={},
    **SIZES,
)
class ModernTCN(nn.Module):
    """A pure convolutional forecaster; the published sizes are named after data set.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        d_model: Width of a patch's vector.
        depth: Number of blocks.
        ffn_ratio: Inner width of the networks over their outer one.
        d_ff: Inner width of the network among a series' features, where it is to be another one.
        patch_len: Values in a patch.
        stride: Values from one patch's start to the next.
        large_kernel: Patches that a convolution sees; odd.
        small_kernel: Of the branch beside it; odd and no larger.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate after every map of the networks.
        head_dropout: Rate before the head.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        d_model: int = 64,
        depth: int = 1,
        ffn_ratio: int = 1,
        d_ff: int | None = None,
        patch_len: int = 8,
        stride: int = 4,
        large_kernel: int = 51,
        small_kernel: int = 5,
        window_norm: WindowNorm = "revin",
        dropout: float = 0.3,
        head_dropout: float = 0.0,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        d_ff = ffn_ratio * d_model if d_ff is None else d_ff
        require_sizes(n_series=n_series, d_model=d_model, depth=depth, ffn_ratio=ffn_ratio, d_ff=d_ff, stride=stride)
        require_rate(dropout=dropout, head_dropout=head_dropout)
        if not stride <= patch_len or seq_len < stride:
            raise ConfigError(f"seq_len={seq_len}, patch_len={patch_len}, stride={stride}: needs stride <= patch_len "
                              "and seq_len of a stride or more")  # fmt: skip
        if large_kernel % 2 == 0 or small_kernel % 2 == 0 or not 0 < small_kernel <= large_kernel:
            raise ConfigError(f"large_kernel={large_kernel}, small_kernel={small_kernel}: needs odd numbers, the small "
                              "one no larger")  # fmt: skip
        self.revin, self.pad = RevIN(n_series, window_norm), patch_len - stride
        self.stem = nn.Sequential(nn.Conv1d(1, d_model, patch_len, stride), nn.BatchNorm1d(d_model))
        self.layers = nn.Sequential(
            *(Block(n_series, d_model, d_ff, ffn_ratio, (large_kernel, small_kernel), dropout) for _ in range(depth))
        )
        self.dropout = nn.Dropout(head_dropout)
        self.head = ForecastHead(d_model * (seq_len // stride), horizon, quantiles)

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
        rows = carry_forward(x, observed).transpose(1, 2)  # b s l
        rows = torch.cat([rows, rows[..., -1:].expand(-1, -1, self.pad)], 2)
        patches = self.stem(rows.flatten(0, 1).unsqueeze(1)).unflatten(0, rows.shape[:2])  # b s d n
        return self.revin.inverse(self.head(self.dropout(self.layers(patches).flatten(2))), statistics)

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return list(self.layers)
