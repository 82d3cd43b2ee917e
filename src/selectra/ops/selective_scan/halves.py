"""The CUDA scan in two halves, for a part of a sequence whose neighbours others hold.

The first half finds what the part makes of a zero state, or in the backward of a zero adjoint behind it, without
output; the second runs the part from the state before it, or from the adjoint behind it. Where the kernels cut the
length into chunks they need what each makes of zero anyway: the first half is that pass, over all chunks, and the
second goes on from it. Nothing is scanned that a whole sequence would not need, but the last chunk's effect. The pass
walks each chunk from where its effect is, and stops where the rest has decayed to 0 in float32; the device decides.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectra.ops.selective_scan import cuda, geometry, parts, wide
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.selective_scan.cuda import INPUT_PLACES
from selectra.ops.selective_scan.passes import Pass, Sizes
from selectra.ops.selective_scan.plans import (
    PLACES,
    TYPES,
    Plan,
    call_macros,
    fits,
    is_short,
    plan_backward,
    plan_forward,
    strides_fit,
)
from selectra.ops.transforms import transformed

_CHUNK_WORDS = (PLACES["chunk_state"], PLACES["chunk_delta"])


class Effect(NamedTuple):
    """What a part makes of a zero state, or of a zero adjoint behind it."""

    state: Tensor
    """(b, d, n), of the whole part."""
    steps: Tensor
    """Sums of the steps of every chunk, (b, chunks, d): of all, or of as many as it takes to forget."""
    chunks: Tensor
    """(b, chunks, d, n), of each chunk; `begin` puts what stands before it in its place."""


class _Plans(NamedTuple):
    """One half after the other, and what lies between them; they share their words."""

    effect: Plan
    chain: Plan
    rest: Plan
    n_chunks: int


# By what a plan depends on.
forward_plans: dict[Any, _Plans] = {}
backward_plans: dict[Any, _Plans] = {}


def takes(call: ScanCall) -> bool:
    """Whether a call that the cuda backend takes can run in halves; others run whole."""
    return (
        geometry.NARROW_STATES < call.A.shape[1] <= geometry.MOST_STATES_AT_ONCE
        and call.cu_seqlens is None
        and call.u.numel() > 0
        and call.u.dtype in TYPES
        and call.out_dtype == call.u.dtype
        and not is_short(call)
        and fits(call)
        and not transformed(call.tensors)
    )


def forward_effect(call: ScanCall) -> Effect:
    """What the part makes of a zero state: the first half of the forward."""
    plans = _forward_plans(call)
    words = _words(plans.effect, call)
    return _launch_effect(plans, words, call)


def begin(call: ScanCall, effect: Effect, incoming: Tensor) -> Tensor:
    """The states at the start of every chunk, (b, chunks, d, n), in the place of `effect.chunks`.

    Args:
        incoming: The state before the part, (b, d, n).
    """
    if effect.chunks.shape[1] == 1:
        return incoming.unsqueeze(1)
    plans = _forward_plans(call)
    words = _words(plans.chain, call)
    _set(words, effect, initial_state=incoming)
    cuda.launch(plans.chain, words, call.A)
    return effect.chunks


def forward(call: ScanCall, starts: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """The second half: y, and what the backward needs if that is to be saved.

    Args:
        starts: As `begin` gives them; they stay as they are.
    """
    plans = _forward_plans(call)
    words = _words(plans.rest, call)
    y = torch.empty_like(call.u)
    checkpoints = parts.new_checkpoints(call, _interval(call)) if save else None
    words[PLACES["chunk_state"]] = words[PLACES["initial_state"]] = starts.data_ptr()
    words[PLACES["y"]] = y.data_ptr()
    words[PLACES["checkpoints"]] = 0 if checkpoints is None else checkpoints.data_ptr()
    cuda.launch(plans.rest, words, call.A)
    return y, checkpoints


def readable(dy: Tensor) -> Tensor:
    """The output's gradient as kernels can read it."""
    return dy.contiguous() if 0 in dy.stride() or not strides_fit(dy) else dy


def backward_effect(call: ScanCall, dy: Tensor) -> Effect:
    """What the part's outputs make of a zero adjoint behind it, at the part's start: the first half of the backward.

    Args:
        dy: Gradient of y, `readable`.
    """
    plans = _backward_plans(call, dy)
    words = _words(plans.effect, call)
    words[PLACES["dy"]] = dy.data_ptr()
    return _launch_effect(plans, words, call)


def backward(
    call: ScanCall, dy: Tensor, effect: Effect, outgoing: Tensor, checkpoints: Tensor
) -> tuple[Tensor | None, ...]:
    """The second half: gradients as `cuda.backward` gives them, that of the state before the part always last.

    Args:
        effect: Of `backward_effect`; its chunks are written over.
        outgoing: The adjoint behind the part: the gradient of its last state, (b, d, n).
        checkpoints: As `forward` saved them.
    """
    plans = _backward_plans(call, dy)
    words = _words(plans.rest, call)
    if plans.n_chunks > 1:
        _set(words, effect)
    words[PLACES["dfinal"]] = outgoing.data_ptr()
    words[PLACES["dy"]], words[PLACES["checkpoints"]] = dy.data_ptr(), checkpoints.data_ptr()
    du, ddelta, dz = (None if x is None else torch.empty_like(x) for x in (call.u, call.delta, call.z))
    lie = torch.contiguous_format
    dA, dB, dC = (torch.empty_like(x, memory_format=lie) for x in (call.A, call.B, call.C))
    dD, dbias = (None if x is None else torch.empty_like(x) for x in (call.D, call.delta_bias))
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, torch.empty_like(outgoing))
    cuda.launch(plans.rest, words, call.A, cuda.addresses(grads))
    return grads


def _launch_effect(plans: _Plans, words: list[int], call: ScanCall) -> Effect:
    batch, (d, n) = call.u.shape[0], call.A.shape
    new = call.A.new_empty
    effect = Effect(new((batch, d, n)), new((batch, plans.n_chunks, d)), new((batch, plans.n_chunks, d, n)))
    _set(words, effect)
    words[PLACES["final_state"]] = effect.state.data_ptr()
    cuda.launch(plans.effect, words, call.A)
    return effect


def _set(words: list[int], effect: Effect, initial_state: Tensor | None = None) -> None:
    for place, tensor in zip(_CHUNK_WORDS, (effect.chunks, effect.steps), strict=True):
        words[place] = tensor.data_ptr()
    if initial_state is not None:
        words[PLACES["initial_state"]] = initial_state.data_ptr()


def _words(plan: Plan, call: ScanCall) -> list[int]:
    words = plan.words.copy()
    for place, pointer in zip(INPUT_PLACES, _pointers(call), strict=True):
        words[place] = pointer
    return words


def _pointers(call: ScanCall) -> list[int]:
    tensors: tuple[Any, ...] = call[: len(INPUT_PLACES)]
    return [0 if x is None else x.data_ptr() for x in tensors]


def _interval(call: ScanCall) -> int:
    return geometry.interval(call.u.dtype.itemsize, call.A.shape[1], call.z is not None)


def _forward_plans(call: ScanCall) -> _Plans:
    key = cuda.signature(call, _pointers(call))
    if key not in forward_plans:
        interval, sizes, y = _interval(call), Sizes.of(call), _like(call.u)
        whole = plan_forward(call, y, interval)
        macros = call_macros(call, TYPES[y.dtype], (call.u, call.delta, call.z, y), None)
        chunk, n_chunks = (whole.words[PLACES[name]] for name in ("chunk", "n_chunks"))
        effect = wide.forward_effect(sizes, macros, interval, chunk, n_chunks, call.u.get_device())
        # Memory for chunks is given by whoever goes on from them.
        whole = whole._replace(scratch=0, scratch_words=())
        cuda.keep(forward_plans, key, _of(whole, effect, whole.passes[1:-1], whole.passes[-1:], n_chunks))
    return forward_plans[key]


def _backward_plans(call: ScanCall, dy: Tensor) -> _Plans:
    key = (dy.stride(), dy.data_ptr() & 15, *cuda.signature(call, _pointers(call)))
    if key not in backward_plans:
        interval, sizes = _interval(call), Sizes.of(call)
        du, ddelta, dz = _like(call.u), _like(call.delta), None if call.z is None else _like(call.z)
        whole = plan_backward(call, dy, du, ddelta, dz, interval)
        macros = call_macros(call, TYPES[dy.dtype], (call.u, call.delta, call.z, dy, du, ddelta, dz), None)
        chunk, n_chunks = (whole.words[PLACES[name]] for name in ("chunk", "n_chunks"))
        effect = wide.backward_effect(sizes, macros, interval, chunk, n_chunks, call.u.get_device())
        passes = whole.passes
        if n_chunks > 1:
            # The effects are known; what follows chains them.
            passes = passes[1:]
            kept = tuple(word for word in whole.scratch_words if word[0] not in _CHUNK_WORDS)
            whole = whole._replace(scratch_words=kept)
        cuda.keep(backward_plans, key, _of(whole, effect, (), passes, n_chunks))
    return backward_plans[key]


def _like(x: Tensor) -> Tensor:
    """As `torch.empty_like(x)` lies, without memory."""
    return torch.empty_like(x, device="meta")


def _of(
    whole: Plan, effect: tuple[Pass, ...], chain: tuple[Pass, ...], rest: tuple[Pass, ...], n_chunks: int
) -> _Plans:
    small = whole._replace(scratch=0, scratch_words=())
    return _Plans(small._replace(passes=effect), small._replace(passes=chain), whole._replace(passes=rest), n_chunks)
