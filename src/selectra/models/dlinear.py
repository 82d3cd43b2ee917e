"""DLinear: a moving average and what it leaves, each with its own linear map.

Source: Zeng et al. 2023, arXiv:2205.13504, section 4; LTSF-Linear's `models/DLinear.py`.
Departures: none; maps are shared by all series (`individual=False` there).
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.head import ForecastHead
from selectra.layers.missing import carry_forward
from selectra.layers.revin import RevIN, WindowNorm
from selectra.registry import models


@models.register("dlinear", kind="series", source="arXiv:2205.13504", takes=("observed",), smoke={"kernel": 5}, base={})
class DLinear(nn.Module):
    """Linear maps of the trend (moving average) and of the remainder, added.

    Missing inputs carry the last observed value of the window forward.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        kernel: Rows in the moving average; odd. Both ends of the window are repeated for it.
        n_series: Number of series; used with `window_norm="revin"`.
        window_norm: What is removed from each window and given back to its forecast.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        kernel: int = 25,
        n_series: int = 1,
        window_norm: WindowNorm = "none",
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"dlinear needs an odd 'kernel' of at least 1, got {kernel}")
        self.kernel = kernel
        self.revin = RevIN(n_series, window_norm)
        self.seasonal = ForecastHead(seq_len, horizon, quantiles)
        self.trend = ForecastHead(seq_len, horizon, quantiles)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b h s *q"]:
        """The forecast."""
        refuse_covariates(self, past=past, future=future, static=static)
        x, statistics = self.revin(x, observed)
        x = carry_forward(x, observed).transpose(1, 2)
        half = self.kernel // 2
        padded = nn.functional.pad(x, (half, half), mode="replicate")
        trend = nn.functional.avg_pool1d(padded, self.kernel, stride=1)
        return self.revin.inverse(self.seasonal(x - trend) + self.trend(trend), statistics)
