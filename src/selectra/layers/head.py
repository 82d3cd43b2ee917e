"""From a series' features to its forecast."""

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError


class ForecastHead(nn.Linear):
    """One linear map, the same for all series, to every step of the horizon, and to every quantile where asked.

    Args:
        d_in: Features of a series.
        horizon: Values forecast.
        quantiles: Levels to forecast in place of one value; adds a last axis. Nothing keeps them from crossing.
    """

    def __init__(self, d_in: int, horizon: int, quantiles: tuple[float, ...] = ()) -> None:
        if horizon < 1:
            raise ConfigError(f"horizon={horizon}: needs at least 1")
        if any(not 0 < level < 1 for level in quantiles):
            raise ConfigError(f"quantiles={quantiles}: each must lie between 0 and 1")
        super().__init__(d_in, horizon * max(1, len(quantiles)))
        self.horizon, self.quantiles = horizon, quantiles

    def forward(self, input: Float[Tensor, "b s d"]) -> Float[Tensor, "b horizon s *q"]:
        """The forecast, still in the normalised window's units."""
        y = super().forward(input).unflatten(2, (self.horizon, -1)).transpose(1, 2)  # b horizon s q
        return y if self.quantiles else y.squeeze(3)


def require_rate(**rates: float) -> None:
    """Raise unless each rate of dropout is at least 0 and less than 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ConfigError(f"{name}={rate}: must be at least 0 and less than 1")
