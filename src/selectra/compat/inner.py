"""What follows Mamba's input projection, by the field's names: convolution, selection, scan, output projection.

The names come from mamba_ssm's `ops.selective_scan_interface` and its forks' (Vim's `mamba_inner_fn_no_out_proj` and
`bimamba_inner_fn`). Inputs are (b, 2d, l); nothing is transposed in memory on the way.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from selectra.compat.layout import as_wide_as, positions, refuse_complex, same_groups, swapped
from selectra.ops import causal_conv1d, selective_scan
from selectra.ops.selective_scan.call import SOFTPLUS_THRESHOLD


@dataclass(frozen=True)
class Selection:
    """What the scan takes, chosen from the convolution's output."""

    u: Float[Tensor, "b l d"]
    delta: Float[Tensor, "b l d"]
    B: Float[Tensor, "b l g n"]
    C: Float[Tensor, "b l g n"]


def convolved(
    x: Float[Tensor, "b l d"], weight: Float[Tensor, "d 1 k"], bias: Tensor | None, *, reverse: bool = False
) -> Float[Tensor, "b l d"]:
    """The short convolution with SiLU; `reverse` from the last position to the first."""
    y: Any = causal_conv1d(x, weight[:, 0], bias, "silu", reverse=reverse)
    return y


def select(
    u: Float[Tensor, "b l d"],
    x_proj: Float[Tensor, "r_2n d"],
    delta_proj: Float[Tensor, "d r"],
    n: int,
    B: Tensor | None = None,
    C: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    norms: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    eps: float = 1e-6,
) -> Selection:
    """Step, B and C at every position.

    Args:
        u: The convolution's output.
        x_proj: From it to the step's rank, B and C.
        delta_proj: From the rank to the step.
        n: State size.
        B: Used instead of a selected one, in the field's layout.
        C: Likewise.
        biases: Added to the selected B and C.
        norms: Weights of root mean square norms of B, C and the step.
        eps: Their epsilon.
    """
    batch, length, _ = u.shape
    rank = delta_proj.shape[1]
    low, B_here, C_here = F.linear(u, x_proj).split([rank, n, n], -1)
    delta = F.linear(low, delta_proj)
    if B is None:
        B_here = (B_here if biases[0] is None else B_here + biases[0].to(B_here.dtype)).unsqueeze(2)
    else:
        B_here = positions(B, batch, length)
    if C is None:
        C_here = (C_here if biases[1] is None else C_here + biases[1].to(C_here.dtype)).unsqueeze(2)
    else:
        C_here = positions(C, batch, length)
    B_here, C_here, delta = (_normed(x, w, eps) for x, w in zip((B_here, C_here, delta), norms, strict=True))
    return Selection(u, delta, *same_groups(B_here, C_here))


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def scanned(
    chosen: Selection,
    A: Float[Tensor, "d n"],
    D: Tensor | None,
    z: Float[Tensor, "b l d"] | None,
    delta_bias: Tensor | None,
    delta_softplus: bool = True,
    **flags: Any,
) -> Any:
    """The gated scan of a selection; `flags` are `selective_scan`'s."""
    u, delta, B, C = chosen.u, chosen.delta, chosen.B, chosen.C
    A, D, delta_bias = as_wide_as(u, A), as_wide_as(u, D), as_wide_as(u, delta_bias)
    if u.shape[1] == 1 and not flags.get("return_final_state"):
        return _single(chosen, A, D, z, delta_bias, delta_softplus)
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **flags)


def _single(
    chosen: Selection, A: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Float[Tensor, "b 1 d"]:
    """The scan of sequences of one position, as TimeMachine makes thousands of: B and C meet before the channels do.

    There is nothing to decay; A gets a gradient of 0, as by the scan.
    """
    u, delta, B, C = (x.to(A.dtype) for x in (chosen.u, chosen.delta, chosen.B, chosen.C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta, threshold=SOFTPLUS_THRESHOLD)
    met = (B * C).sum(-1).repeat_interleave(u.shape[2] // B.shape[2], 2) if B.shape[2] > 1 else (B * C).sum(-1)
    gain = delta * met
    y = u * (gain if D is None else gain + D) + 0 * A.sum()
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(chosen.u.dtype)


def _path(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    norms: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    eps: float = 1e-6,
) -> tuple[Selection, Tensor]:
    """The selection made of the first half of xz, and the gate that is its second."""
    refuse_complex(A=A, B=B, C=C)
    x, z = swapped(xz).chunk(2, -1)
    u = convolved(x, conv1d_weight, conv1d_bias)
    return select(u, x_proj_weight, delta_proj_weight, A.shape[1], B, C, biases, norms, eps), z


def mamba_inner_fn(
    xz: Float[Tensor, "b 2d l"],
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Float[Tensor, "b l e"]:
    """Everything after Mamba's input projection, as mamba_ssm's function of this name.

    `checkpoint_lvl` changes nothing here. Departure: the norms' weights get a gradient, and what lies before the norms
    gets the right one; theirs leaves both out.
    """
    norms = (b_rms_weight, c_rms_weight, dt_rms_weight)
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    chosen, z = _path(xz, *weights, A, B, C, (B_proj_bias, C_proj_bias), norms, b_c_dt_rms_eps)
    return F.linear(scanned(chosen, A, D, z, delta_bias, delta_softplus), out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Float[Tensor, "b 2d l"],
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Float[Tensor, "b l e"]:
    """As `mamba_inner_fn`, with the arguments of the package's reference."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias)
    return mamba_inner_fn(xz, *weights, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus)


def mamba_inner_fn_no_out_proj(
    xz: Float[Tensor, "b 2d l"],
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Float[Tensor, "b d l"]:
    """As `mamba_inner_fn` without the output projection, from the forks; (b, d, l)."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    chosen, z = _path(xz, *weights, A, B, C, (B_proj_bias, C_proj_bias))
    return swapped(scanned(chosen, A, D, z, delta_bias, delta_softplus))


def bimamba_inner_fn(
    xz: Float[Tensor, "b 2d l"],
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Float[Tensor, "b l e"]:
    """Vim's first two-directional form: one convolution and selection, scanned both ways with a decay for each."""
    refuse_complex(A_b=A_b)
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    chosen, z = _path(xz, *weights, A, B, C, (B_proj_bias, C_proj_bias))
    ahead = scanned(chosen, A, D, z, delta_bias, delta_softplus)
    back = scanned(chosen, A_b, D, z, delta_bias, delta_softplus, reverse=True)
    return F.linear(ahead + back, out_proj_weight, out_proj_bias)


bimamba_inner_ref = bimamba_inner_fn
