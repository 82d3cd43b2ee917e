"""NLinear and RLinear: one linear map of the normalised window, the same for all series.

NLinear subtracts the window's last value and adds it to the forecast; RLinear removes mean and standard deviation, with
a learned gain and bias for each series (RevIN). `linear` is the first, solved in closed form.

Source: NLinear: Zeng et al. 2023, arXiv:2205.13504; LTSF-Linear's `models/NLinear.py`. RLinear: Li et al. 2023,
arXiv:2305.10721; github.com/plumprc/RTSF, 0fec001, `models/RLinear.py`.
Departures: maps are shared by all series (`individual=False` in both); missing values take no part in the statistics
and are then filled with the last observed value.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.layers.covariates import refuse_covariates
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.missing import carry_forward
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers.sizes import require_sizes
from selectra.registry import models


@models.register("nlinear", kind="series", source="arXiv:2205.13504", takes=("observed",), smoke={}, base={})
@models.register(
    "rlinear",
    kind="series",
    source="arXiv:2305.10721",
    takes=("observed",),
    smoke={"window_norm": "revin"},
    base={"window_norm": "revin"},
)
class NormLinear(nn.Module):
    """A linear map of the window, normalised by its last value (NLinear) or by RevIN (RLinear).

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate on the normalised window.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        window_norm: WindowNorm = "last",
        dropout: float = 0.0,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        require_sizes(seq_len=seq_len, n_series=n_series)
        require_rate(dropout=dropout)
        self.revin, self.dropout = RevIN(n_series, window_norm), nn.Dropout(dropout)
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
        x = self.dropout(carry_forward(x, observed))
        return self.revin.inverse(self.head(x.transpose(1, 2)), statistics)
