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

from selectra.errors import ConfigError
from selectra.ops import checks
from selectra.ops.whole import require_whole

CHUNK = 64


def ssd(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    *,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    sequence: Int[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """Run the recurrence.

    Args:
        x: Input of every head.
        dt: Step, positive.
        A: Decay, real and usually negative.
        B: Input projection; head i belongs to group i // (h / g).
        C: Output projection, as B.
        initial_state: State before the first position.
        sequence: Which packed sequence a position belongs to; the state is not handed on from one to another. The
            initial state belongs to the first.

    Returns:
        y and the final state, both in the compute type: float32, or float64 where x is.

    Raises:
        ConfigError: A shape does not fit.
    """
    require_whole("the scan of Mamba-2")
    batch, length, heads, p = x.shape
    groups, n = _sizes(x, dt, A, B, C)
    dtype = checks.compute_dtype(x.dtype == torch.float64)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    # (b, g, heads of a group, ...): B and C are not repeated for the heads.
    each = heads // groups
    x = (x * dt[..., None]).unflatten(2, (groups, each))
    decay = (dt * A).unflatten(2, (groups, each))
    state = x.new_zeros(batch, groups, each, p, n) if initial_state is None else initial_state.to(dtype)
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


def _sizes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[int, int]:
    if x.dim() != 4 or B.dim() != 4:
        raise ConfigError(
            f"x has shape {tuple(x.shape)} and B {tuple(B.shape)}; they must be (b, l, h, p), (b, l, g, n)."
        )
    batch, length, heads, _ = x.shape
    groups, n = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ConfigError(f"B has {groups} groups; they must divide the {heads} heads.")
    checks.require_shape("dt", dt, (batch, length, heads), "(b, l, h)")
    checks.require_shape("A", A, (heads,), "(h,)")
    checks.require_shapes({"B": B, "C": C}, (batch, length, groups, n), "(b, l, g, n)")
    return groups, n


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
