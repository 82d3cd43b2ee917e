"""Mamba-2's recurrence as products of matrices for all chunks at once, with its own backward.

Dao and Gu 2024, arXiv:2405.21060, Sec. 6. With `s_i` the sum of `dt A` over a chunk up to position i, `S` that of the
whole chunk, and H the state before it, (p, n):

    G_ij = C_i . B_j        K_ij = exp(s_i - s_j), 0 for j > i        (shared by a group's heads; of each head)
    y_i  = sum over j of G_ij K_ij dt_j x_j + exp(s_i) H C_i
    H'   = exp(S) H + sum over j of exp(S - s_j) dt_j x_j B_j'

With dy_i given and D the adjoint of H', which runs through the chunks backwards as H runs forwards:

    D    -> exp(S) D + sum over i of exp(s_i) dy_i C_i'               adjoint of H
    x'_j = sum over i of G_ij K_ij dy_i + exp(S - s_j) D B_j          dx_j = dt_j x'_j
    P_ij = K_ij dy_i . x_j
    ddt_j = sum over i of P_ij G_ij + exp(S - s_j) x_j . D B_j        besides what comes through s
    dG_ij = sum over the group's heads of P_ij dt_j
    dC_i = sum over j of dG_ij B_j + sum over heads of exp(s_i) H' dy_i;   dB_j alike
    ds_i = sum over j of P_ij G_ij dt_j - (the same summed over its first index, at i) + exp(s_i) dy_i . H C_i
           - exp(S - s_i) dt_i x_i . D B_i
    dS   = sum over i of that last product + exp(S) <D, H>

Only chunks' states are handed on, H and the matrices of a chunk are formed again in the backward: beside inputs and
outputs nothing is kept. A chunk's matrices of scores are made for as many chunks at once as fit into `ROOM` bytes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selectra.ops.ssd.call import SsdCall

# Bytes of one head-by-head matrix of scores at a time, in the compute type.
ROOM = 1 << 28


class Inner(NamedTuple):
    """What a backend does its own way: all that is no product of matrices."""

    pass_states: Callable[[Tensor, Tensor, Tensor | None, bool, torch.dtype], tuple[Tensor, Tensor]]
    """From what chunks add to the state (b, c, h, p, n), what they leave of it (b, c, h), the first state and whether
    chunks come in reverse: the state before each, in a type, and that after all."""
    weigh: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    """From G (r, g, q, q), s and dt (r, h, q) and who is seen (r, q, q): G K dt, (r, h, q, q), in a type."""
    weigh_back: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], tuple[Tensor, ...]]
    """From dy . x (r, h, q, q), which may be overwritten, G, s, dt and who is seen: G K, dG, both in a type, and the
    sums of P G dt over its second index, and of P G over its first, (r, h, q)."""
    dot: Callable[[Tensor, Tensor], Tensor]
    """a . b over each head's numbers, (r, q, h, p) to (r, q, h)."""
    join: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    """`(a weights + b) scale` of a (r, q, h, p), which may be overwritten, and b (r, h, q, p), in a type."""


class Chunked(NamedTuple):
    """A call cut into r = b c chunks of q positions; a last short one is filled up with steps of 0."""

    x: Float[Tensor, "r q h p"]
    B: Float[Tensor, "r q g n"]
    C: Float[Tensor, "r q g n"]
    dt: Float[Tensor, "r q h"]
    s: Float[Tensor, "r q h"]
    seen: Bool[Tensor, "r q q"] | None
    from_start: Float[Tensor, "r q h"]
    """`exp(s_i)`: what a chunk's first state is at position i."""
    to_end: Float[Tensor, "r q h"]
    """`exp(S - s_j)`."""
    across: Float[Tensor, "b c h"]
    """`exp(S)`."""


def forward(call: SsdCall, q: int, dtype: torch.dtype, inner: Inner) -> tuple[Tensor, Tensor]:
    """y and the final state, in the compute type.

    Args:
        q: Positions of a chunk.
        dtype: Type of the products' factors; their sums have the compute type.
        inner: The rest.
    """
    chunked = _cut(call, q, dtype)
    added = _gathered(_weighed(chunked.x, chunked.to_end * chunked.dt, dtype), chunked.B, chunked)
    before, final = inner.pass_states(added, chunked.across, call.initial_state, False, dtype)
    y = _spread(chunked.C, before.flatten(0, 1))
    for part, piece in _slabs(chunked):
        weights = inner.weigh(_scores(piece), _by_head(piece.s), _by_head(piece.dt), piece.seen, dtype)
        inside = product(weights, piece.x.transpose(1, 2))
        joined = inner.join(y[part], piece.from_start, inside, None, y.dtype)
        if joined.data_ptr() != y[part].data_ptr():
            y[part] = joined
    batch, length = call.x.shape[:2]
    return y.view(batch, -1, *y.shape[2:])[:, :length], final


def backward(
    call: SsdCall, dy: Tensor, dfinal: Tensor | None, q: int, dtype: torch.dtype, inner: Inner
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, in `dtype`, and of dt, A, B, C and the initial state, in the compute type."""
    chunked = _cut(call, q, dtype)
    dy = _chunks(dy, q)
    x_end = _weighed(chunked.x, chunked.to_end * chunked.dt, dtype)
    added = _gathered(x_end, chunked.B, chunked)
    before, _ = inner.pass_states(added, chunked.across, call.initial_state, False, dtype)
    dy_start = _weighed(dy, chunked.from_start, dtype)
    added = _gathered(dy_start, chunked.C, chunked)
    after, dinitial = inner.pass_states(added, chunked.across, dfinal, True, dtype)
    before, after = before.flatten(0, 1), after.flatten(0, 1)
    dots = inner.dot(after.flatten(2)[:, None], before.flatten(2)[:, None])[:, 0]
    dB, dC = _folded(x_end, after, chunked), _folded(dy_start, before, chunked)
    ds = inner.dot(_spread(chunked.C, before), dy).mul_(chunked.from_start)
    outside = _spread(chunked.B, after)
    dx = torch.empty(outside.shape, dtype=dtype, device=outside.device)
    ddt = inner.dot(outside, chunked.x).mul_(chunked.to_end)
    through_end = ddt * chunked.dt
    ds -= through_end
    ds[:, -1] += through_end.sum(1) + dots * chunked.across.flatten(0, 1)
    dy = dy.to(dtype)
    for part, piece in _slabs(chunked):
        x, dy_heads = piece.x.transpose(1, 2), dy[part].transpose(1, 2)
        scores, dt = _scores(piece), _by_head(piece.dt)
        weights, dscores, rows, columns = inner.weigh_back(
            product(dy_heads, x.transpose(-1, -2)), scores, _by_head(piece.s), dt, piece.seen, dtype
        )
        inside = product(weights.transpose(-1, -2), dy_heads)
        dx[part] = inner.join(outside[part], piece.to_end, inside, piece.dt, dtype)
        dC[part] += product(dscores, piece.B.transpose(1, 2)).transpose(1, 2)
        dB[part] += product(dscores.transpose(-1, -2), piece.C.transpose(1, 2)).transpose(1, 2)
        ds[part] += (rows - columns * dt).transpose(1, 2)
        ddt[part] += columns.transpose(1, 2)
    ddecay = ds.flip(1).cumsum(1).flip(1)
    ddt += ddecay * call.A
    batch, length = call.x.shape[:2]
    dx, ddt, dB, dC = (grad.view(batch, -1, *grad.shape[2:])[:, :length] for grad in (dx, ddt, dB, dC))
    return dx, ddt, (ddecay * chunked.dt).sum((0, 1)), dB, dC, dinitial


def product(a: Float[Tensor, "*b i k"], b: Float[Tensor, "*b k j"]) -> Float[Tensor, "*b i j"]:
    """Products of matrices with sums in float32 or wider, also of bfloat16."""
    if a.dtype != torch.bfloat16:
        return (a @ b).contiguous()
    if not a.is_cuda:
        # Only there products have a type of their own.
        return a.float() @ b.float()
    flat = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), out_dtype=torch.float32)
    return flat.view(*a.shape[:-1], b.shape[-1])


def _cut(call: SsdCall, q: int, dtype: torch.dtype) -> Chunked:
    batch, c = call.x.shape[0], -(-call.x.shape[1] // q)
    x, B, C = (_chunks(tensor.to(dtype), q) for tensor in (call.x, call.B, call.C))
    dt = _chunks(call.dt, q).contiguous()
    s = (dt * call.A).cumsum(1)
    total = s[:, -1:]
    from_start, to_end = s.exp(), (total - s).exp()
    seen = None
    if call.sequence is not None:
        sequence = _chunks(call.sequence[..., None], q, "replicate")[..., 0]
        seen = sequence[:, :, None] == sequence[:, None]
        last = sequence[:, -1:]
        # Which sequence a chunk's first state is of. Indices never come back: no border lies between equal ones.
        handed = torch.cat([call.sequence[:, :1], last.view(batch, c)[:, :-1]], 1).view(-1, 1)
        from_start = from_start.masked_fill((sequence != handed)[..., None], 0)
        to_end = to_end.masked_fill((sequence != last)[..., None], 0)
    across = from_start[:, -1].view(batch, c, -1)
    return Chunked(x, B, C, dt, s, seen, from_start, to_end, across)


def _chunks(x: Tensor, q: int, fill: str = "zeros") -> Tensor:
    """(b, l, ...) to (b c, q, ...), without a copy where q divides l."""
    missing = -x.shape[1] % q
    if missing:
        last = x[:, -1:] if fill == "replicate" else x.new_zeros(())
        x = torch.cat([x, last.expand(x.shape[0], missing, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, q)).flatten(0, 1)


def _slabs(chunked: Chunked) -> Iterator[tuple[slice, Chunked]]:
    """The chunks in slabs whose matrices of scores fit into the room."""
    r, q, heads = chunked.s.shape
    size = max(ROOM // (heads * q * q * chunked.s.element_size()), 1)
    for start in range(0, r, size):
        part = slice(start, start + size)
        names = ("x", "B", "C", "dt", "s", "from_start", "to_end")
        changed = {name: getattr(chunked, name)[part] for name in names}
        seen = None if chunked.seen is None else chunked.seen[part]
        # `across` alone is not by chunk; nobody needs a slab's.
        yield part, chunked._replace(seen=seen, **changed)


def _by_head(x: Float[Tensor, "r q h"]) -> Float[Tensor, "r h q"]:
    return x.transpose(1, 2).contiguous()


def _scores(chunked: Chunked) -> Float[Tensor, "r g q q"]:
    return product(chunked.C.transpose(1, 2), chunked.B.permute(0, 2, 3, 1))


def _weighed(x: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Each head's vectors times a number, rounded once."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.mul(x, weights[..., None], out=out)


def _gathered(x: Tensor, by: Float[Tensor, "r q g n"], chunked: Chunked) -> Float[Tensor, "b c h p n"]:
    """Sums over a chunk of x_j (p) times its B_j or C_j (n): a group's heads in one product."""
    heads, p = x.shape[2:]
    groups, n = by.shape[2:]
    sums = product(x.unflatten(2, (groups, -1)).flatten(3).permute(0, 2, 3, 1), by.transpose(1, 2))
    batch, c = chunked.across.shape[:2]
    return sums.view(batch, c, heads, p, n)


def _spread(by: Float[Tensor, "r q g n"], states: Float[Tensor, "r h p n"]) -> Float[Tensor, "r q h p"]:
    """Each chunk's state times its C_i or B_i, a new tensor."""
    r, q, groups, n = by.shape
    heads, p = states.shape[1:3]
    found = product(by.transpose(1, 2), states.view(r, groups, -1, n).transpose(-1, -2))
    return found.transpose(1, 2).reshape(r, q, heads, p).contiguous()


def _folded(x: Float[Tensor, "r q h p"], states: Float[Tensor, "r h p n"], chunked: Chunked) -> Tensor:
    """Sums over a group's heads of x_i (p) times a chunk's state, (r, q, g, n)."""
    r, q, groups, n = chunked.B.shape
    found = product(x.view(r, q, groups, -1).transpose(1, 2), states.view(r, groups, -1, n))
    return found.transpose(1, 2).contiguous()
