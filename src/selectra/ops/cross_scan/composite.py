"""The cross-scan as one selective scan a route: the backends of plain PyTorch, and what the kernels are held to.

Rows need nothing but the scan's `reverse`; walks by columns go through a copy of their tensors, columns first.
"""

import torch
from torch import Tensor

from selectra.ops import checks
from selectra.ops.cross_scan.call import BACK, DOWN, CrossCall
from selectra.ops.dispatch import say_slow_path
from selectra.ops.selective_scan import selective_scan
from selectra.ops.selective_scan.call import ScanCall


def refuse(call: CrossCall) -> None:
    """Plain PyTorch takes every call."""


def run(call: CrossCall, backend: str) -> Tensor:
    """The outputs, added or side by side."""
    if backend == "portable" and not torch.compiler.is_compiling():
        say_slow_path("cross_scan", backend, call, call.u.device.type)
    wide = checks.compute_dtype(call.u.dtype == torch.float64)
    # Sums are rounded once.
    out_dtype = wide if call.merge else call.u.dtype
    scan = selective_scan.backends[backend].run
    ys = [_put_back(scan(_along(call, i, out_dtype)), call, i) for i in range(len(call.routes))]
    if not call.merge:
        return torch.stack(ys, 3)
    total = ys[0]
    for y in ys[1:]:
        total = total + y
    return total.to(call.u.dtype)


def _along(call: CrossCall, i: int, out_dtype: torch.dtype) -> ScanCall:
    """The scan of route i."""
    down = bool(call.routes[i] & DOWN)

    def walked(x: Tensor) -> Tensor:
        own = x[:, :, :, min(i, x.shape[3] - 1)]
        return (own.transpose(1, 2) if down else own).flatten(1, 2)

    return ScanCall(
        walked(call.u),
        walked(call.delta),
        call.A[i],
        walked(call.B).unsqueeze(2),
        walked(call.C).unsqueeze(2),
        None if call.D is None else call.D[i],
        None if call.z is None else walked(call.z),
        None if call.delta_bias is None else call.delta_bias[i],
        None,
        None,
        None,
        call.delta_softplus,
        bool(call.routes[i] & BACK),
        out_dtype,
        False,
    )


def _put_back(y: Tensor, call: CrossCall, i: int) -> Tensor:
    """(b, l, d) of route i as (b, h, w, d)."""
    height, width = call.u.shape[1:3]
    if call.routes[i] & DOWN:
        return y.unflatten(1, (width, height)).transpose(1, 2)
    return y.unflatten(1, (height, width))
