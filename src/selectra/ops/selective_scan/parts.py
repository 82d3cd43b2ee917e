"""Checkpoints of the CUDA scan, and calls with more states than a block holds.

y before skip and gate is a sum over the states, so that slices of them are scans of their own. They run in float32 on
u, delta, B and C alone; skip and gate, and the gradients of these, are plain PyTorch.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selectra.ops.selective_scan import geometry
from selectra.ops.selective_scan.call import ScanCall

Forward = Callable[[ScanCall, int, Tensor | None], tuple[Tensor, Tensor | None]]
Backward = Callable[[ScanCall, Tensor, Tensor, Tensor, int], tuple[Tensor | None, ...]]


def checkpoints(u: Tensor, n: int, n_seqs: int | None, interval: int) -> tuple[int, int, int]:
    """The shape of the checkpoints of n states; an upper bound of their number for packed sequences."""
    batch, length, d = u.shape
    count = batch * -(-length // interval) if n_seqs is None else length // interval + n_seqs
    return count, d, n


def new_checkpoints(call: ScanCall, interval: int) -> Tensor:
    """Room for the checkpoints of a call."""
    n_seqs = None if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    shape = checkpoints(call.u, call.A.shape[1], n_seqs, interval)
    # Packed sequences leave a part of the upper bound unused.
    return call.A.new_empty(shape) if n_seqs is None else call.A.new_zeros(shape)


def checkpoint_shape(u: Tensor, A: Tensor, n_seqs: int | None, gated: bool) -> tuple[int]:
    """The shape of the checkpoints of all parts, one after the other; behind them y before the gate, if there is one.

    That y is small beside B and C of so many states, and all parts would have to run once more for it.
    """
    shapes = [checkpoints(u, part.stop - part.start, n_seqs, _interval(part)) for part in slices(A.shape[1])]
    return (sum(count * d * n for count, d, n in shapes) + (u.numel() if gated else 0),)


def _before_gate(call: ScanCall, kept: Tensor) -> Tensor:
    """y before the gate, where it is kept."""
    return kept[kept.numel() - call.u.numel() :].view(call.u.shape)


def slices(n: int) -> list[slice]:
    """n states in parts of alike size that a block holds, each a multiple of a tile's but the last."""
    n_parts = -(-n // geometry.MOST_STATES_AT_ONCE)
    size = geometry.STATES_OF_TILE * -(-n // (n_parts * geometry.STATES_OF_TILE))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _interval(part: slice) -> int:
    return geometry.interval(torch.float32.itemsize, part.stop - part.start, False)


class _Part(NamedTuple):
    call: ScanCall
    states: slice
    interval: int
    checkpoints: Tensor | None


def _parts(call: ScanCall, kept: Tensor | None) -> Iterator[_Part]:
    """The calls of all parts, each with its own piece of the checkpoints."""
    n_seqs = None if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    u, delta, B, C = (x.float() for x in (call.u, call.delta, call.B, call.C))
    whole = call._replace(u=u, delta=delta, D=None, z=None, out_dtype=torch.float32, return_final_state=True)
    start = 0
    for states in slices(call.A.shape[1]):
        initial_state = None if call.initial_state is None else call.initial_state[..., states].contiguous()
        part = whole._replace(A=call.A[:, states], B=B[..., states], C=C[..., states], initial_state=initial_state)
        interval, piece = _interval(states), None
        if kept is not None:
            shape = checkpoints(u, states.stop - states.start, n_seqs, interval)
            piece = kept[start : start + shape[0] * shape[1] * shape[2]].view(shape)
            start += piece.numel()
        yield _Part(part, states, interval, piece)


def forward(call: ScanCall, save: bool, run: Forward) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `cuda.forward`.

    Args:
        run: The scan of one part.
    """
    n_seqs = None if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    # Packed sequences leave a part of the upper bound unused.
    make = call.A.new_empty if n_seqs is None else call.A.new_zeros
    kept = make(checkpoint_shape(call.u, call.A, n_seqs, call.z is not None)) if save else None
    y, final = _run(call, kept, run)
    if call.z is not None:
        if kept is not None:
            _before_gate(call, kept).copy_(y)
        y *= F.silu(_present(call, call.z))
    return y.to(call.out_dtype), final, kept


def _run(call: ScanCall, kept: Tensor | None, run: Forward) -> tuple[Tensor, Tensor]:
    """y before the gate in float32, and the final state."""
    y, finals = None, []
    for part in _parts(call, kept):
        more, final = run(part.call, part.interval, part.checkpoints)
        y = more if y is None else y.add_(more)
        finals.append(final)
    assert y is not None
    if call.D is not None:
        y.addcmul_(_present(call, call.u), call.D)
    return y, torch.cat(finals, -1)


def _present(call: ScanCall, x: Tensor) -> Tensor:
    """Numbers by position in float32, zero where absent."""
    x = x.float()
    return x if call.mask is None else x.masked_fill(~call.mask.unsqueeze(-1), 0.0)


def backward(call: ScanCall, dy: Tensor, dfinal: Tensor, kept: Tensor, run: Backward) -> tuple[Tensor | None, ...]:
    """As `cuda.backward`.

    Args:
        run: The gradients of one part.
    """
    dy, dz = _present(call, dy), None
    if call.z is not None:
        z = _present(call, call.z)
        s, y = torch.sigmoid(z), _before_gate(call, kept)
        # As it lies in memory: compiled programs rely on it.
        dz = torch.empty_like(call.z).copy_(dy * y * s * (1 + z * (1 - s)))
        dy = dy * z * s
    sums: list[Tensor | None] = [None, None, None]
    by_state: list[list[Tensor]] = [[], [], [], []]
    for part in _parts(call, kept):
        assert part.checkpoints is not None
        of_part = dfinal[..., part.states].contiguous()
        du, ddelta, dA, dB, dC, _, _, dbias, dinitial = run(part.call, dy, of_part, part.checkpoints, part.interval)
        for i, grad in enumerate((du, ddelta, dbias)):
            so_far = sums[i]
            sums[i] = grad if so_far is None or grad is None else so_far.add_(grad)
        for grads, grad in zip(by_state, (dA, dB, dC, dinitial), strict=True):
            if grad is not None:
                grads.append(grad)
    du, ddelta, dbias = sums
    assert du is not None
    dD = None
    if call.D is not None:
        du.addcmul_(dy, call.D)
        dD = (dy * _present(call, call.u)).sum((0, 1))
    dA, dB, dC, dinitial = (torch.cat(grads, -1) if grads else None for grads in by_state)
    found = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    return tuple(
        grad if grad is None or source is None else grad.to(source.dtype)
        for grad, source in zip(found, call.tensors, strict=True)
    )
