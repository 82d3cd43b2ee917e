"""RWKV-4's mean of values, whose weights decay with distance: in chunks, or as a selective scan of one state.

Peng et al. 2023, "RWKV", arXiv:2305.13048, Eq. 16 and Appendix D. Glossary: k keys, v values, w decay, u bonus.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selectra.ops import selective_scan
from selectra.ops.whole import require_whole

CHUNK = 32
# The largest exponent so far, before the first position: what it multiplies is 0.
NOTHING = -1e30
# Positions that are scanned in one go, and the least step: the scale of sums runs ahead of them by no more than the
# product, e^16, and no step is so small that dividing by it costs digits.
LONGEST, LEAST = 4096, 2.0**-8

Sums = tuple[Float[Tensor, "b d"], Float[Tensor, "b d"], Float[Tensor, "b d"]]


def wkv(
    k: Float[Tensor, "b l d"],
    v: Float[Tensor, "b l d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    sums: Sums,
    mask: Bool[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Sums]:
    """The weighted mean of values, Eq. 16; at least in float32.

    On a GPU, where whole sequences are long enough, by `selective_scan`; elsewhere in chunks.

    Args:
        k: Keys, exponents of weights.
        v: Values.
        w: What a weight's exponent loses a position; positive.
        u: What the current position's exponent is raised by.
        sums: `num`, `den` and `top` of the state.
        mask: True where a position is present; others pass the sums on unchanged.

    Returns:
        The means, and the sums after the last position.
    """
    require_whole("RWKV's mean")
    if k.is_cuda and mask is None and k.shape[1] > CHUNK:
        return wkv_scanned(k, v, w, u, sums)
    return wkv_chunked(k, v, w, u, sums, mask)


def wkv_chunked(
    k: Float[Tensor, "b l d"],
    v: Float[Tensor, "b l d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    sums: Sums,
    mask: Bool[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Sums]:
    """`wkv` in chunks: inside one a softmax, between them the sums."""
    outputs = []
    # Autocast would round the sums.
    with torch.autocast(k.device.type, enabled=False):
        for start in range(0, k.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            y, sums = _wkv_chunk(k[:, part], v[:, part], w, u, sums, None if mask is None else mask[:, part])
            outputs.append(y)
    return torch.cat(outputs, 1) if outputs else v, sums


def _wkv_chunk(k: Tensor, v: Tensor, w: Tensor, u: Tensor, sums: Sums, mask: Tensor | None) -> tuple[Tensor, Sums]:
    num, den, top = sums
    t = torch.arange(k.shape[1], device=k.device)
    # Present positions up to and with each one: what is absent takes no time.
    age = (t + 1)[None] if mask is None else mask.cumsum(1)
    absent = None if mask is None else ~mask
    # Exponent of position j at position i: k_j - (i - 1 - j) w for earlier ones, k_i + u for itself.
    exponents = k[:, None] - (age[:, :, None] - 1 - age[:, None])[..., None] * w  # b i j d
    exponents = torch.where((t[:, None] == t)[..., None], (k + u)[:, None], exponents)
    exponents = exponents.masked_fill((t[:, None] < t)[..., None], -torch.inf)
    if absent is not None:
        exponents = exponents.masked_fill(absent[:, None, :, None], NOTHING)
    carried = top[:, None] - (age - 1).clamp(min=0)[..., None] * w  # b i d
    # Any number as large as the largest exponent will do: its own gradient is nothing.
    peak = torch.maximum(exponents.detach().amax(2), carried.detach())
    weights, old = (exponents - peak[:, :, None]).exp(), (carried - peak).exp()
    above = torch.einsum("bijd,bjd->bid", weights, v) + old * num[:, None]
    below = weights.sum(2) + old * den[:, None]
    # The sums after the last position.
    last = k - (age[:, -1:] - age)[..., None] * w  # b j d
    if absent is not None:
        last = last.masked_fill(absent[..., None], NOTHING)
    carried = top - age[:, -1:] * w
    after = torch.maximum(last.detach().amax(1), carried.detach())
    weights, old = (last - after[:, None]).exp(), (carried - after).exp()
    if absent is not None:
        # Where all that a row had so far is padding, both exponents are nothing and the weights one.
        weights = weights.masked_fill(absent[..., None], 0)
    return above / below, ((weights * v).sum(1) + old * num, weights.sum(1) + old * den, after)


def wkv_scanned(
    k: Float[Tensor, "b l d"], v: Float[Tensor, "b l d"], w: Float[Tensor, " d"], u: Float[Tensor, " d"], sums: Sums
) -> tuple[Float[Tensor, "b l d"], Sums]:
    """`wkv` by `selective_scan`: both sums, divided by a running scale, are its states.

    With a scale `e^m_t` near the largest weight so far, the sums `s_t = e^-w s_(t-1) + e^k_t v_t` become
    `s'_t = e^-step_t s'_(t-1) + e^(k_t - m_t) v_t` with `step_t = w + m_t - m_(t-1)`: a scan with A = -1. The scale is
    `m_t = max(m_(t-1) - w + least, k_t)`, so that every step is above zero, and it is a maximum over all positions.
    """
    outputs = []
    for start in range(0, k.shape[1], LONGEST):
        part = slice(start, start + LONGEST)
        y, sums = _wkv_scan(k[:, part], v[:, part], w, u, sums)
        outputs.append(y)
    return torch.cat(outputs, 1) if outputs else v, sums


def _wkv_scan(k: Tensor, v: Tensor, w: Tensor, u: Tensor, sums: Sums) -> tuple[Tensor, Sums]:
    num, den, top = sums
    start, scale = _scales(k, w, top)
    before = torch.cat([start[:, None], scale[:, :-1]], 1)
    steps = w + (scale - before).to(k.dtype)
    share = (k - scale.to(k.dtype)).exp() / steps
    old = (top - start.to(k.dtype)).exp()
    first = torch.cat([num * old, den * old], 1)[..., None]
    same = k.new_ones(1, 1, 1).expand(*k.shape[:2], 1)
    found, last = selective_scan(
        torch.cat([share * v, share], -1), torch.cat([steps, steps], -1), -k.new_ones(2 * k.shape[2], 1), same, same,
        initial_state=first, return_final_state=True,
    )  # fmt: skip
    above, below = torch.cat([first[:, None, :, 0], found[:, :-1]], 1).chunk(2, -1)
    # The position itself comes in with its bonus; the larger exponent of the two becomes 0.
    own, before = u + k, before.to(k.dtype)
    peak = torch.maximum(own.detach(), before)
    own, old = (own - peak).exp(), (before - peak).exp()
    y = (old * above + own * v) / (old * below + own)
    num, den = last[..., 0].chunk(2, -1)
    # The scale is brought back to the sum itself, so that it cannot run ahead for ever.
    size = den.detach()
    return y, (num / size, den / size, scale[:, -1].to(k.dtype) + size.log())


@torch.no_grad()
def _scales(k: Tensor, w: Tensor, top: Tensor) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b l d"]]:
    """The scale's exponent before the first position and at every one. In float64: positions times decays are large."""
    k, fall = k.double(), w.double() - LEAST
    start = torch.maximum(top.double(), k[:, 0])
    fallen = torch.arange(1, k.shape[1] + 1, device=k.device)[:, None] * fall
    largest = (k + fallen).cummax(1).values
    return start, torch.maximum(largest, start[:, None]) - fallen
