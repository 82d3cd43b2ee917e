"""State-space duality, the recurrence of Mamba-2 with one decay a head: plain PyTorch in chunks of matrix products.

Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, Sec. 6 (the block decomposition). For every head, with
`a_t = exp(dt_t A)`:

    h_t = a_t h_{t-1} + dt_t x_t B_t'      (p, n)
    y_t = h_t C_t                          (p,)

Inside a chunk all outputs come from one masked matrix of scores; between chunks only the states are handed on. Any
length: the last chunk may be short. Memory grows with the length, not with its square.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectra.ops.ssd.call import SsdCall

CHUNK = 64


def refuse(call: SsdCall) -> str | None:
    """Takes what lies on a GPU, where the other forms are asked for by name."""
    return None if call.x.is_cuda else f"tensors are on {call.x.device.type}, it is for cuda"


def run(call: SsdCall) -> tuple[Tensor, Tensor]:
    """y and the final state, chunk after chunk; gradients are autograd's."""
    batch, length, heads, p = call.x.shape
    groups, n = call.B.shape[2:]
    dtype, dt, sequence = call.compute_dtype, call.dt, call.sequence
    x, B, C = (tensor.to(dtype) for tensor in (call.x, call.B, call.C))
    # (b, g, heads of a group, ...): B and C are not repeated for the heads.
    each = heads // groups
    x = (x * dt[..., None]).unflatten(2, (groups, each))
    decay = (dt * call.A).unflatten(2, (groups, each))
    state = x.new_zeros(batch, groups, each, p, n) if call.initial_state is None else call.initial_state
    state = state.reshape(batch, groups, each, p, n)
    before = None if sequence is None or not length else sequence[:, 0]
    outputs = []
    # As every operator: autocast rounds what comes in, and nothing inside.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, length, CHUNK):
            part = slice(start, start + CHUNK)
            of_part = None if sequence is None else sequence[:, part]
            y, state = _chunk(x[:, part], decay[:, part], B[:, part], C[:, part], state, of_part, before)
            before = None if of_part is None else of_part[:, -1]
            outputs.append(y)
    y = torch.cat(outputs, 1) if outputs else x
    return y.flatten(2, 3), state.reshape(batch, heads, p, n)


def _chunk(
    x: Float[Tensor, "b c g e p"],
    decay: Float[Tensor, "b c g e"],
    B: Float[Tensor, "b c g n"],
    C: Float[Tensor, "b c g n"],
    state: Float[Tensor, "b g e p n"],
    sequence: Int[Tensor, "b c"] | None,
    before: Int[Tensor, " b"] | None,
) -> tuple[Float[Tensor, "b c g e p"], Float[Tensor, "b g e p n"]]:
    """One chunk's outputs and the state after it."""
    total = decay.cumsum(1).permute(0, 2, 3, 1)  # (b, g, e, c): the decay from before the chunk to a position
    steps = x.shape[1]
    seen = torch.ones(steps, steps, dtype=torch.bool, device=x.device).tril()
    handed_on = None
    if sequence is not None and before is not None:
        seen = (seen & (sequence[:, :, None] == sequence[:, None, :]))[:, None, None]
        # No border between the chunk's start and a position: indices never come back.
        handed_on = (sequence == before[:, None])[:, None, None]
    # Masked before the exponential: above the diagonal it would overflow.
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    scores = torch.einsum("bign,bjgn->bgij", C, B)
    y = torch.einsum("bgij,bgeij,bjgep->bigep", scores, between, x)
    from_state = total.exp() if handed_on is None else total.exp().masked_fill(~handed_on, 0)
    y = y + torch.einsum("bign,bgepn,bgei->bigep", C, state, from_state)
    after = state * from_state[..., -1, None, None] + torch.einsum("bgej,bjgep,bjgn->bgepn", between[..., -1, :], x, B)
    return y, after
