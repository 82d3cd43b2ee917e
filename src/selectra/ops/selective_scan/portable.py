"""The selective scan in chunks of plain PyTorch operations, with its own backward: any device, linear memory.

Inside a chunk every quantity is formed for all positions at once; only `h_t = a_t h_{t-1} + x_t` runs position by
position. The state at the start of each chunk is kept for the backward, which forms a chunk anew.

Layout inside a chunk: (t, b, d, n) with t in scan order; r = d / g channels share a group's B and C.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from selectra.ops import checks
from selectra.ops.selective_scan.call import ScanCall

# States of one chunk: few enough to stay in a processor's cache, enough to keep a GPU busy.
CHUNK_STATES = 1 << 18
SHORTEST_CHUNK, LONGEST_CHUNK = 16, 64


def refuse(call: ScanCall) -> str | None:
    """Never refuses."""
    return None


def chunk_length(u: Tensor, A: Tensor) -> int:
    """Positions in a chunk; depends on shapes alone."""
    states = max(u.shape[0] * A.shape[0] * A.shape[1], 1)
    return min(max(CHUNK_STATES // states, SHORTEST_CHUNK), LONGEST_CHUNK)


def checkpoint_shape(u: Tensor, A: Tensor, groups: int, n_seqs: int | None) -> tuple[int, ...]:
    """Shape of what the forward keeps: one state for each chunk; packed sequences run the forward again instead."""
    if n_seqs is not None:
        return (0,)
    chunks = -(-u.shape[1] // chunk_length(u, A))
    return (chunks, u.shape[0], *A.shape)


@dataclass
class Chunk:
    """One chunk's positions in scan order, absent ones neutralised."""

    u: Tensor  # (t, b, d)
    raw: Tensor  # (t, b, d) step before softplus
    dt: Tensor  # (t, b, d)
    B: Tensor  # (t, b, g, n)
    C: Tensor  # (t, b, g, n)
    z: Tensor | None  # (t, b, d)
    present: Tensor | None  # (t, b, 1)
    decay: Tensor  # (t, b, d, n)
    h: Tensor  # (t, b, d, n)

    def over_channels(self, projection: Tensor) -> Tensor:
        """(t, b, g, n) as (t, b, g, 1, n), to meet states split by `by_group`."""
        return projection.unsqueeze(3)

    def by_group(self, states: Tensor) -> Tensor:
        """(t, b, d, ...) as (t, b, g, r, ...)."""
        return states.unflatten(2, (self.B.shape[2], -1))

    def contract(self, states: Tensor, projection: Tensor) -> Tensor:
        """Sum over the state: (t, b, d, n) with (t, b, g, n) to (t, b, d)."""
        return (self.by_group(states) @ projection.unsqueeze(-1)).squeeze(-1).flatten(2)

    def spread(self, states: Tensor, channels: Tensor) -> Tensor:
        """Sum over the channels of each group: (t, b, d, n) with (t, b, d) to (t, b, g, n)."""
        return (self.by_group(channels).unsqueeze(3) @ self.by_group(states)).squeeze(3)

    def outer(self, channels: Tensor, projection: Tensor) -> Tensor:
        """(t, b, d) with (t, b, g, n) to (t, b, d, n)."""
        return (self.by_group(channels).unsqueeze(-1) * self.over_channels(projection)).flatten(2, 3)


def _pick(x: Tensor, where: slice, reverse: bool, present: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Positions `where` of (b, l, ...) as (t, b, ...) in scan order, absent ones zero."""
    piece = x[:, where].transpose(0, 1).to(dtype)
    if reverse:
        piece = piece.flip(0)
    if present is not None:
        piece = torch.where(present.reshape(*present.shape[:2], *[1] * (piece.dim() - 2)), piece, 0)
    return piece


def _form(call: ScanCall, where: slice, state: Tensor) -> Chunk:
    """Form a chunk and run the recurrence through it from `state`."""
    dtype, reverse = call.A.dtype, call.reverse
    present = None
    if call.mask is not None:
        present = call.mask[:, where].transpose(0, 1)[..., None]
        present = present.flip(0) if reverse else present
    u, raw, B, C = (_pick(x, where, reverse, present, dtype) for x in (call.u, call.delta, call.B, call.C))
    z = None if call.z is None else _pick(call.z, where, reverse, present, dtype)
    if call.delta_bias is not None:
        raw = raw + call.delta_bias
    dt = F.softplus(raw) if call.delta_softplus else raw
    if present is not None:
        dt = torch.where(present, dt, 0)
    decay = (dt[..., None] * call.A).exp_()
    h = decay.new_empty(0)
    chunk = Chunk(u, raw, dt, B, C, z, present, decay, h)
    chunk.h = chunk.outer(dt * u, B)
    _recur(chunk.h, decay, state)
    return chunk


def _recur(x: Tensor, decay: Tensor, state: Tensor) -> None:
    """x_t += decay_t x_{t-1} along the first dimension, in place, with `state` before the first."""
    for x_t, decay_t in zip(x.unbind(0), decay.unbind(0), strict=True):
        state = x_t.addcmul_(decay_t, state)


def _pieces(length: int, size: int, reverse: bool) -> list[slice]:
    """Chunks in scan order, as slices of the length."""
    starts = range(0, length, size)
    if reverse:
        return [slice(max(length - start - size, 0), length - start) for start in starts]
    return [slice(start, min(start + size, length)) for start in starts]


def _first_state(call: ScanCall) -> Tensor:
    if call.initial_state is not None:
        return call.initial_state
    return call.A.new_zeros(call.u.shape[0], *call.A.shape)


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states at the start of each chunk when `save`."""
    if call.cu_seqlens is not None:
        return _forward_packed(call)
    y = torch.empty(call.u.shape, dtype=call.out_dtype, device=call.u.device)
    state = _first_state(call)
    kept: list[Tensor] = []
    for where in _pieces(call.u.shape[1], chunk_length(call.u, call.A), call.reverse):
        kept.append(state)
        chunk = _form(call, where, state)
        state = chunk.h[-1].clone()
        out = _ungated(call, chunk)
        if chunk.z is not None:
            out = out * F.silu(chunk.z)
        if chunk.present is not None:
            out = torch.where(chunk.present, out, 0)
        y[:, where] = (out.flip(0) if call.reverse else out).transpose(0, 1).to(call.out_dtype)
    checkpoints = torch.stack(kept) if save and kept else state.new_empty(0, *state.shape if save else ())
    return y, state.clone() if state is call.initial_state else state, checkpoints


def _ungated(call: ScanCall, chunk: Chunk) -> Tensor:
    """y before the gate, (t, b, d)."""
    y = chunk.contract(chunk.h, chunk.C)
    return y if call.D is None else y.addcmul_(call.D, chunk.u)


@dataclass
class Gradients:
    """Gradients as they are summed up over the chunks."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    state: Tensor

    @classmethod
    def zeros(cls, call: ScanCall, state: Tensor) -> "Gradients":
        """Zeros where sums start, `state` as the gradient of the final state."""

        def like(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device)

        # The first five are always there.
        du, ddelta, dA, dB, dC = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in call[:5])
        return cls(du, ddelta, dA, dB, dC, like(call.D), like(call.z), like(call.delta_bias), state)

    def as_tuple(self) -> tuple[Tensor | None, ...]:
        """In the order of the operator's arguments."""
        return (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.state)


def backward(call: ScanCall, dy: Tensor, dfinal: Tensor, checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; None where the input is absent."""
    if call.cu_seqlens is not None:
        return _backward_packed(call, dy, dfinal)
    grads = Gradients.zeros(call, dfinal)
    pieces = _pieces(call.u.shape[1], chunk_length(call.u, call.A), call.reverse)
    for where, state in zip(reversed(pieces), checkpoints.flip(0), strict=True):
        _backward_chunk(call, where, state, dy, grads)
    if call.initial_state is None:
        return (*grads.as_tuple()[:8], None)
    return grads.as_tuple()


def _backward_chunk(call: ScanCall, where: slice, state: Tensor, dy: Tensor, grads: Gradients) -> None:
    """Walk one chunk backward: `grads.state` is the gradient of its last state and becomes that of `state`."""
    chunk = _form(call, where, state)
    dout = _pick(dy, where, call.reverse, chunk.present, call.A.dtype)

    def put(into: Tensor | None, value: Tensor) -> None:
        assert into is not None
        if chunk.present is not None:
            value = torch.where(chunk.present.reshape(*chunk.present.shape[:2], *[1] * (value.dim() - 2)), value, 0)
        into[:, where] = (value.flip(0) if call.reverse else value).transpose(0, 1).to(into.dtype)

    if chunk.z is not None:
        gate = torch.sigmoid(chunk.z)
        put(grads.z, dout * _ungated(call, chunk) * gate * (1 + chunk.z * (1 - gate)))
        dout = dout * (chunk.z * gate)
    put(grads.C, chunk.spread(chunk.h, dout))

    # dh_t = dy_t C_t + a_{t+1} dh_{t+1}
    dh = chunk.outer(dout, chunk.C)
    dh[-1] += grads.state
    steps, decays = dh.unbind(0), chunk.decay.unbind(0)
    for t in range(len(steps) - 2, -1, -1):
        steps[t].addcmul_(decays[t + 1], steps[t + 1])

    put(grads.B, chunk.spread(dh, chunk.dt * chunk.u))
    through_input = chunk.contract(dh, chunk.B)  # d/d(dt u)
    through_decay = dh.mul_(chunk.decay)  # a_t dh_t
    grads.state = through_decay[0].clone()
    through_decay[0] *= state
    through_decay[1:] *= chunk.h[:-1]  # d/d(dt A)
    ddt = torch.addcmul((through_decay * call.A).sum(-1), chunk.u, through_input)
    grads.A += through_decay.mul_(chunk.dt[..., None]).sum((0, 1))
    du = chunk.dt * through_input
    if call.D is not None:
        du = du.addcmul_(call.D, dout)
        assert grads.D is not None
        grads.D += (dout * chunk.u).sum((0, 1))
    put(grads.u, du)
    if call.delta_softplus:
        ddt = ddt * torch.sigmoid(chunk.raw)
    if chunk.present is not None:
        ddt = torch.where(chunk.present, ddt, 0)
    if grads.delta_bias is not None:
        grads.delta_bias += ddt.sum((0, 1))
    put(grads.delta, ddt)


def _buckets(call: ScanCall) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Packed sequences of alike lengths, as (sequence numbers, positions (k, longest), mask (k, longest)).

    Lengths of a bucket differ by less than a factor of two, so that padding never doubles the work.
    """
    assert call.cu_seqlens is not None
    borders = checks.sequence_borders(call.cu_seqlens, call.u.shape[1])
    members: dict[int, list[int]] = defaultdict(list)
    for index, (start, end) in enumerate(pairwise(borders)):
        members[(end - start).bit_length()].append(index)
    found = []
    cu = call.cu_seqlens.long()
    for indices in members.values():
        numbers = torch.tensor(indices, device=cu.device)
        starts, lengths = cu[numbers], (cu[1:] - cu[:-1])[numbers]
        steps = torch.arange(int(lengths.max()), device=cu.device)
        mask = steps < lengths[:, None]
        found.append((numbers, torch.where(mask, starts[:, None] + steps, 0), mask))
    return found


def _padded(call: ScanCall, bucket: tuple[Tensor, Tensor, Tensor]) -> ScanCall:
    """One bucket as an ordinary masked batch."""
    numbers, positions, mask = bucket
    return call._replace(
        u=call.u[0, positions],
        delta=call.delta[0, positions],
        B=call.B[0, positions],
        C=call.C[0, positions],
        z=None if call.z is None else call.z[0, positions],
        initial_state=None if call.initial_state is None else call.initial_state[numbers],
        mask=mask,
        cu_seqlens=None,
    )


def _forward_packed(call: ScanCall) -> tuple[Tensor, Tensor, Tensor]:
    assert call.cu_seqlens is not None
    y = torch.empty(call.u.shape, dtype=call.out_dtype, device=call.u.device)
    states = call.A.new_zeros(call.cu_seqlens.shape[0] - 1, *call.A.shape)
    for bucket in _buckets(call):
        numbers, positions, mask = bucket
        y_padded, state, _ = forward(_padded(call, bucket), save=False)
        y[0, positions[mask]] = y_padded[mask]
        states[numbers] = state
    return y, states, states.new_empty(0)


def _backward_packed(call: ScanCall, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    grads = Gradients.zeros(call, torch.zeros_like(dfinal))
    for bucket in _buckets(call):
        numbers, positions, mask = bucket
        padded = _padded(call, bucket)
        checkpoints = forward(padded, save=True)[2]
        du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = backward(padded, dy[0, positions], dfinal[numbers], checkpoints)
        for into, value in ((grads.u, du), (grads.delta, ddelta), (grads.B, dB), (grads.C, dC), (grads.z, dz)):
            if into is not None and value is not None:
                into[0, positions[mask]] = value[mask]
        for into, value in ((grads.A, dA), (grads.D, dD), (grads.delta_bias, dbias)):
            if into is not None and value is not None:
                into.add_(value)
        if dstate is not None:
            grads.state[numbers] = dstate
    if call.initial_state is None:
        return (*grads.as_tuple()[:8], None)
    return grads.as_tuple()
