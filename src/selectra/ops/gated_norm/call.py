"""The arguments of `gated_norm`: checked, and brought to one form that every backend takes."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import checks


class GatedCall(NamedTuple):
    """One checked call."""

    y: Tensor
    z: Tensor
    weight: Tensor
    x: Tensor | None
    D: Tensor | None
    n_groups: int
    eps: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that may need a gradient."""
        return self[:5]


def prepare(
    y: Float[Tensor, "*rows d"],
    z: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"],
    x: Float[Tensor, "*rows d"] | None = None,
    D: Float[Tensor, " h"] | None = None,
    *,
    n_groups: int = 1,
    eps: float = 1e-5,
) -> GatedCall:
    """RMS norm, by groups of channels, of `(y + D x) silu(z)`, times `weight`: what follows the scan of Mamba-2.

    Arithmetic is float32, or float64 where y is.

    Source: Dao and Gu 2024, arXiv:2405.21060, Sec. 7.1 and Fig. 6; `RMSNormGated` of `mamba_ssm` with the gate first.

    Args:
        y: Output of the scan, in float32 or float64.
        z: Gate; the result has its type.
        weight: Scale of each channel.
        x: Input of the scan, for its skip; goes with D.
        D: Weight of the skip of each head; heads are neighbouring channels, as many each.
        n_groups: Groups of neighbouring channels that are normalised each by itself.
        eps: Added to the mean of squares.

    Raises:
        ConfigError: A shape does not fit, or one of x and D is missing.
        BackendError: The backend that was asked for refuses this call; the message is its reason.
    """
    if z.dim() < 1 or n_groups < 1 or z.shape[-1] < 1 or z.shape[-1] % n_groups:
        raise ConfigError(
            f"z has shape {tuple(z.shape)}; it must be (..., d) with d a multiple of n_groups={n_groups}."
        )
    if (x is None) != (D is None):
        raise ConfigError("x and D were not both given; the skip needs the scan's input and each head's weight.")
    d = z.shape[-1]
    checks.require_shapes({"y": y, "x": x}, tuple(z.shape), "the shape of z")
    checks.require_shape("weight", weight, (d,), "(d,)")
    if D is not None and (D.dim() != 1 or not len(D) or d % len(D)):
        raise ConfigError(f"D has shape {tuple(D.shape)}; it must be (h,), h a divisor of the {d} channels.")
    return GatedCall(y, z, weight, x, D, n_groups, eps)
