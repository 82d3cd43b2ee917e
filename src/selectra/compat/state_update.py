"""`mamba_ssm.ops.triton.selective_state_update`: one step of the recurrence, over our scan."""

import torch
from torch import Tensor

from selectra.compat.layout import as_wide_as, refuse_complex
from selectra.errors import ConfigError
from selectra.ops import selective_scan


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """The next position's output; overwrites the state. With heads, (h, d) stands where d does.

    Args:
        state: (b, d, n).
        x: Input, (b, d).
        dt: Step, (b, d).
        A: Decay, (d, n).
        B: (b, n), or (b, g, n) with heads.
        C: As B.
        D: Weight of the skip connection, (d,).
        z: Gate, (b, d).
        dt_bias: Added to `dt`, (d,).
        dt_softplus: Whether softplus is applied to `dt`.
        state_batch_indices: The rows of a larger `state` that belong to x's rows.

    Returns:
        y, in x's shape and type.

    Raises:
        ConfigError: A, B or C is complex, or the groups do not divide the heads.
    """
    refuse_complex(A=A, B=B, C=C)
    rows = state if state_batch_indices is None else state[state_batch_indices.long()]
    heads = state.shape[1] if state.dim() > 3 else 1
    grouped = B if B.dim() == 3 else B.unsqueeze(1)
    if heads % grouped.shape[1]:
        raise ConfigError(f"B has {grouped.shape[1]} groups; they must divide the {heads} heads.")

    def row(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], 1, -1)

    def flat(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(-1)

    y, after = selective_scan(
        row(x),
        as_wide_as(x, row(dt)),
        as_wide_as(x, A.reshape(-1, A.shape[-1])),
        as_wide_as(x, grouped.unsqueeze(1)),
        as_wide_as(x, (C if C.dim() == 3 else C.unsqueeze(1)).unsqueeze(1)),
        as_wide_as(x, flat(D)),
        None if z is None else as_wide_as(x, row(z)),
        as_wide_as(x, flat(dt_bias)),
        dt_softplus,
        # A copy: the state is overwritten while a backward may still need it.
        initial_state=as_wide_as(x, rows.flatten(1, -2).clone()),
        return_final_state=True,
    )
    with torch.no_grad():
        after = after.reshape(rows.shape).to(state.dtype)
        if state_batch_indices is None:
            state.copy_(after)
        else:
            state[state_batch_indices.long()] = after
    return y.reshape(x.shape)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """As `selective_state_update`, with the arguments of the package's reference."""
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
