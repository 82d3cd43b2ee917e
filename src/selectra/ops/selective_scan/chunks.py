"""A chunk of the `portable` selective scan: what is formed for its positions, and the memory that it is formed in.

States are (t, b, g, n, r) with t in scan order; the r = d / g channels that share a group's B and C come last, where
they are many and lie together.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selectra.ops.selective_scan.call import SOFTPLUS_THRESHOLD, ScanCall

# States of one chunk: few enough to stay in a processor's cache, enough to keep a GPU busy.
CPU_CHUNK_STATES, CHUNK_STATES = 1 << 17, 1 << 22
SHORTEST_CHUNK, LONGEST_CHUNK = 16, 32


def _chunk_states(u: Tensor) -> int:
    return CPU_CHUNK_STATES if u.device.type == "cpu" else CHUNK_STATES


def chunk_length(u: Tensor, A: Tensor) -> int:
    """Positions in a chunk; depends on the device and on d and n alone, not on batch and length."""
    return min(max(_chunk_states(u) // max(A.shape[0] * A.shape[1], 1), SHORTEST_CHUNK), LONGEST_CHUNK)


def rows_at_once(u: Tensor, A: Tensor, length: int) -> int:
    """Rows of the batch in a chunk."""
    positions = min(chunk_length(u, A), length)
    return max(_chunk_states(u) // max(positions * A.shape[0] * A.shape[1], 1), 1)


def checkpoint_shape(u: Tensor, A: Tensor, groups: int, n_seqs: int | None, gated: bool = False) -> tuple[int, ...]:
    """Shape of what the forward keeps: one state for each chunk; packed sequences run the forward again instead.

    Whether there is a gate makes no difference.
    """
    if n_seqs is not None:
        return (0,)
    chunks = -(-u.shape[1] // chunk_length(u, A))
    return (chunks, u.shape[0], groups, A.shape[1], A.shape[0] // groups)


class Workspace:
    """What all chunks of one call share: A as they need it, and memory that each of them uses anew."""

    def __init__(self, call: ScanCall) -> None:
        self.A = by_state(call.A, call.B.shape[2]).contiguous()  # (g, n, r)
        self._flat: dict[str, Tensor] = {}
        self._states: dict[tuple[str, tuple[int, ...]], States] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> "States":
        """Uninitialised memory; what was taken before by this name is lost."""
        found = self._states.get((name, shape))
        if found is None:
            size = prod(shape)
            flat = self._flat.get(name)
            if flat is None or flat.numel() < size:
                flat = self._flat[name] = self.A.new_empty(size)
            whole = flat[:size].view(shape)
            found = self._states[name, shape] = States(whole, whole.unbind(0))
        return found


class States(NamedTuple):
    """States of a chunk, whole and by position: making a view costs a third of a step of the recurrence."""

    whole: Tensor  # (t, b, g, n, r)
    steps: tuple[Tensor, ...]  # t of (b, g, n, r)


def by_state(states: Tensor, groups: int) -> Tensor:
    """(..., d, n) as (..., g, n, r)."""
    d = states.shape[-2]
    return states.unflatten(-2, (groups, d // groups)).transpose(-1, -2)


def by_channel(states: Tensor) -> Tensor:
    """(..., g, n, r) as (..., d, n)."""
    return states.transpose(-1, -2).flatten(-3, -2)


@dataclass
class Chunk:
    """One chunk's positions in scan order, absent ones neutralised."""

    u: Tensor  # (t, b, d)
    raw: Tensor  # (t, b, d) step before softplus
    dt: Tensor  # (t, b, d)
    x: Tensor  # (t, b, d) dt u
    B: Tensor  # (t, b, g, n)
    C: Tensor  # (t, b, g, n)
    z: Tensor | None  # (t, b, d)
    present: Tensor | None  # (t, b, 1)
    decay: States
    h: States


def over_states(channels: Tensor, groups: int) -> Tensor:
    """(t, b, d) as (t, b, g, 1, r), to meet states."""
    return channels.unflatten(2, (groups, channels.shape[2] // groups)).unsqueeze(3)


def contract(states: Tensor, projection: Tensor) -> Tensor:
    """Sum over the state: (t, b, g, n, r) with (t, b, g, n) to (t, b, d)."""
    return (projection.unsqueeze(3) @ states).flatten(2)


def spread(states: Tensor, channels: Tensor) -> Tensor:
    """Sum over the channels of each group: (t, b, g, n, r) with (t, b, d) to (t, b, g, n)."""
    return (over_states(channels, states.shape[2]) @ states.transpose(-1, -2)).squeeze(3)


def fill_outer(channels: Tensor, projection: Tensor, into: Tensor) -> None:
    """Products of (t, b, d) and (t, b, g, n) in `into` (t, b, g, n, r)."""
    torch.mul(over_states(channels, into.shape[2]), projection.unsqueeze(4), out=into)


def select(present: Tensor | None, x: Tensor) -> Tensor:
    """(t, b, ...), zero where absent."""
    if present is None:
        return x
    return torch.where(present.reshape(*present.shape[:2], *[1] * (x.dim() - 2)), x, 0)


def pick(x: Tensor, where: slice, reverse: bool, present: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Positions `where` of (b, l, ...) as (t, b, ...) in scan order, absent ones zero."""
    piece = x[:, where].transpose(0, 1).to(dtype)
    return select(present, piece.flip(0) if reverse else piece)


def form(call: ScanCall, work: Workspace, where: slice, state: Tensor) -> Chunk:
    """Form a chunk and run the recurrence through it from `state` (b, g, n, r)."""
    dtype, reverse = call.A.dtype, call.reverse
    present = None
    if call.mask is not None:
        present = call.mask[:, where].transpose(0, 1)[..., None]
        present = present.flip(0) if reverse else present
    u, raw, B, C = (pick(x, where, reverse, present, dtype) for x in (call.u, call.delta, call.B, call.C))
    z = None if call.z is None else pick(call.z, where, reverse, present, dtype)
    if call.delta_bias is not None:
        raw = raw + call.delta_bias
    dt = select(present, F.softplus(raw, threshold=SOFTPLUS_THRESHOLD) if call.delta_softplus else raw)
    x = dt * u
    shape = (*B.shape, work.A.shape[2])
    decay, h = work.take("decay", shape), work.take("h", shape)
    torch.mul(over_states(dt, B.shape[2]), work.A, out=decay.whole).exp_()
    if present is not None:
        # 0 A is not 0 where A is infinite.
        decay.whole.masked_fill_(~present[..., None, None], 1)
    fill_outer(x, B, h.whole)
    # h_t = decay_t h_{t-1} + x_t, in place.
    for h_t, decay_t in zip(h.steps, decay.steps, strict=True):
        state = h_t.addcmul_(decay_t, state)
    return Chunk(u, raw, dt, x, B, C, z, present, decay, h)
