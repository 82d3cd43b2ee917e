"""The cross-scan of lines by the CUDA kernels, for one node of autograd that has made all tensors itself.

As `cross_scan`, without what a call from outside needs: the tensors of each route lie in one piece, a plane, fresh from
the allocator, so that sizes alone decide which kernels run. Nothing is viewed, copied or looked at twice on the way.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selectra.ops.cross_scan import cuda
from selectra.ops.cross_scan.call import CrossCall
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.selective_scan.cuda import MOST_PLANS, Ends, launch
from selectra.ops.selective_scan.plans import FLOAT_BYTES, GRID_PLACES, Plan, plan_backward, plan_forward

_INPUTS = tuple(GRID_PLACES[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
_Y, _DY, _CHECKPOINTS = (GRID_PLACES[name] for name in ("y", "dy", "checkpoints"))
_ENDS = Ends.of(GRID_PLACES)


class Line(NamedTuple):
    """One call of k routes; parameters are float32, everything else has one type and begins on 16 bytes."""

    u: Float[Tensor, "k b l d"]
    delta: Float[Tensor, "k b l d"]
    projected: Float[Tensor, "k rows r_2n"]
    """The step's low rank, B and C of the b l positions."""
    A: Float[Tensor, "k d n"]
    D: Float[Tensor, "k d"]
    z: Float[Tensor, "b l d"]
    """The second half of a (b, l, 2 d)."""
    delta_bias: Float[Tensor, "k d"]
    routes: tuple[int, ...]


class _Plans(NamedTuple):
    forward: Plan
    backward: Plan
    checkpoints: tuple[int, int, int]
    B: int
    """Bytes from the start of `projected`."""
    C: int


# By sizes, types, routes and device.
plans: dict[Any, _Plans] = {}


def forward(line: Line, save: bool) -> tuple[Float[Tensor, "k b l d"], Tensor | None]:
    """The outputs of all routes, and what `backward` needs where it is asked for."""
    found = _plans(line)
    plan, y = found.forward, torch.empty_like(line.u)
    words = _words(plan, line, found)
    words[_Y] = y.data_ptr()
    checkpoints = line.A.new_empty(found.checkpoints) if save else None
    if checkpoints is not None:
        words[_CHECKPOINTS] = checkpoints.data_ptr()
    launch(plan, words, line.A, ends=_ENDS)
    return y, checkpoints


class Gradients(NamedTuple):
    """Of a `Line`'s tensors; those of the parameters are views of one tensor, `parameters`."""

    u: Float[Tensor, "k b l d"]
    delta: Float[Tensor, "k b l d"]
    BC: Float[Tensor, "2 rows k n"]
    parameters: Float[Tensor, " k_d_n_2"]
    """Of A, then of D, then of the bias."""


def backward(line: Line, dy: Float[Tensor, "b l d"], checkpoints: Tensor, dz: Float[Tensor, "k b l d"]) -> Gradients:
    """The gradients.

    Args:
        dy: Gradient of the sum of all outputs, contiguous.
        checkpoints: As `forward` kept them.
        dz: Written to: the gate's gradient of each route; the second half of a (k, 2, b, l, d).
    """
    found = _plans(line)
    plan = found.backward
    du, ddelta = torch.empty_like(line.u), torch.empty_like(line.u)
    (k, d, n), rows = line.A.shape, line.projected.shape[1]
    dBC, parameters = du.new_empty((2, rows, k, n)), line.A.new_empty(k * d * (n + 2))
    words = _words(plan, line, found)
    words[_DY], words[_CHECKPOINTS] = dy.data_ptr(), checkpoints.data_ptr()
    dB, dA = dBC.data_ptr(), parameters.data_ptr()
    dC, dD = dB + dBC.element_size() * rows * k * n, dA + FLOAT_BYTES * k * d * n
    addresses = (du.data_ptr(), ddelta.data_ptr(), dA, dB, dC, dD, dz.data_ptr(), dD + FLOAT_BYTES * k * d)
    launch(plan, words, line.A, addresses, _ENDS)
    return Gradients(du, ddelta, dBC, parameters)


def _words(plan: Plan, line: Line, found: _Plans) -> list[int]:
    words, projected = plan.words.copy(), line.projected.data_ptr()
    pointers = (
        line.u.data_ptr(),
        line.delta.data_ptr(),
        line.A.data_ptr(),
        projected + found.B,
        projected + found.C,
        line.D.data_ptr(),
        line.z.data_ptr(),
        line.delta_bias.data_ptr(),
    )
    for place, pointer in zip(_INPUTS, pointers, strict=True):
        words[place] = pointer
    return words


def _plans(line: Line) -> _Plans:
    u = line.u
    key = (u.shape, u.dtype, u.get_device(), line.A.shape, line.projected.shape, line.routes)
    found = plans.get(key)
    if found is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        found = plans[key] = _planned(line)
    return found


def _planned(line: Line) -> _Plans:
    """The plans of a forward and a backward call, made with tensors that lie as theirs will."""
    call, rank = _call(line), line.projected.shape[2] - 2 * line.A.shape[2]
    scan: ScanCall = cuda._scan(call)
    interval, grid = cuda._interval(call), cuda._grid(call)
    y, du, ddelta = (_positions_first(torch.empty_like(line.u)) for _ in range(3))
    dz = _positions_first(line.u.new_empty((len(line.routes), 2, *line.z.shape))[:, 1])
    dy = line.z.new_empty(line.z.shape).unsqueeze(2).expand(scan.u.shape)
    size = line.projected.element_size()
    return _Plans(
        plan_forward(scan, y, interval, grid),
        plan_backward(scan, dy, du, ddelta, dz, interval, grid),
        cuda.checkpoint_shape(call),
        size * rank,
        size * (rank + line.A.shape[2]),
    )


def _positions_first(planes: Float[Tensor, "k b l d"]) -> Float[Tensor, "b l k d"]:
    return planes.permute(1, 2, 0, 3)


def _call(line: Line) -> CrossCall:
    """As one of `cross_scan`."""
    k, (batch, length, _), n = len(line.routes), line.z.shape, line.A.shape[2]
    planes = line.projected.view(k, batch, length, -1)
    selected = (planes[..., -2 * n : -n], planes[..., -n:])
    u, delta, B, C = (_positions_first(x).unsqueeze(1) for x in (line.u, line.delta, *selected))
    z = line.z.unsqueeze(1).unsqueeze(3)
    return CrossCall(u, delta, line.A, B, C, line.D, z, line.delta_bias, True, line.routes, True)
