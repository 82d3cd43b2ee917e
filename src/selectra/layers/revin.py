"""Normalisation of each window of a series by its own statistics, and its inverse for the forecast."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.missing import is_complete

WindowNorm = Literal["none", "last", "mean", "instance", "revin"]
"""What is removed from each window: nothing; its last observed value; its mean; its mean and standard deviation; both,
with a learned gain and bias for each series after it (RevIN)."""


class Statistics(NamedTuple):
    """What was removed from a window, per batch element and series."""

    shift: Float[Tensor, "b 1 s"]
    scale: Float[Tensor, "b 1 s"]


class RevIN(nn.Module):
    """Reversible instance normalisation (Kim et al. 2022, ICLR) whose statistics see observed values alone.

    Statistics carry no gradient, as in the official code, unless asked to. Unobserved positions come out as 0: the
    window's mean, or its last value. A series with nothing observed in the window has shift 0 and scale 1.

    Args:
        n_series: Number of series; used with a gain and a bias.
        mode: What is removed from each window.
        affine: Learn a gain and a bias for each series in any mode; "revin" is "instance" with them.
        eps: Added to the variance.
        scale_gradient: Let the gradient pass through the standard deviation, as the normalisation that Non-stationary
            Transformers, iTransformer and S-Mamba write out does; only an input that needs a gradient can tell.
    """

    def __init__(
        self,
        n_series: int,
        mode: WindowNorm = "instance",
        *,
        affine: bool = False,
        eps: float = 1e-5,
        scale_gradient: bool = False,
    ) -> None:
        super().__init__()
        if mode not in get_args(WindowNorm):
            raise ConfigError(f"window_norm={mode!r}: takes {', '.join(map(repr, get_args(WindowNorm)))}")
        affine = affine or mode == "revin"
        self.mode, self.eps, self.scale_gradient = "instance" if mode == "revin" else mode, eps, scale_gradient
        self.weight = nn.Parameter(torch.ones(n_series)) if affine else None
        self.bias = nn.Parameter(torch.zeros(n_series)) if affine else None

    def forward(
        self, x: Float[Tensor, "b l s"], observed: Bool[Tensor, "b l s"] | None = None
    ) -> tuple[Float[Tensor, "b l s"], Statistics]:
        """The normalised window and what `inverse` needs."""
        complete = is_complete(observed)
        if observed is not None and not complete:
            x = x.masked_fill(~observed, 0)
        shift, scale = self._statistics(x if self.scale_gradient else x.detach(), observed)
        statistics = Statistics(shift.detach(), scale)
        x = (x - statistics.shift) / statistics.scale
        if self.weight is not None and self.bias is not None:
            x = x * self.weight + self.bias
        return (x if observed is None or complete else x.masked_fill(~observed, 0)), statistics

    def inverse(self, y: Float[Tensor, "b h s *q"], statistics: Statistics) -> Float[Tensor, "b h s *q"]:
        """A forecast, or its quantiles, in the window's own units."""
        shift, scale = statistics
        weight, bias = self.weight, self.bias
        if y.dim() == 4:
            shift, scale = shift[..., None], scale[..., None]
            weight, bias = (None if p is None else p[:, None] for p in (weight, bias))
        if weight is not None and bias is not None:
            # The official code's guard against a gain of zero.
            y = (y - bias) / (weight + self.eps**2)
        return y * scale + shift

    def _statistics(self, x: Tensor, observed: Tensor | None) -> Statistics:
        """Of a window whose unobserved values are 0."""
        zero, one = torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])
        if self.mode == "none" or x.shape[1] == 0:
            return Statistics(zero, one)
        if self.mode == "last":
            return Statistics(
                x[:, -1:] if observed is None or is_complete(observed) else _last_observed(x, observed), one
            )
        if observed is None:
            variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
            return Statistics(mean, one if self.mode == "mean" else (variance + self.eps).sqrt())
        count = observed.sum(1, keepdim=True)
        mean = x.sum(1, keepdim=True) / count.clamp(min=1)
        if self.mode == "mean":
            return Statistics(mean, one)
        variance = (x - mean).masked_fill(~observed, 0).square().sum(1, keepdim=True) / count.clamp(min=1)
        return Statistics(mean, torch.where(count > 0, (variance + self.eps).sqrt(), one))


def _last_observed(x: Tensor, observed: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1], device=x.device)[:, None]
    last = torch.where(observed, positions, 0).amax(1, keepdim=True)  # (b, 1, s)
    return x.gather(1, last)
