"""GRU: a gated recurrent network along each series' window, its last state mapped to the horizon.

The recurrent baseline: what a selective scan has to be better than. Every series is read alone, by the same weights.

Source: Cho et al. 2014, arXiv:1406.1078; PyTorch's `nn.GRU`.
Departures: none; no published size is for forecasting. Missing values enter as 0, beside a mark that says so.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.layers.covariates import refuse_covariates
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers.sizes import require_sizes
from selectra.registry import models


@models.register(
    "gru", kind="series", source="arXiv:1406.1078", takes=("observed",), smoke={"d_model": 8, "depth": 1}, base={}
)
class GRU(nn.Module):
    """A gated recurrent network on each series alone.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        d_model: Width of the state.
        depth: Networks on one another.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate between networks and before the head.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        d_model: int = 64,
        depth: int = 2,
        window_norm: WindowNorm = "instance",
        dropout: float = 0.1,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        require_sizes(seq_len=seq_len, n_series=n_series, d_model=d_model, depth=depth)
        require_rate(dropout=dropout)
        self.revin, self.dropout = RevIN(n_series, window_norm), nn.Dropout(dropout)
        # PyTorch warns of a rate that has no place between layers.
        self.gru = nn.GRU(2, d_model, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.head = ForecastHead(d_model, horizon, quantiles)

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
        missing = torch.zeros_like(x) if observed is None else (~observed).to(x.dtype)
        rows = torch.stack([x, missing], -1).transpose(1, 2)  # b s l 2
        _, last = self.gru(rows.flatten(0, 1))
        y = last[-1].unflatten(0, rows.shape[:2])
        return self.revin.inverse(self.head(self.dropout(y)), statistics)
