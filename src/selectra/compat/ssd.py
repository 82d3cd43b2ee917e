"""`mamba_ssm.ops.triton.ssd_combined`: Mamba-2's scan over our chunked form.

`chunk_size` changes nothing here: results do not depend on it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from selectra.compat.conv import causal_conv1d_fn
from selectra.compat.gated_norms import rmsnorm_fn
from selectra.compat.layout import at_least_float32, refuse_complex, swapped
from selectra.errors import ConfigError
from selectra.ops.ssd import ssd

NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    chunk_size: int,
    D: Tensor | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    dt_bias: Float[Tensor, " h"] | None = None,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Mamba-2's scan with its step's bias, softplus and limits, skip (D, (h,) or (h, p)) and gate.

    Returns:
        y (b, l, h, p) in x's type, and the final states in the compute type where asked for.

    Raises:
        ConfigError: A is complex, or the states of packed sequences are asked for.
    """
    refuse_complex(A=A)
    if return_varlen_states:
        raise ConfigError("selectra.compat does not make the states of packed sequences (return_varlen_states).")
    step = at_least_float32(dt)
    if dt_bias is not None:
        step = step + dt_bias.to(step.dtype)
    if dt_softplus:
        step = F.softplus(step)
    if tuple(dt_limit) != NO_LIMIT:
        step = step.clamp(*dt_limit)
    y, state = ssd(x, step, A, B, C, initial_state=initial_states, sequence=seq_idx)
    if D is not None:
        D = D.to(y.dtype)
        y = y + x.to(y.dtype) * (D if D.dim() == 2 else D[:, None])
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(x.dtype)
    return (y, state if state_dtype is None else state.to(state_dtype)) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Float[Tensor, "b l e"],
    conv1d_weight: Float[Tensor, "c k"],
    conv1d_bias: Float[Tensor, " c"] | None,
    dt_bias: Float[Tensor, " h"],
    A: Float[Tensor, " h"],
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Everything after Mamba-2's input projection: split, convolution, scan, gated normalisation, output projection.

    Returns:
        y (b, l, d), or what the output projection makes of it, and the final states where asked for.

    Raises:
        ConfigError: `headdim` is missing beside a D of (h,).
    """
    if D.dim() == 1 and headdim is None:
        raise ConfigError("D has one number a head; headdim must be given with it.")
    heads, width = (D.shape[0], headdim) if D.dim() == 1 else D.shape
    assert width is not None
    d_ssm = heads * width
    n = (conv1d_weight.shape[0] - d_ssm) // (2 * ngroups)
    d_mlp = (zxbcdt.shape[-1] - 2 * d_ssm - 2 * ngroups * n - heads) // 2
    z0, x0, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, d_ssm, d_ssm + 2 * ngroups * n, heads], -1)
    found: Any = causal_conv1d_fn(swapped(xBC), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = swapped(found).split([d_ssm, ngroups * n, ngroups * n], -1)
    gate = z.unflatten(-1, (heads, width)) if rmsnorm_weight is None else None
    y, state = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, width)),
        dt,
        A,
        B.unflatten(-1, (ngroups, n)),
        C.unflatten(-1, (ngroups, n)),
        chunk_size,
        D,
        gate,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, d_ssm // ngroups, norm_before_gate)
    if d_mlp > 0:
        y = torch.cat([F.silu(z0) * x0, y], -1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, state) if return_final_states else y
