"""HyperAttention: attention whose cost grows almost linearly, Han et al. 2023, arXiv:2310.05869.

Above a length, keys and queries are sorted by a hash that puts alike ones side by side (Alg. 1); each block of the
sorted queries sees its block of keys exactly, and all other keys through a uniform sample (Alg. 2). Causal attention
halves the sequence: each half by itself, and the second half's view of the first (Alg. 4).

Source: github.com/insuhan/hyper-attn, as xT has it: `hyper_attn/attention/hyper_attn.py`.

Outside of training the sample is fixed by a seed, the same for every image of a batch; so are the hash's directions,
always. The same image then gives the same at every call, and after saving and loading. In training samples are drawn
anew at every call, by torch's generator.

Departures: the official code draws directions when it is built, without saving them, and samples at every call, in
evaluation too, so that its results change from call to call; the last block may be shorter here, where the official
code pads or drops what does not fill one; the official code hides sampled keys that a block has seen by their place
among unsorted keys, here by their sorted place.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers.fixed import fixed_normal, fixed_numbers
from selectra.mixers.sizes import require_sizes


class Weighted(NamedTuple):
    """Attention's output, and the logarithm of the sum that it was divided by."""

    y: Float[Tensor, "b h l p"]
    log_sum: Float[Tensor, "b h l 1"]


def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Weighted:
    """Exact attention of (..., l, p) to (..., m, p); `hidden` is True where nothing is seen."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    log_sum = scores.logsumexp(-1, keepdim=True)
    # A row that sees nothing has no weights.
    weights = torch.where(log_sum == -math.inf, 0.0, (scores - log_sum).exp())
    return Weighted(weights.to(v.dtype) @ v, log_sum)


def added(one: Weighted, other: Weighted) -> Weighted:
    """Attention to the keys of both."""
    log_sum = torch.logaddexp(one.log_sum, other.log_sum)
    shares = [torch.where(log_sum == -math.inf, 0.0, (each.log_sum - log_sum).exp()) for each in (one, other)]
    return Weighted(shares[0].to(one.y.dtype) * one.y + shares[1].to(one.y.dtype) * other.y, log_sum)


class HyperAttention(nn.Module):
    """Causal multi-head attention, exact up to a length and approximate above it.

    Args:
        d_model: Width.
        n_heads: Heads, each of `d_model / n_heads` channels.
        exact_up_to: Positions up to which attention is exact.
        block_size: Sorted keys that a block of queries sees exactly.
        sample_size: Keys that stand for all others.
        n_projections: Bits of the hash.
        seed: Of the hash's directions, and of the sample outside of training.
    """

    def __init__(
        self, d_model: int, n_heads: int, exact_up_to: int = 4096, block_size: int = 256, sample_size: int = 256,
        n_projections: int = 7, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        require_sizes(d_model=d_model, n_heads=n_heads, block_size=block_size, sample_size=sample_size)
        if d_model % n_heads:
            raise ConfigError(f"n_heads={n_heads} must divide d_model={d_model}")
        self.n_heads, self.exact_up_to = n_heads, max(exact_up_to, block_size)
        self.block_size, self.sample_size = block_size, sample_size
        self.n_projections, self.seed = n_projections, seed
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "b l d"], queries: int | None = None) -> Float[Tensor, "b q d"]:
        """Mix positions; each sees itself and those before it.

        Args:
            x: The sequence.
            queries: How many of the last positions are asked for; all by default.
        """
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # b h l p
        count = x.shape[1] if queries is None else queries
        if x.shape[1] <= self.exact_up_to:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = self.causal(q, k, v).y
        return self.proj(y[:, :, -count:].transpose(1, 2).flatten(2))

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Weighted:
        """Halves by themselves, and the second one's view of the first."""
        n = q.shape[2]
        if n <= self.exact_up_to:
            hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            return plain(q, k, v, hidden)
        half = n // 2
        first = self.causal(*(each[:, :, :half] for each in (q, k, v)))
        second = self.causal(*(each[:, :, half:] for each in (q, k, v)))
        second = added(second, self.seen_all(q[:, :, half:], k[:, :, :half], v[:, :, :half]))
        return Weighted(*(torch.cat(pair, 2) for pair in zip(first, second, strict=True)))

    def seen_all(self, q: Tensor, k: Tensor, v: Tensor) -> Weighted:
        """Every query sees every key: its own block exactly, the others by a sample."""
        size, n = self.block_size, k.shape[2]
        if n <= max(size, self.exact_up_to // 2):
            return plain(q, k, v)
        q_order, k_order = (self.hashed(each).argsort(dim=2, stable=True) for each in (q, k))
        q, k, v = _taken(q, q_order), _taken(k, k_order), _taken(v, k_order)
        n_blocks = -(-n // size)
        rows = -(-q.shape[2] // n_blocks)
        blocks = [
            plain(*(q[:, :, i * rows : (i + 1) * rows], *(each[:, :, i * size : (i + 1) * size] for each in (k, v))))
            for i in range(n_blocks)
            if i * rows < q.shape[2]
        ]
        near = Weighted(*(torch.cat(parts, 2) for parts in zip(*blocks, strict=True)))
        sample = self.sample(n, k.shape[0], k.shape[1], k.device)
        own = torch.arange(q.shape[2], device=q.device) // rows
        hidden = own[:, None] == (sample // size)[:, :, None, :]
        far = plain(q, _taken(k, sample), _taken(v, sample), hidden)
        # Each sampled key stands for as many as there are, less those of the block, over those that are seen.
        seen = (~hidden).sum(-1, keepdim=True).clamp(min=1)
        far = far._replace(log_sum=far.log_sum + ((n - size) / seen).log())
        both = added(near, far)
        back = q_order.argsort(dim=2, stable=True)
        return Weighted(_taken(both.y, back), _taken(both.log_sum, back))

    def sample(self, n: int, batch: int, heads: int, device: torch.device) -> Int64[Tensor, "batch heads m"]:
        """Which of `n` keys stand for all, one set a head."""
        if self.training:
            return torch.randint(n, (batch, heads, self.sample_size), device=device)
        # Directions have the seed itself; what an image gives does not depend on its place in the batch.
        drawn = fixed_numbers(heads * self.sample_size, self.seed + 2**16, device) % n
        return drawn.view(1, heads, -1).expand(batch, -1, -1)

    def directions(self, d_head: int, device: torch.device) -> Float[Tensor, "d_head bits"]:
        """Of the hash; made from the seed, so that no file has to hold them."""
        return fixed_normal(d_head, self.n_projections, self.seed, device)

    def hashed(self, x: Float[Tensor, "b h l p"]) -> Tensor:
        """Numbers of cells, of which neighbours in order differ in one projection's sign (a Gray code)."""
        bits = (x @ self.directions(x.shape[-1], x.device).to(x.dtype)) > 0
        code = torch.zeros(bits.shape[:-1], dtype=torch.long, device=x.device)
        last = torch.zeros_like(bits[..., 0])
        for i in range(bits.shape[-1]):
            last = last ^ bits[..., i]
            code = 2 * code + last
        return code


def _taken(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))
