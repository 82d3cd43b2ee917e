"""The `cuda` backend of `cross_scan`: the kernels of `selective_scan`, whose groups of channels walk their own routes.

Tensors are read where they lie: u, delta, z, B and C of one type, a row of the grid as far from the next one as its
positions take; others are copied or turned into float32 first. Arithmetic and states are float32. A must be finite:
a call that finds it not to be has not-a-number in its results, and the next call raises.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selectra.ops import cuda
from selectra.ops.cross_scan.call import BACK, CrossCall
from selectra.ops.selective_scan import geometry
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.selective_scan.cuda import MOST_PLANS, Ends, addresses, launch
from selectra.ops.selective_scan.plans import (
    GRID_PLACES,
    TYPES,
    Grid,
    Plan,
    fits,
    plan_backward,
    plan_forward,
    strides_fit,
)

# Four bits of a word for each.
MOST_ROUTES = 16
SUM_THREADS, VECTOR_BYTES = 256, 16
_INPUTS = tuple(GRID_PLACES[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
_ENDS = Ends.of(GRID_PLACES)

# By what a plan depends on.
plans: dict[Any, Plan] = {}


def refuse(call: Any) -> str | None:
    """Why these kernels do not take `call`, or None."""
    u = call.u
    if not u.is_cuda:
        return f"tensors are on {u.device.type}, it needs cuda"
    if u.dtype not in TYPES:
        return f"it takes float32, bfloat16 and float16, not {u.dtype}"
    if call.A.shape[2] > geometry.MOST_STATES_AT_ONCE:
        return f"it takes up to {geometry.MOST_STATES_AT_ONCE} states, not {call.A.shape[2]}"
    if len(call.routes) > MOST_ROUTES:
        return f"it takes up to {MOST_ROUTES} routes, not {len(call.routes)}"
    return cuda.refusal(u.device.index)


def checkpoint_shape(call: CrossCall) -> tuple[int, int, int]:
    """The shape of the saved states, (checkpoints, k d, n)."""
    batch, height, width = call.u.shape[:3]
    k, d, n = call.A.shape
    return batch * -(-height * width // _interval(call)), k * d, n


def forward(call: CrossCall, save: bool) -> tuple[Tensor, Tensor | None]:
    """Run the scans.

    Args:
        save: Keep what `backward` needs in the second result.

    Returns:
        The outputs, added or side by side, and the checkpoints.
    """
    u, shape = call.u, call.delta.shape
    checkpoints = call.A.new_empty(checkpoint_shape(call)) if save else None
    if call.delta.numel() == 0:
        return u.new_empty(u.shape[:3] + u.shape[4:] if call.merge else shape), checkpoints
    scan, interval = _scan(call), _interval(call)
    y = scan.u.new_empty(scan.u.shape)
    plan = _plan(scan, y, call, interval, False, lambda: plan_forward(scan, y, interval, _grid(call)))
    words = _words(plan, scan)
    words[GRID_PLACES["y"]] = y.data_ptr()
    if checkpoints is not None:
        words[GRID_PLACES["checkpoints"]] = checkpoints.data_ptr()
    launch(plan, words, scan.A, ends=_ENDS)
    found = _sum_routes(y).view(u.shape[:3] + u.shape[4:]) if call.merge else y.view(shape)
    return found.to(u.dtype), checkpoints


def backward(call: CrossCall, dy: Tensor, checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias, in the shapes and types of these.

    Args:
        dy: Gradient of the output.
        checkpoints: As `forward` kept them.
    """
    if call.delta.numel() == 0:
        return tuple(None if x is None else x.new_zeros(x.shape) for x in call.tensors)
    if 0 in dy.stride():
        # As a sum's backward makes it: not worth a kernel of its own, which would read number by number.
        dy = dy.contiguous()
    scan, interval = _scan(call), _interval(call)
    dy = (dy.unsqueeze(3) if call.merge else dy).to(scan.u.dtype).flatten(1, 2).expand(scan.u.shape)
    if not strides_fit(dy):
        dy = dy.contiguous()
    (du, whole_u), (ddelta, whole_delta) = (_room_for(x, scan, call) for x in (call.u, call.delta))
    dz, whole_z = (None, None) if call.z is None else _room_for(call.z, scan, call)
    grid = _grid(call)
    plan = _plan(scan, dy, call, interval, True, lambda: plan_backward(scan, dy, du, ddelta, dz, interval, grid))
    # In the kernels' types and, since all of them lie in one piece, in the shapes of the inputs.
    dA, dB, dC = (x.new_empty(like.shape) for x, like in ((scan.A, call.A), (scan.B, call.B), (scan.C, call.C)))
    dD, dbias = (None if x is None else x.new_empty(x.shape) for x in (call.D, call.delta_bias))
    words = _words(plan, scan)
    words[GRID_PLACES["dy"]], words[GRID_PLACES["checkpoints"]] = dy.data_ptr(), checkpoints.data_ptr()
    launch(plan, words, scan.A, addresses((du, ddelta, dA, dB, dC, dD, dz, dbias)), _ENDS)
    du, ddelta = _as(call.u, du, whole_u), _as(call.delta, ddelta, whole_delta)
    if dz is not None and call.z is not None:
        dz = _as(call.z, dz, whole_z)
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias)
    return tuple(
        None if grad is None or x is None else _shaped(grad, x) for grad, x in zip(grads, call.tensors, strict=True)
    )


def _shaped(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in the shape and type of x; calls that change nothing take microseconds too."""
    if grad.shape != x.shape:
        grad = grad.view(x.shape)
    return grad if grad.dtype is x.dtype else grad.to(x.dtype)


def is_shared(x: Tensor, call: CrossCall) -> bool:
    """Whether several routes read the same numbers of u or z."""
    return x.shape[3] < len(call.routes)


def _flattens(x: Tensor) -> bool:
    """Whether (b, h, w, k, d) is (b, l, k, d) as it lies."""
    return x.shape[1] == 1 or x.shape[2] == 1 or x.stride(1) == x.shape[2] * x.stride(2)


def _room_for(x: Tensor, scan: ScanCall, call: CrossCall) -> tuple[Tensor, Tensor | None]:
    """Room for the gradient of u, delta or z, (b, l, k, d), and the same as the gradient itself where it can be that.

    It can where each route has its own, in a tensor that lies as x does and flattens.
    """
    if is_shared(x, call):
        return scan.u.new_empty(scan.u.shape), None
    like = torch.empty_like(x, dtype=scan.u.dtype)
    if _flattens(like):
        return like.flatten(1, 2), like
    return like.new_empty(like.shape).flatten(1, 2), None


def _as(x: Tensor, grad: Tensor, whole: Tensor | None) -> Tensor:
    """A gradient of all routes as that of x; it lies as x does unless it is a sum: compiled programs rely on it."""
    if whole is not None:
        return whole
    if x.shape[3] < grad.shape[2]:
        return _sum_routes(grad).view(x.shape)
    grad, like = grad.unflatten(1, x.shape[1:3]), torch.empty_like(x)
    same = all(a == b or size == 1 for a, b, size in zip(like.stride(), grad.stride(), x.shape, strict=True))
    return grad if same else like.copy_(grad)


def _interval(call: CrossCall) -> int:
    return geometry.interval(call.u.dtype.itemsize, call.A.shape[2], call.z is not None)


def _scan(call: CrossCall) -> ScanCall:
    """One scan of all routes: activations (b, l, k, d), B and C (b, l, k, n), parameters of k d channels."""
    batch, height, width, k, d = call.delta.shape

    def flat(x: Tensor) -> Tensor:
        return x.flatten(1, 2).expand(batch, height * width, k, d)

    D, bias = (None if x is None else x.reshape(-1) for x in (call.D, call.delta_bias))
    z = None if call.z is None else flat(call.z)
    tensors = (flat(call.u), flat(call.delta), call.A.flatten(0, 1), call.B.flatten(1, 2), call.C.flatten(1, 2))
    scan = ScanCall(*tensors, D, z, bias, None, None, None, call.delta_softplus, False, call.u.dtype, False)
    return scan if fits(scan) else _fitting(scan)


def _grid(call: CrossCall) -> Grid:
    """Words of the grid. Division by the height h: with 2^c >= h, s / h is s ceil(2^(31 + c) / h) / 2^(31 + c)."""
    height, width = call.u.shape[1:3]
    # Of a line both walks are the same, and a division by one would not fit.
    bits = BACK if height == 1 or width == 1 else ~0
    routes = sum((kind & bits) << 4 * i for i, kind in enumerate(call.routes))
    c = (height - 1).bit_length()
    return routes, width, -(-(1 << 31 + c) // height) & 0xFFFFFFFF, max(c - 1, 0)


def _plan(scan: ScanCall, y: Tensor, call: CrossCall, interval: int, back: bool, make: Callable[[], Plan]) -> Plan:
    """The plan of a call with the output or, `back`, its gradient."""
    given = (*scan[:8], y)
    key = (
        back,
        tuple(None if x is None else x.stride() for x in (call.u, call.delta, call.z)),
        call.u.shape,
        # Strides alone do not tell the number of states: A and B may be parts of wider tensors.
        scan.B.shape[3],
        tuple(call.routes),
        call.delta_softplus,
        interval,
        scan.u.get_device(),
        tuple(None if x is None else (x.dtype, x.stride(), x.data_ptr() & 15) for x in given),
    )
    try:
        return plans[key]
    except KeyError:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = make()
        return plans[key]


def _words(plan: Plan, scan: ScanCall) -> list[int]:
    words = plan.words.copy()
    for place, x in zip(_INPUTS, scan.tensors, strict=False):
        words[place] = 0 if x is None else x.data_ptr()
    return words


def _fitting(scan: ScanCall) -> ScanCall:
    """The same scan with tensors that the kernels can read."""
    dtype = scan.u.dtype
    names = ("u", "delta", "z", "B", "C")
    found = {name: x for name in names if (x := getattr(scan, name)) is not None}
    if any(x.dtype != dtype for x in found.values()):
        dtype = torch.float32
    changed = {name: x.to(dtype) if strides_fit(x) else x.to(dtype).contiguous() for name, x in found.items()}
    return scan._replace(**changed)


def _sum_routes(x: Tensor) -> Tensor:
    """(b, l, k, d), contiguous, to (b, l, 1, d)."""
    batch, length, k, d = x.shape
    if k == 1:
        return x
    total = x.new_empty((batch, length, 1, d))
    of_vector = VECTOR_BYTES // x.element_size()
    vectors = d % of_vector == 0 and (x.data_ptr() | total.data_ptr()) % VECTOR_BYTES == 0
    macros = (("TYPE", TYPES[x.dtype]), ("VECTORS", int(vectors)), ("ROUTES", k))
    kernel = cuda.kernel("cross_scan/sum_routes.cu", "sum_routes", macros, x.get_device())
    pieces = total.numel() // (of_vector if vectors else 1)
    words = [x.data_ptr(), total.data_ptr(), batch * length, d]
    kernel.launch((-(-pieces // SUM_THREADS), 1, 1), SUM_THREADS, words)
    return total
