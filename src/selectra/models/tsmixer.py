"""TSMixer: linear maps along time and small networks across series, in turn, Chen et al. 2023, arXiv:2303.06053.

Source: google-research, `tsmixer/tsmixer_basic/models/tsmixer_rev_in.py` and `tsmixer.py`, `run_tuned_hparam.sh`.
Glossary: L seq_len, T horizon, C n_series, ff_dim d_ff, n_block depth.

Departures: missing values take no part in the statistics and are then filled with the last observed value.
"""

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.missing import carry_forward
from selectra.layers.norm import BatchNorm2d, LayerNorm
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

# The tuned script's, for look-back 512 and horizon 96; it names no other data.
SIZES: dict[str, dict[str, Any]] = {
    "ettm2": {"depth": 2, "dropout": 0.9, "d_ff": 64},
    "weather": {"depth": 4, "dropout": 0.3, "d_ff": 32},
    "electricity": {"depth": 4, "dropout": 0.7, "d_ff": 64},
    "traffic": {"depth": 8, "dropout": 0.7, "d_ff": 64},
}


class Block(nn.Module):
    """Mix along time, then across series; each behind a norm over rows and series, and added to the stream."""

    def __init__(self, seq_len: int, n_series: int, d_ff: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(norm, seq_len, n_series), _norm(norm, seq_len, n_series)
        self.time = nn.Linear(seq_len, seq_len)
        self.up, self.down = nn.Linear(n_series, d_ff), nn.Linear(d_ff, n_series)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b l s"]) -> Float[Tensor, "b l s"]:
        y = F.relu(self.time(self.norm1(x).transpose(1, 2))).transpose(1, 2)
        x = x + self.dropout(y)
        y = self.dropout(F.relu(self.up(self.norm2(x))))
        return x + self.dropout(self.down(y))


@models.register(
    "tsmixer",
    kind="series",
    source="arXiv:2303.06053",
    takes=("observed",),
    smoke={"depth": 1, "d_ff": 8, "norm": "layer"},
    base={},
    **SIZES,
)
class TSMixer(nn.Module):
    """Linear maps in turn along time and across series; the published sizes are named after data set.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        depth: Number of blocks.
        d_ff: Width of the networks across series.
        norm: Of (row, series): each over the batch, as published, or all jointly in each window.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate after every map of a block.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        depth: int = 2,
        d_ff: int = 64,
        norm: Literal["batch", "layer"] = "batch",
        window_norm: WindowNorm = "revin",
        dropout: float = 0.3,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        require_sizes(seq_len=seq_len, n_series=n_series, depth=depth, d_ff=d_ff)
        require_rate(dropout=dropout)
        self.revin = RevIN(n_series, window_norm)
        self.layers = nn.Sequential(*(Block(seq_len, n_series, d_ff, norm, dropout) for _ in range(depth)))
        self.head = ForecastHead(seq_len, horizon, quantiles)

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
        y = self.layers(carry_forward(x, observed))
        return self.revin.inverse(self.head(y.transpose(1, 2)), statistics)


def _norm(kind: str, rows: int, series: int) -> nn.Module:
    if kind not in ("batch", "layer"):
        raise ConfigError(f"norm={kind!r}: takes 'batch' or 'layer'")
    # Keras' eps.
    return BatchNorm2d(rows, series) if kind == "batch" else LayerNorm([rows, series], eps=1e-3)
