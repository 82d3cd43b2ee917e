"""DLinear: a moving average and what it leaves, each with its own linear map.

Source: Zeng et al. 2023, arXiv:2205.13504, section 4; LTSF-Linear's `models/DLinear.py`.
Departures: none; maps are shared by all series (`individual=False` there).
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.missing import carry_forward
from selectra.registry import models


@models.register("dlinear", kind="series", source="arXiv:2205.13504", takes=("observed",), smoke={"kernel": 5}, base={})
class DLinear(nn.Module):
    """Linear maps of the trend (moving average) and of the remainder, added.

    Missing inputs carry the last observed value of the window forward.

    Args:
        kernel: Rows in the moving average; odd. Both ends of the window are repeated for it.
    """

    def __init__(self, *, seq_len: int, horizon: int, kernel: int = 25) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"dlinear needs an odd 'kernel' of at least 1, got {kernel}")
        self.kernel = kernel
        self.seasonal = nn.Linear(seq_len, horizon)
        self.trend = nn.Linear(seq_len, horizon)

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
        x = carry_forward(x, observed).transpose(1, 2)
        half = self.kernel // 2
        padded = nn.functional.pad(x, (half, half), mode="replicate")
        trend = nn.functional.avg_pool1d(padded, self.kernel, stride=1)
        return (self.seasonal(x - trend) + self.trend(trend)).transpose(1, 2)
