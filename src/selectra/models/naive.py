"""Forecasts without parameters: the last value, and the last season.

What every model has to beat; the first is "Repeat" in LTSF-Linear's tables.

Source: Hyndman & Athanasopoulos, Forecasting: Principles and Practice, section 5.2.   Departures: none.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.missing import carry_forward
from selectra.registry import models


@models.register(
    "naive", kind="series", source="Hyndman & Athanasopoulos, section 5.2", takes=("observed",), smoke={}, base={}
)
class Naive(nn.Module):
    """The last observed value, repeated; 0 (the training mean) where the window holds none."""

    def __init__(self, *, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b h s"]:
        """The forecast."""
        refuse_covariates(self, past=past, future=future, static=static)
        return carry_forward(x, observed)[:, -1:].expand(-1, self.horizon, -1).clone()


@models.register(
    "seasonal_naive",
    kind="series",
    source="Hyndman & Athanasopoulos, section 5.2",
    takes=("observed",),
    smoke={"season": 4},
    base={},
)
class SeasonalNaive(nn.Module):
    """The last observed value of the same phase of the season; the last observed value where a phase has none.

    Args:
        season: Rows in a season; no longer than the look-back.
    """

    def __init__(self, *, seq_len: int, horizon: int, season: int) -> None:
        super().__init__()
        if not 1 <= season <= seq_len:
            raise ConfigError(
                f"seasonal_naive needs a season between 1 and the look-back of {seq_len} rows, got {season}; "
                "lengthen the look-back or name the season"
            )
        self.horizon, self.season = horizon, season

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b h s"]:
        """The forecast."""
        refuse_covariates(self, past=past, future=future, static=static)
        b, length, s = x.shape
        seen = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        last = carry_forward(x, seen)[:, -1:]
        # Whole seasons, counted from the end of the window; the oldest is filled up with "not observed".
        lead = -length % self.season
        by_season = nn.functional.pad(x, (0, 0, lead, 0)).view(b, -1, self.season, s)
        seen_by_season = nn.functional.pad(seen, (0, 0, lead, 0), value=False).view(b, -1, self.season, s)
        phase = carry_forward(by_season, seen_by_season)[:, -1]  # (b, season, s)
        phase = torch.where(seen_by_season.any(1), phase, last)
        steps = torch.arange(self.horizon, device=x.device) % self.season
        return phase[:, steps]
