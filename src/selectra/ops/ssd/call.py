"""The arguments of `ssd`: checked, and brought to one form that every backend takes."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import checks
from selectra.ops.whole import require_whole


class SsdCall(NamedTuple):
    """One checked call. Steps, decays and the state have the compute type."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor | None
    sequence: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that may need a gradient."""
        return self[:6]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the results."""
        return self.dt.dtype


def prepare(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    *,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    sequence: Int[Tensor, "b l"] | None = None,
) -> SsdCall:
    """Run the recurrence of Mamba-2, with one decay a head.

    `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t'`, (p, n), and `y_t = h_t C_t`, (p,). Any length; memory grows with it.

    Sums and states are float32, or float64 where x is. Factors of products are what the backend says.

    Source: Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, Eq. 16 and Sec. 6 (the block decomposition).

    Args:
        x: Input of every head.
        dt: Step, positive.
        A: Decay, real and usually negative.
        B: Input projection; head i belongs to group i // (h / g).
        C: Output projection, as B.
        initial_state: State before the first position.
        sequence: Which packed sequence a position belongs to; the state is not handed on from one to another. The
            initial state belongs to the first.

    Returns:
        y and the final state, both in the compute type: float32, or float64 where x is.

    Raises:
        ConfigError: A shape does not fit.
        BackendError: The backend that was asked for refuses this call; the message is its reason.
    """
    require_whole("the scan of Mamba-2")
    if x.dim() != 4 or B.dim() != 4:
        raise ConfigError(
            f"x has shape {tuple(x.shape)} and B {tuple(B.shape)}; they must be (b, l, h, p), (b, l, g, n)."
        )
    batch, length, heads, p = x.shape
    groups, n = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ConfigError(f"B has {groups} groups; they must divide the {heads} heads.")
    checks.require_shape("dt", dt, (batch, length, heads), "(b, l, h)")
    checks.require_shape("A", A, (heads,), "(h,)")
    checks.require_shapes({"B": B, "C": C}, (batch, length, groups, n), "(b, l, g, n)")
    checks.require_shapes({"initial_state": initial_state}, (batch, heads, p, n), "(b, h, p, n)")
    checks.require_shapes({"sequence": sequence}, (batch, length), "(b, l)")
    dtype = checks.compute_dtype(x.dtype == torch.float64)
    state = None if initial_state is None else initial_state.to(dtype)
    return SsdCall(x, dt.to(dtype), A.to(dtype), B, C, state, sequence)
