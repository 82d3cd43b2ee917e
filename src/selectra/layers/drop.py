"""Stochastic depth and learned scales of residual branches."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError


class DropPath(nn.Module):
    """Leave a residual branch out for some elements of a batch, in training; the others are scaled up.

    Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382.

    Args:
        rate: Share of elements for which the branch is left out.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        require_rate(rate)
        self.rate = rate

    def forward(self, x: Float[Tensor, " b *rest"]) -> Float[Tensor, " b *rest"]:
        if not self.training or self.rate == 0:
            return x
        kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def rising_rates(rate: float, depth: int) -> list[float]:
    """Rates of `DropPath` from 0 in the first of `depth` blocks to `rate` in the last, in equal steps."""
    require_rate(rate)
    return [rate * i / max(1, depth - 1) for i in range(depth)]


def require_rate(rate: float) -> None:
    """Raise unless a branch can be left out so often."""
    if not 0 <= rate < 1:
        raise ConfigError(f"drop_path={rate}: must be at least 0 and less than 1")


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch.

    Touvron et al. 2021, "Going deeper with Image Transformers", arXiv:2103.17239.

    Args:
        d_model: Channels.
        start: Initial value of all factors.
    """

    no_decay = ("gamma",)

    def __init__(self, d_model: int, start: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((d_model,), start))

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return x * self.gamma
