"""The `cpu` backend of `cross_scan`: the compiled kernels of `selective_scan`, whose steps walk through the grid.

Every tensor is read where it lies, through its strides, bfloat16 too; nothing is copied, flipped or transposed (float16
is turned into float32 first). What routes share is added up while it is written, in the order of the routes: the
outputs and the gradients of a u and a z that all of them read. Arithmetic, states and sums are float32, or float64
where `u` is float64.
"""

import torch
from torch import Tensor

from selectra.ops.cross_scan.call import BACK, DOWN, CrossCall
from selectra.ops.native.library import ABSENT, HALVED, WHOLE, is_readable, library, operand, readable, threads
from selectra.ops.selective_scan import cpu as scan
from selectra.ops.selective_scan.cpu import compute_dtype

refuse = scan.refuse


def checkpoint_shape(call: CrossCall) -> tuple[int, ...]:
    """The shape of the saved states: for each route the state before every chunk."""
    batch, height, width = call.u.shape[:3]
    k, d, n = call.A.shape
    found, dtype = library(), compute_dtype(call.u)
    lanes = found.lanes(dtype)
    return k, batch * -(-height * width // found.chunk) * -(-d // lanes) * lanes * n


def forward(call: CrossCall, save: bool) -> tuple[Tensor, Tensor | None]:
    """Run the scans.

    Args:
        save: Keep what `backward` needs in the second result.

    Returns:
        The outputs, added or side by side, and the checkpoints.
    """
    u, dtype = call.u, compute_dtype(call.u)
    room = library().room
    checkpoints = room(checkpoint_shape(call), dtype) if save else None
    shape = u.shape[:3] + u.shape[4:] if call.merge else call.delta.shape
    y = room(shape, _written(u.dtype, dtype))
    if call.delta.numel():
        call = _readable(call, dtype)
        total = _Sum(y.unsqueeze(3) if call.merge else y, len(call.routes), dtype)
        words = [len(call.routes)]
        for i in range(len(call.routes)):
            words += _route(call, i, checkpoints, *total.words(i))
        library().call("cross_forward", dtype, words)
    return y.to(u.dtype), checkpoints


def backward(call: CrossCall, dy: Tensor, checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias, in the shapes and types of these.

    Args:
        dy: Gradient of the output.
        checkpoints: As `forward` kept them.
    """
    if not call.delta.numel():
        return tuple(None if x is None else torch.zeros_like(x) for x in call.tensors)
    given, dtype, count = call, compute_dtype(call.u), len(call.routes)
    call, dy = _readable(call, dtype), readable(dy, dtype)
    du, ddelta = (_room_like(x, _written(x.dtype, dtype)) for x in (given.u, given.delta))
    dz = None if given.z is None else _room_like(given.z, _written(given.z.dtype, dtype))
    dB, dC = (x.new_empty(x.shape, dtype=_written(x.dtype, dtype)) for x in (given.B, given.C))
    dA, dD, dbias = (
        None if x is None else x.new_empty(x.shape, dtype=dtype) for x in (call.A, call.D, call.delta_bias)
    )
    dy = dy.unsqueeze(3) if call.merge else dy
    total_u, total_z = _Sum(du, count, dtype), None if dz is None else _Sum(dz, count, dtype)
    words = [count]
    for i in range(count):
        words += _route(call, i, checkpoints, ABSENT, ABSENT)
        du_words, du_onto = total_u.words(i)
        dz_words, dz_onto = (ABSENT, ABSENT) if total_z is None else total_z.words(i)
        words += (*_activation(dy, i), *ABSENT, *du_words, *_activation(ddelta, i), *_parameter(dA, i))
        words += (*_projection(dB, i), *_projection(dC, i), *_parameter(dD, i), *dz_words, *_parameter(dbias, i))
        words += (*ABSENT, *du_onto, *dz_onto)
    library().call("cross_backward", dtype, words)
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias)
    return tuple(
        None if grad is None or x is None else grad.to(x.dtype) for grad, x in zip(grads, given.tensors, strict=True)
    )


def _readable(call: CrossCall, dtype: torch.dtype) -> CrossCall:
    """The call with tensors as the kernels read them: the same ones, but for float16."""
    u, delta, B, C = (readable(x, dtype) for x in (call.u, call.delta, call.B, call.C))
    z = None if call.z is None else readable(call.z, dtype)
    A, D, bias = (None if x is None else x.to(dtype) for x in (call.A, call.D, call.delta_bias))
    assert A is not None
    return call._replace(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=bias)


def _room_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a result that lies in memory as x does."""
    return library().in_large_pages(torch.empty_like(x, dtype=dtype))


def _written(wanted: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    return wanted if is_readable(wanted, dtype) else dtype


class _Sum:
    """Where each route's part of a result goes, and what it is added to.

    A result of all routes is rounded once: sums before the last one are kept in the type of the arithmetic.

    Args:
        result: (b, h, w, 1 or k, d).
        count: Routes.
        dtype: Type of the arithmetic.
    """

    def __init__(self, result: Tensor, count: int, dtype: torch.dtype) -> None:
        self.result, self.count = result, count
        self.is_shared = result.shape[3] < count
        # Kept as long as this object, which must outlive the call of the kernels.
        narrow = self.is_shared and result.dtype != dtype
        self.partial = _room_like(result, dtype) if narrow else result

    def words(self, i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The words of both for route i."""
        onto = _activation(self.partial, 0) if self.is_shared and i else ABSENT
        return _activation(self.result if i == self.count - 1 else self.partial, i), onto


def _route(
    call: CrossCall, i: int, checkpoints: Tensor | None, y: tuple[int, ...], onto: tuple[int, ...]
) -> tuple[int, ...]:
    """The words of `ScanCall` in call.h for route i."""
    batch, height, width, _, d = call.delta.shape
    kind = call.routes[i]
    # Of a line both walks are the same, and its tensors may be read faster.
    line = height == 1 or width == 1
    return (
        *(batch, height * width, d, call.A.shape[2], 1, int(call.delta_softplus), int(bool(kind & BACK)), threads()),
        *(0, height * width if line else width, int(bool(kind & DOWN) and not line)),
        *_activation(call.u, i),
        *_activation(call.delta, i),
        *_parameter(call.A, i),
        *_projection(call.B, i),
        *_projection(call.C, i),
        *_parameter(call.D, i),
        *(ABSENT if call.z is None else _activation(call.z, i)),
        *_parameter(call.delta_bias, i),
        # No initial state, mask, borders and final state.
        *ABSENT * 4,
        *_parameter(checkpoints, i),
        *y,
        *onto,
    )


def _steps(x: Tensor) -> tuple[int, int]:
    """Of (b, h, w, ...) the elements from one position to the next, and from a row's end to the next one beyond it."""
    _, height, width = x.shape[:3]
    _, down, right = x.stride()[:3]
    if width == 1:
        return down, 0
    return right, 0 if height == 1 else down - width * right


def _words(x: Tensor, i: int, strides: tuple[int, int, int], jump: int) -> tuple[int, ...]:
    own = i if x.shape[3] > 1 else 0
    address = x.data_ptr() + own * x.stride(3) * x.element_size()
    return (address, x.stride(0), *strides, HALVED if x.dtype == torch.bfloat16 else WHOLE, jump)


def _activation(x: Tensor, i: int) -> tuple[int, ...]:
    """The words of route i of (b, h, w, 1 or k, d), as the kernels' (b, l, d)."""
    step, jump = _steps(x)
    return _words(x, i, (step, x.stride(4), 0), jump)


def _projection(x: Tensor, i: int) -> tuple[int, ...]:
    """The words of route i of (b, h, w, k, n), as the kernels' (b, l, 1, n)."""
    step, jump = _steps(x)
    return _words(x, i, (step, 0, x.stride(4)), jump)


def _parameter(x: Tensor | None, i: int) -> tuple[int, ...]:
    """The words of route i of a tensor (k, ...)."""
    return ABSENT if x is None else operand(x[i])
