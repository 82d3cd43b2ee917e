"""The selective scan in chunks of plain PyTorch operations, with its own backward: any device, linear memory.

Inside a chunk every quantity is formed for all positions at once; only `h_t = a_t h_{t-1} + x_t` runs position by
position. The state at the start of each chunk is kept for the backward, which forms a chunk anew. The batch is cut
too, so that a chunk's states take the same memory whatever the batch.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selectra.ops import checks
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.selective_scan.chunks import (
    Chunk,
    Workspace,
    by_channel,
    by_state,
    checkpoint_shape,
    chunk_length,
    contract,
    fill_outer,
    form,
    over_states,
    pick,
    rows_at_once,
    select,
    spread,
)


def refuse(call: ScanCall) -> str | None:
    """Never refuses."""
    return None


def _pieces(call: ScanCall) -> list[slice]:
    """Chunks in scan order, as slices of the length."""
    length, size = call.u.shape[1], chunk_length(call.u, call.A)
    starts = range(0, length, size)
    if call.reverse:
        return [slice(max(length - start - size, 0), length - start) for start in starts]
    return [slice(start, min(start + size, length)) for start in starts]


def _rows(call: ScanCall) -> Iterator[tuple[slice, ScanCall]]:
    """The batch in blocks of rows, each as a call of its own."""
    size = rows_at_once(call.u, call.A, call.u.shape[1])
    for start in range(0, call.u.shape[0], size):
        rows = slice(start, start + size)
        yield (
            rows,
            call._replace(
                u=call.u[rows],
                delta=call.delta[rows],
                B=call.B[rows],
                C=call.C[rows],
                z=None if call.z is None else call.z[rows],
                initial_state=None if call.initial_state is None else call.initial_state[rows],
                mask=None if call.mask is None else call.mask[rows],
            ),
        )


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states at the start of each chunk when `save`."""
    if call.cu_seqlens is not None:
        return _forward_packed(call)
    work = Workspace(call)
    y = torch.empty(call.u.shape, dtype=call.out_dtype, device=call.u.device)
    final = call.A.new_empty(call.u.shape[0], *call.A.shape)
    kept = call.A.new_empty(checkpoint_shape(call.u, call.A, call.B.shape[2], None) if save else (0,))
    for rows, block in _rows(call):
        _forward_rows(block, work, y[rows], final[rows], kept[:, rows] if save else None)
    return y, final, kept


def _forward_rows(call: ScanCall, work: Workspace, y: Tensor, final: Tensor, kept: Tensor | None) -> None:
    """Fill y, the final state and the checkpoints of one block of rows."""
    state = work.A.new_zeros(call.u.shape[0], *work.A.shape)
    if call.initial_state is not None:
        state.copy_(by_state(call.initial_state, call.B.shape[2]))
    for index, where in enumerate(_pieces(call)):
        if kept is not None:
            kept[index] = state
        chunk = form(call, work, where, state)
        state.copy_(chunk.h.steps[-1])
        out = _ungated(call, chunk)
        if chunk.z is not None:
            out = out * F.silu(chunk.z)
        out = select(chunk.present, out)
        y[:, where] = (out.flip(0) if call.reverse else out).transpose(0, 1)
    final.copy_(by_channel(state))


def _ungated(call: ScanCall, chunk: Chunk) -> Tensor:
    """y before the gate, (t, b, d)."""
    y = contract(chunk.h.whole, chunk.C)
    return y if call.D is None else y.addcmul_(call.D, chunk.u)


@dataclass
class Gradients:
    """Gradients: those by position and of the initial state are filled in, those of parameters are summed up."""

    u: Tensor
    delta: Tensor
    A: Tensor  # (g, n, r)
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    state: Tensor  # (b, d, n)

    @classmethod
    def of(cls, call: ScanCall, work: Workspace, state: Tensor) -> "Gradients":
        """Room for the gradients of a call, with zeros where sums start."""
        dD, dbias = (None if x is None else torch.zeros_like(x) for x in (call.D, call.delta_bias))
        return cls(A=torch.zeros_like(work.A), D=dD, delta_bias=dbias, state=torch.empty_like(state), **_room(call))

    def rows(self, rows: slice) -> "Gradients":
        """A block of rows; the sums are shared."""
        dz = None if self.z is None else self.z[rows]
        return replace(
            self, u=self.u[rows], delta=self.delta[rows], B=self.B[rows], C=self.C[rows], z=dz, state=self.state[rows]
        )

    def results(self, call: ScanCall) -> tuple[Tensor | None, ...]:
        """In the order of the operator's arguments, None where the input is absent."""
        dA = by_channel(self.A).contiguous()
        state = None if call.initial_state is None else self.state
        return (self.u, self.delta, dA, self.B, self.C, self.D, self.z, self.delta_bias, state)


def _room(call: ScanCall) -> dict[str, Any]:
    """Memory for what has a gradient at each position; every position will be written."""
    named = {"u": call.u, "delta": call.delta, "B": call.B, "C": call.C, "z": call.z}
    return {k: None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for k, x in named.items()}


def backward(call: ScanCall, dy: Tensor, dfinal: Tensor, checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; None where the input is absent."""
    if call.cu_seqlens is not None:
        return _backward_packed(call, dy, dfinal)
    work = Workspace(call)
    grads = Gradients.of(call, work, dfinal)
    for rows, block in _rows(call):
        _backward_rows(block, work, dy[rows], dfinal[rows], checkpoints[:, rows], grads.rows(rows))
    return grads.results(call)


def _backward_rows(
    call: ScanCall, work: Workspace, dy: Tensor, dfinal: Tensor, checkpoints: Tensor, grads: Gradients
) -> None:
    """Fill the gradients of one block of rows, from the last chunk to the first."""
    dstate = work.A.new_empty(call.u.shape[0], *work.A.shape)
    dstate.copy_(by_state(dfinal, call.B.shape[2]))
    for where, state in zip(reversed(_pieces(call)), checkpoints.flip(0), strict=True):
        _backward_chunk(call, work, where, state, dy, dstate, grads)
    grads.state.copy_(by_channel(dstate))


def _backward_chunk(
    call: ScanCall, work: Workspace, where: slice, state: Tensor, dy: Tensor, dstate: Tensor, grads: Gradients
) -> None:
    """Walk one chunk backward: `dstate` is the gradient of its last state and becomes that of `state`."""
    chunk = form(call, work, where, state)
    dout = pick(dy, where, call.reverse, chunk.present, call.A.dtype)

    def put(into: Tensor, value: Tensor) -> None:
        value = select(chunk.present, value)
        into[:, where] = (value.flip(0) if call.reverse else value).transpose(0, 1)

    if chunk.z is not None and grads.z is not None:
        gate = torch.sigmoid(chunk.z)
        put(grads.z, dout * _ungated(call, chunk) * gate * (1 + chunk.z * (1 - gate)))
        dout = dout * (chunk.z * gate)
    put(grads.C, spread(chunk.h.whole, dout))

    dh = _adjoint(chunk, work, dout, dstate)
    put(grads.B, spread(dh, chunk.x))
    through_input = contract(dh, chunk.B)  # d/d(dt u)
    through_decay = dh.mul_(chunk.decay.whole)  # a_t dh_t
    dstate.copy_(through_decay[0])
    through_decay[0].mul_(state)
    through_decay[1:].mul_(chunk.h.whole[:-1])  # d/d(dt A)
    # The chunk's decays have done their work; their memory takes the products.
    ddt = torch.mul(through_decay, work.A, out=chunk.decay.whole).sum(3).flatten(2)
    ddt.addcmul_(chunk.u, through_input)
    grads.A += through_decay.mul_(over_states(chunk.dt, dh.shape[2])).sum((0, 1))
    du = chunk.dt * through_input
    if call.D is not None and grads.D is not None:
        du.addcmul_(call.D, dout)
        grads.D += (dout * chunk.u).sum((0, 1))
    put(grads.u, du)
    if call.delta_softplus:
        ddt *= torch.sigmoid(chunk.raw)
    ddt = select(chunk.present, ddt)
    if grads.delta_bias is not None:
        grads.delta_bias += ddt.sum((0, 1))
    put(grads.delta, ddt)


def _adjoint(chunk: Chunk, work: Workspace, dout: Tensor, dlast: Tensor) -> Tensor:
    """The gradients of the states: dh_t = dout_t C_t + a_{t+1} dh_{t+1}, with `dlast` after the last."""
    dh = work.take("dh", tuple(chunk.h.whole.shape))
    fill_outer(dout, chunk.C, dh.whole)
    later = dh.steps[-1].add_(dlast)
    for dh_t, decay in zip(dh.steps[-2::-1], chunk.decay.steps[:0:-1], strict=True):
        later = dh_t.addcmul_(decay, later)
    return dh.whole


@dataclass
class Bucket:
    """Packed sequences of alike lengths that make one masked block of rows."""

    numbers: Tensor  # (b,)
    positions: Tensor  # (b, longest)
    mask: Tensor  # (b, longest)

    def call(self, call: ScanCall) -> ScanCall:
        """The bucket as an ordinary call."""
        at = self.positions
        return call._replace(
            u=call.u[0, at],
            delta=call.delta[0, at],
            B=call.B[0, at],
            C=call.C[0, at],
            z=None if call.z is None else call.z[0, at],
            initial_state=None if call.initial_state is None else call.initial_state[self.numbers],
            mask=self.mask,
            cu_seqlens=None,
        )

    def put(self, into: Tensor | None, value: Tensor | None) -> None:
        """Write (b, longest, ...) to where it belongs in (1, l, ...)."""
        if into is not None and value is not None:
            into[0, self.positions[self.mask]] = value[self.mask].to(into.dtype)


def _buckets(call: ScanCall) -> Iterator[Bucket]:
    """Lengths of a bucket differ by less than a factor of two, so that padding never doubles the work."""
    assert call.cu_seqlens is not None
    borders = checks.sequence_borders(call.cu_seqlens, call.u.shape[1])
    members: dict[int, list[int]] = defaultdict(list)
    for index, (start, end) in enumerate(pairwise(borders)):
        members[(end - start).bit_length()].append(index)
    cu = call.cu_seqlens.long()
    for indices in members.values():
        longest = max(borders[index + 1] - borders[index] for index in indices)
        size = rows_at_once(call.u, call.A, longest)
        for first in range(0, len(indices), size):
            numbers = torch.tensor(indices[first : first + size], device=cu.device)
            starts, lengths = cu[numbers], cu[numbers + 1] - cu[numbers]
            steps = torch.arange(longest, device=cu.device)
            mask = steps < lengths[:, None]
            yield Bucket(numbers, torch.where(mask, starts[:, None] + steps, 0), mask)


def _forward_packed(call: ScanCall) -> tuple[Tensor, Tensor, Tensor]:
    assert call.cu_seqlens is not None
    work = Workspace(call)
    y = torch.empty(call.u.shape, dtype=call.out_dtype, device=call.u.device)
    states = call.A.new_empty(call.cu_seqlens.shape[0] - 1, *call.A.shape)
    for bucket in _buckets(call):
        padded = bucket.call(call)
        y_padded, final = torch.empty_like(padded.u, dtype=y.dtype), states[bucket.numbers]
        _forward_rows(padded, work, y_padded, final, None)
        bucket.put(y, y_padded)
        states[bucket.numbers] = final
    return y, states, states.new_empty(0)


def _backward_packed(call: ScanCall, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    work = Workspace(call)
    grads = Gradients.of(call, work, dfinal)
    for bucket in _buckets(call):
        padded = bucket.call(call)
        kept = call.A.new_empty(checkpoint_shape(padded.u, call.A, call.B.shape[2], None))
        dlast = dfinal[bucket.numbers]
        _forward_rows(padded, work, torch.empty_like(padded.u), torch.empty_like(dlast), kept)
        # The sums are shared.
        piece = replace(grads, state=torch.empty_like(dlast), **_room(padded))
        _backward_rows(padded, work, dy[0, bucket.positions], dlast, kept, piece)
        for name in ("u", "delta", "B", "C", "z"):
            bucket.put(getattr(grads, name), getattr(piece, name))
        grads.state[bucket.numbers] = piece.state
    return grads.results(call)
