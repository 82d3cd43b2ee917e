"""The `cuda` backend of `selective_scan`: kernels compiled for the call's sizes at its first use.

Tensors are read through their strides, without copies, where u, delta, z, B and C share one type; where they do not,
they are turned into float32 first. Arithmetic and states are float32. A must be finite: a call that finds it not to be
has not-a-number in its results, and the next call raises.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectra.errors import BackendError
from selectra.ops import cuda
from selectra.ops.selective_scan import geometry, parts, short
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.selective_scan.passes import Slice
from selectra.ops.selective_scan.plans import (
    PLACES,
    TYPES,
    Places,
    Plan,
    fits,
    is_short,
    plan_backward,
    plan_forward,
    strides_fit,
)

MOST_STATES = 256
# Kinds of calls whose plans are kept.
MOST_PLANS = 1024
# Where the addresses of ScanCall's tensors go: u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens.
INPUT_PLACES = tuple(PLACES[name] for name in ScanCall._fields[:11])
_Y, _FINAL, _CHECKPOINTS = (PLACES[name] for name in ("y", "final_state", "checkpoints"))
_DY, _DFINAL = PLACES["dy"], PLACES["dfinal"]
GRADIENTS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial")

ACTIVATIONS = ("u", "delta", "z", "B", "C")

# By what a plan depends on; None where the kernels cannot read the tensors as they are.
forward_plans: dict[Any, Plan | None] = {}
backward_plans: dict[Any, Plan | None] = {}


def refuse(call: Any) -> str | None:
    """Why these kernels do not take `call`, or None."""
    u = call.u
    if not u.is_cuda:
        return f"tensors are on {u.device.type}, it needs cuda"
    if u.dtype not in TYPES:
        return f"it takes float32, bfloat16 and float16, not {u.dtype}"
    if call.A.shape[1] > MOST_STATES:
        return f"it takes up to {MOST_STATES} states, not {call.A.shape[1]}"
    return cuda.refusal(u.device.index)


class Ends(NamedTuple):
    """Words that are filled in just before the launch."""

    gradients: tuple[int, ...]
    chunk: int
    part: slice

    @staticmethod
    def of(places: Places) -> "Ends":
        """With the members of ScanCall at these places."""
        first = places["first_sequence"]
        part = slice(first, first + len(Slice._fields))
        return Ends(tuple(places[name] for name in GRADIENTS), places["chunk"], part)


_ENDS = Ends.of(PLACES)


def require_cuda(tensors: Iterable[Tensor | None], op: str = "selective_scan") -> None:
    """Raise before a kernel on a device's pointers meets a tensor that is not in the device's memory."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            raise BackendError(
                f"{op}: backend 'cuda' is written into this program and a tensor is on {tensor.device}, "
                "it needs cuda; move the tensors and the module to the GPU, or compile or export on this device."
            )


def checkpoint_shape(u: Tensor, A: Tensor, groups: int, n_seqs: int | None, gated: bool) -> tuple[int, ...]:
    """The shape of the saved states, (checkpoints, d, n); an upper bound of their number for packed sequences.

    With more states than a block holds, those of all parts one after the other; none for short sequences.
    """
    if A.shape[1] > geometry.MOST_STATES_AT_ONCE:
        return parts.checkpoint_shape(u, A, n_seqs, gated)
    if n_seqs is None and short.takes(u.shape[0], u.shape[1], A.shape[0], groups, A.shape[1]):
        return (0, *A.shape)
    return parts.checkpoints(u, A.shape[1], n_seqs, geometry.interval(u.dtype.itemsize, A.shape[1], gated))


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the scan.

    Args:
        save: Keep what `backward` needs in the third result.

    Returns:
        The output, the final state if the call asks for it, and the checkpoints.
    """
    n = call.A.shape[1]
    if n > geometry.MOST_STATES_AT_ONCE:
        return parts.forward(call, save, forward_at_once)
    interval = _interval(call.u.dtype, n, call.z is not None)
    checkpoints = None
    if save:
        checkpoints = call.A.new_empty((0, *call.A.shape)) if is_short(call) else parts.new_checkpoints(call, interval)
    y, final = forward_at_once(call, interval, checkpoints)
    return y, final, checkpoints


def backward(call: ScanCall, dy: Tensor, dfinal: Tensor | None, checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, in the types of these.

    Args:
        dy: Gradient of the output.
        dfinal: Gradient of the final state; None where nobody used that.
        checkpoints: As `forward` kept them.

    Returns:
        One gradient each, None for an input that is None.
    """
    n = call.A.shape[1]
    if dfinal is None and not (is_short(call) and call.u.numel()):
        n_states = call.u.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
        dfinal = call.A.new_zeros((n_states, *call.A.shape))
    if n > geometry.MOST_STATES_AT_ONCE:
        assert dfinal is not None
        return parts.backward(call, dy, dfinal, checkpoints, backward_at_once)
    interval = _interval(call.u.dtype, n, call.z is not None)
    return backward_at_once(call, dy, dfinal, checkpoints, interval)


@functools.cache
def _interval(dtype: torch.dtype, n: int, gated: bool) -> int:
    return geometry.interval(dtype.itemsize, n, gated)


def forward_at_once(call: ScanCall, interval: int, checkpoints: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Run the scan of so many states as a block holds.

    Args:
        interval: Steps between two checkpoints.
        checkpoints: Where they go, if anywhere.

    Returns:
        The output, and the final state if the call asks for it.
    """
    u, A, out_dtype = call.u, call.A, call.out_dtype
    if u.numel() == 0:
        return torch.empty_like(u, dtype=out_dtype), _unchanged_state(call)
    y = torch.empty_like(u) if out_dtype == u.dtype else torch.empty_like(u, dtype=torch.float32)
    pointers = addresses(call[:11])
    key = (interval, out_dtype, *signature(call, pointers))
    try:
        plan = forward_plans[key]
    except KeyError:
        plan = plan_forward(call, y, interval) if fits(call) else None
        keep(forward_plans, key, plan)
    if plan is None:
        return forward_at_once(_fitting(call), interval, checkpoints)
    words = plan.words.copy()
    for place, pointer in zip(INPUT_PLACES, pointers, strict=True):
        words[place] = pointer
    words[_Y] = y.data_ptr()
    final = None
    if call.return_final_state:
        final = A.new_empty((words[0], *A.shape))
        words[_FINAL] = final.data_ptr()
    if checkpoints is not None:
        words[_CHECKPOINTS] = checkpoints.data_ptr()
    launch(plan, words, A)
    return (y if y.dtype == out_dtype else y.to(out_dtype)), final


def backward_at_once(
    call: ScanCall, dy: Tensor, dfinal: Tensor | None, checkpoints: Tensor, interval: int
) -> tuple[Tensor | None, ...]:
    """`backward` for so many states as a block holds; `interval` steps lie between two checkpoints."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = call[:9]
    if u.numel() == 0:
        assert dfinal is not None
        return _no_gradients(call, dfinal)
    if dy.dtype != u.dtype:
        if u.dtype != torch.float32:
            # Rounding the output's gradient to the inputs' type would cost digits or overflow.
            grads = backward_at_once(_in_float32(call), dy.float(), dfinal, checkpoints, interval)
            return _in_types_of(call, grads)
        dy = dy.float()
    if 0 in dy.stride():
        # As a sum's backward makes it: not worth a kernel of its own, which would read number by number.
        dy = dy.contiguous()
    if dfinal is not None and not dfinal.is_contiguous():
        dfinal = dfinal.contiguous()
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = None if z is None else torch.empty_like(z)
    pointers = addresses(call[:11])
    key = (interval, dy.stride(), dy.data_ptr() & 15, *signature(call, pointers))
    try:
        plan = backward_plans[key]
    except KeyError:
        plan = plan_backward(call, dy, du, ddelta, dz, interval) if fits(call) and strides_fit(dy) else None
        keep(backward_plans, key, plan)
    if plan is None:
        grads = backward_at_once(_fitting(call), _countable(dy), dfinal, checkpoints, interval)
        return _in_types_of(call, grads)
    contiguous = torch.contiguous_format
    dA = torch.empty_like(A, memory_format=contiguous)
    dB, dC = torch.empty_like(B, memory_format=contiguous), torch.empty_like(C, memory_format=contiguous)
    dD = None if D is None else torch.empty_like(D)
    dbias = None if delta_bias is None else torch.empty_like(delta_bias)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    words = plan.words.copy()
    for place, pointer in zip(INPUT_PLACES, pointers, strict=True):
        words[place] = pointer
    words[_DY], words[_CHECKPOINTS] = dy.data_ptr(), checkpoints.data_ptr()
    words[_DFINAL] = 0 if dfinal is None else dfinal.data_ptr()
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    launch(plan, words, A, addresses(grads))
    return grads


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where tensors lie, 0 for one that is not there."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def launch(plan: Plan, words: list[int], like: Tensor, grads: Iterable[int] = (), ends: Ends = _ENDS) -> None:
    """Fill in what is left of the words, and launch.

    Args:
        grads: Where the gradients go, 0 for one that nobody wants.
    """
    # Kept until the launches are on their way; whoever has the memory next on this stream comes after them.
    scratch = like.new_empty(plan.scratch) if plan.scratch else None
    if scratch is not None:
        start = scratch.data_ptr()
        for place, offset in plan.scratch_words:
            words[place] = start + offset
    for place, address in zip(ends.gradients, grads, strict=False):
        if address:
            words[place] = address
    if plan.fault.word.value:
        plan.fault.report()
    for kernel, grid, threads, chunk, part in plan.passes:
        words[ends.chunk] = chunk
        words[ends.part] = part
        kernel.launch(grid, threads, words)


def signature(call: ScanCall, pointers: list[int]) -> tuple[Any, ...]:
    """All that a plan depends on, besides what is asked for.

    Args:
        pointers: The addresses of the call's tensors, 0 where there is none.
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens, softplus, reverse = call[:13]
    return (
        u.get_device(),
        u.shape,
        u.dtype,
        u.stride(),
        delta.dtype,
        delta.stride(),
        A.stride(),
        B.shape,
        B.dtype,
        B.stride(),
        C.dtype,
        C.stride(),
        None if z is None else (z.dtype, z.stride()),
        None if D is None else D.stride(),
        None if delta_bias is None else delta_bias.stride(),
        None if initial_state is None else initial_state.stride(),
        None if mask is None else mask.stride(),
        None if cu_seqlens is None else (cu_seqlens.shape, cu_seqlens.stride()),
        softplus,
        reverse,
        # Of u, delta and z; of B and C.
        (pointers[0] | pointers[1] | pointers[6]) & 15,
        (pointers[3] | pointers[4]) & 7,
    )


def keep(plans: dict[Any, Any], key: Any, plan: Any) -> None:
    """Put a plan among those that are kept."""
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan


def _fitting(call: ScanCall) -> ScanCall:
    """The same call with tensors that the kernels can read."""
    if any(x is not None and x.dtype != call.u.dtype for x in (call.delta, call.z, call.B, call.C)):
        call = _in_float32(call)
    changed: dict[str, Any] = {name: _countable(x) for name in ACTIVATIONS if (x := getattr(call, name)) is not None}
    for name in ("D", "delta_bias", "initial_state", "mask", "cu_seqlens"):
        tensor = getattr(call, name)
        changed[name] = None if tensor is None else tensor.contiguous()
    return call._replace(**changed)


def _in_float32(call: ScanCall) -> ScanCall:
    return call._replace(**{name: x.float() for name in ACTIVATIONS if (x := getattr(call, name)) is not None})


def _countable(x: Tensor) -> Tensor:
    return x if strides_fit(x) else x.contiguous()


def _unchanged_state(call: ScanCall) -> Tensor:
    """The final state of a call without positions."""
    if call.initial_state is not None:
        return call.initial_state.clone(memory_format=torch.contiguous_format)
    n_seqs = call.u.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return call.A.new_zeros((n_seqs, *call.A.shape))


def _no_gradients(call: ScanCall, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a call without positions: the final state is the initial one."""
    *inputs, initial_state = call.tensors
    zeros = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    return (*zeros, None if initial_state is None else dfinal.clone(memory_format=torch.contiguous_format))


def _in_types_of(call: ScanCall, grads: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(
        grad if grad is None or source is None else grad.to(source.dtype)
        for grad, source in zip(grads, call.tensors, strict=True)
    )
