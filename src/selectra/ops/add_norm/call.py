"""The arguments of `add_norm`: checked, and brought to one form that every backend takes."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import checks

KINDS = ("rms", "layer")


class NormCall(NamedTuple):
    """One checked call."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool
    """Whether the mean is taken off: a layer norm."""
    residual_dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that may need a gradient."""
        return self[:4]


def prepare(
    x: Float[Tensor, "*rows d"],
    residual: Float[Tensor, "*rows d"] | None = None,
    weight: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
    *,
    kind: Literal["rms", "layer"] = "rms",
    residual_dtype: torch.dtype | None = None,
) -> NormCall:
    """Add to the residual stream and normalise the sum over the last axis: `r = x + residual`, then `norm(r)`.

    With "rms" `r / sqrt(mean(r^2) + eps) * weight + bias`, with "layer" the mean is taken off first. The sum is rounded
    to `residual_dtype` before it is normalised. Arithmetic is float32, or float64 when every tensor is float64.

    Source: the fused step before every mixer of Mamba's Block, `layer_norm_fn(..., prenorm=True)` in `mamba_ssm`; Zhang
    and Sennrich 2019, arXiv:1910.07467, Eq. 4 (rms); Ba et al. 2016, arXiv:1607.06450, Eq. 4 (layer).

    Args:
        x: What is added, usually a mixer's output.
        residual: The stream so far; without one it starts with x.
        weight: Scale of each channel, 1 without.
        bias: Added to each channel.
        eps: Added to the mean of squares.
        kind: "rms" or "layer".
        residual_dtype: Type of the new stream; without one that of `residual`, or of x where there is none.

    Returns:
        The normalised sum in the type of x, and the new stream.

    Raises:
        ConfigError: An argument does not fit; the message says which, what it is and what is allowed.
        BackendError: The backend that was asked for refuses this call; the message is its reason.
    """
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ConfigError(f"x has shape {tuple(x.shape)}; it must be (..., d) with d at least 1.")
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; allowed are 'rms' and 'layer'.")
    checks.require_fitting({"x": x, "residual": residual, "weight": weight, "bias": bias})
    checks.require_shapes({"residual": residual}, tuple(x.shape), "the shape of x")
    checks.require_shapes({"weight": weight, "bias": bias}, (x.shape[-1],), "(d,)")
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    if residual_dtype not in checks.FLOATS or (residual_dtype == torch.float64) != (x.dtype == torch.float64):
        raise ConfigError(f"residual_dtype is {residual_dtype} and x is {x.dtype}; float64 goes with float64 alone.")
    return NormCall(x, residual, weight, bias, eps, kind == "layer", residual_dtype)
