"""`fwd` and `bwd` of the field's compiled scan modules, by their own signatures, over our operator.

`selective_scan_cuda` (mamba_ssm), and VMamba's `selective_scan_cuda_core`, `_oflex`, `_nrow` and `_ndstate`. Layouts
are theirs: u, delta, z, dout (b, d, l); B and C (d, n), (b, n, l) or (b, g, n, l). Results lie in memory as our kernels
write them, so that their last axis need not be the dense one.

Departure: of the states `x` (b, d, chunks, 2n) only what callers read is filled in, the last state at
`x[:, :, -1, 1::2]`; the rest is 0. What our backward needs of the forward travels on the same tensor object, and is
made once more where a caller hands back another one.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from selectra.compat.layout import back_to, swapped
from selectra.compat.scan import arguments
from selectra.ops import selective_scan
from selectra.ops.selective_scan.call import ScanCall, prepare
from selectra.ops.selective_scan.reference import run as run_reference
from selectra.ops.selective_scan.registration import KERNELS

POSITIONS_OF_CHUNK = 2048
_KEPT = "_selectra_checkpoints"
_N_TENSORS, _N_GRADIENTS = 11, 8

Results = list[Tensor | None]


def fwd(u, delta, A, B, C, D_, z_, delta_bias_, delta_softplus):
    """`selective_scan_cuda.fwd`: [out, x], and the gated out where there is a gate."""
    out, x = _forward(u, delta, A, B, C, D_, delta_bias_, delta_softplus)
    return [out, x] if z_ is None else [out, x, _gated(out, z_)]


def bwd(u, delta, A, B, C, D_, z_, delta_bias_, dout, x_, out_, dz_, delta_softplus, recompute_out_z):
    """`selective_scan_cuda.bwd`: [du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz, then the gated out if asked."""
    if z_ is None:
        return _backward(u, delta, A, B, C, D_, delta_bias_, dout, x_, delta_softplus)
    z = z_.to(torch.promote_types(z_.dtype, torch.float32))
    s = torch.sigmoid(z)
    dz = (dout * out_ * s * (1 + z * (1 - s))).to(z_.dtype)
    if dz_ is not None:
        dz = dz_.copy_(dz)
    dout = (dout * (z * s)).to(u.dtype)
    grads = [*_backward(u, delta, A, B, C, D_, delta_bias_, dout, x_, delta_softplus), dz]
    return [*grads, _gated(out_, z_)] if recompute_out_z else grads


def core_fwd(u, delta, A, B, C, D_, delta_bias_, delta_softplus, nrows):
    """`selective_scan_cuda_core.fwd` and `selective_scan_cuda_nrow.fwd`: [out, x]; `nrows` changes nothing here."""
    return [*_forward(u, delta, A, B, C, D_, delta_bias_, delta_softplus)]


def core_bwd(u, delta, A, B, C, D_, delta_bias_, dout, x_, delta_softplus, nrows):
    """Their `bwd`: [du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    return _backward(u, delta, A, B, C, D_, delta_bias_, dout, x_, delta_softplus)


def oflex_fwd(u, delta, A, B, C, D_, delta_bias_, delta_softplus, nrows, out_float):
    """`selective_scan_cuda_oflex.fwd`: [out, x], out in float32 where `out_float`; delta may have d / r channels."""
    delta, bias = _each_channel(u, delta, delta_bias_)
    out_dtype = torch.promote_types(u.dtype, torch.float32) if out_float else None
    return [*_forward(u, delta, A, B, C, D_, bias, delta_softplus, out_dtype)]


def oflex_bwd(u, delta, A, B, C, D_, delta_bias_, dout, x_, delta_softplus, nrows):
    """`selective_scan_cuda_oflex.bwd`: as core's; dout may be float32."""
    channels = delta.shape[1]
    delta, bias = _each_channel(u, delta, delta_bias_)
    grads = _backward(u, delta, A, B, C, D_, bias, dout, x_, delta_softplus)
    if channels != u.shape[1]:
        ddelta, dbias = grads[1], grads[6]
        assert ddelta is not None
        grads[1] = ddelta.unflatten(1, (channels, -1)).sum(2)
        grads[6] = None if dbias is None else dbias.unflatten(0, (channels, -1)).sum(1)
    return grads


def ndstate_fwd(u, delta, A, B, C, D_, delta_bias_, delta_softplus, nrows):
    """`selective_scan_cuda_ndstate.fwd`: one state, without its axis: A (d,), B and C (b, g, l)."""
    return [*_forward(u, delta, A[:, None], B[:, :, None], C[:, :, None], D_, delta_bias_, delta_softplus)]


def ndstate_bwd(u, delta, A, B, C, D_, delta_bias_, dout, x_, delta_softplus, nrows):
    """Its `bwd`, gradients of A, B and C without the states' axis."""
    taken = (u, delta, A[:, None], B[:, :, None], C[:, :, None], D_, delta_bias_)
    du, ddelta, dA, dB, dC, *rest = _backward(*taken, dout, x_, delta_softplus)
    assert dA is not None and dB is not None and dC is not None
    return [du, ddelta, dA.squeeze(1), dB.squeeze(2), dC.squeeze(2), *rest]


def _gated(out: Float[Tensor, "b d l"], z: Float[Tensor, "b d l"]) -> Float[Tensor, "b d l"]:
    return (out * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))).to(z.dtype)


def _each_channel(u: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    repeats = u.shape[1] // delta.shape[1]
    if repeats == 1:
        return delta, bias
    return delta.repeat_interleave(repeats, 1), None if bias is None else bias.repeat_interleave(repeats)


def _call(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any, softplus: Any, out_dtype: Any) -> ScanCall:
    taken = arguments(u, delta, A, B, C, D, None, bias)
    return prepare(*taken, delta_softplus=bool(softplus), return_final_state=True, out_dtype=out_dtype)


@torch.no_grad()
def _forward(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any, softplus: Any, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    call = _call(u, delta, A, B, C, D, bias, softplus, out_dtype)
    backend = selective_scan.choose(call).name
    if backend in KERNELS:
        out, state, checkpoints = torch.ops.selectra.selective_scan(*call[:-1], backend, True)
    else:
        out, state = run_reference(call)
        checkpoints = None
    batch, length, d = call.u.shape
    x = state.new_zeros(batch, d, -(-length // POSITIONS_OF_CHUNK), 2 * A.shape[1])
    x[:, :, -1, 1::2] = state
    setattr(x, _KEPT, (backend, checkpoints))
    return swapped(out), x


def _backward(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any, dout: Tensor, x: Tensor | None, softplus: Any
) -> Results:
    call = _call(u, delta, A, B, C, D, bias, softplus, dout.dtype)
    backend, checkpoints = getattr(x, _KEPT, (None, None))
    if backend is None:
        backend = selective_scan.choose(call).name
    if backend in KERNELS:
        dfinal = call.A.new_zeros(u.shape[0], *A.shape)
        if checkpoints is None:
            # Of no length: the operator makes them anew.
            checkpoints = call.A.new_empty(0)
        with torch.no_grad():
            found = torch.ops.selectra.selective_scan_backward(
                swapped(dout), dfinal, checkpoints, *call[:_N_TENSORS], *call[_N_TENSORS:-1], backend
            )
    else:
        found = _reference_gradients(call, swapped(dout))
    gradients: Any = found[:_N_GRADIENTS]
    du, ddelta, dA, dB, dC, dD, _, dbias = gradients
    return [
        swapped(du),
        swapped(ddelta),
        dA.to(A.dtype),
        back_to(B, dB).to(B.dtype),
        back_to(C, dC).to(C.dtype),
        None if D is None else dD.to(D.dtype),
        None if bias is None else dbias.to(bias.dtype),
    ]


def _reference_gradients(call: ScanCall, dy: Tensor) -> list[Tensor | None]:
    """By autograd, for the backend that has no backward of its own."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in call.tensors]
        y, _ = run_reference(ScanCall._make((*leaves, *call[len(leaves) :])))
        asked = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(y, asked, dy.to(y.dtype)))
    return [None if x is None else next(grads) for x in leaves]
