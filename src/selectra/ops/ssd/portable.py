"""Mamba-2's recurrence in plain PyTorch: chunks of matrix products in the compute type, any device."""

import torch
from torch import Tensor

from selectra.ops.ssd import chunks
from selectra.ops.ssd.call import SsdCall

CHUNK = 64


def refuse(call: SsdCall) -> str | None:
    """Never refuses."""
    return None


def forward(call: SsdCall) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    return chunks.forward(call, chunk_length(call), call.compute_dtype, INNER)


def backward(call: SsdCall, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients of x, dt, A, B, C and the initial state, in the compute type."""
    return chunks.backward(call, dy, dfinal, chunk_length(call), call.compute_dtype, INNER)


def chunk_length(call: SsdCall) -> int:
    """Positions of a chunk: a short call is one."""
    return min(CHUNK, call.x.shape[1])


def pass_states(
    added: Tensor, across: Tensor, first: Tensor | None, reverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The states before all chunks, one after the other, and that after the last."""
    state = torch.zeros_like(added[:, 0]) if first is None else first
    before = torch.empty_like(added, dtype=dtype)
    c = added.shape[1]
    for k in reversed(range(c)) if reverse else range(c):
        before[:, k] = state
        state = torch.addcmul(added[:, k], state, across[:, k, :, None, None])
    return before, state


def decays(s: Tensor, seen: Tensor | None) -> Tensor:
    """`K_ij = exp(s_i - s_j)` for what i sees, (r, h, q, q)."""
    q = s.shape[-1]
    causal = torch.ones(q, q, dtype=torch.bool, device=s.device).tril()
    unseen = ~causal if seen is None else ~(seen & causal)[:, None]
    # Masked before the exponential: above the diagonal it would overflow.
    return (s[..., :, None] - s[..., None, :]).masked_fill_(unseen, -torch.inf).exp_()


def weigh(scores: Tensor, s: Tensor, dt: Tensor, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`G K dt`."""
    weights = _by_group(decays(s, seen).mul_(dt[..., None, :]), scores)
    return weights.mul_(scores[:, :, None]).flatten(1, 2).to(dtype)


def weigh_back(
    products: Tensor, scores: Tensor, s: Tensor, dt: Tensor, seen: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """`G K`, dG, and the sums of `P G dt` and of `P G`."""
    weights = decays(s, seen)
    found = products.mul_(weights)
    dscores = (_by_group(found, scores) * _by_group(dt, scores)[..., None, :]).sum(2)
    _by_group(found, scores).mul_(scores[:, :, None])
    rows, columns = (found @ dt[..., None])[..., 0], found.sum(-2)
    _by_group(weights, scores).mul_(scores[:, :, None])
    return weights.to(dtype), dscores.to(dtype), rows, columns


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products over each head's numbers."""
    return (a * b).sum(-1)


def join(a: Tensor, weights: Tensor, b: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(a weights + b) scale`."""
    found = a.mul_(weights[..., None]).add_(b.transpose(1, 2))
    return (found if scale is None else found.mul_(scale[..., None])).to(dtype)


def _by_group(x: Tensor, scores: Tensor) -> Tensor:
    """(r, h, ...) as (r, g, heads of a group, ...)."""
    return x.unflatten(1, (scores.shape[1], -1))


INNER = chunks.Inner(pass_states, weigh, weigh_back, dot, join)
