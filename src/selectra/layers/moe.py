"""Mixture of experts: every token goes through the few perceptrons that a router chooses for it.

All experts' products are one grouped product over tokens sorted by expert; no token is dropped.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError


class Balance(NamedTuple):
    """How evenly routers spread tokens."""

    loss: Float[Tensor, ""]
    """The load-balancing loss: `top_k` where experts are used evenly, more otherwise. Carries a gradient."""
    use: Float[Tensor, " e"]
    """Share of all choices that fell on each expert, summing to 1; without gradient."""


class Routing(NamedTuple):
    """What routers chose, summed over tokens: sums of parts of a batch are sums of the batch."""

    hits: Float[Tensor, " e"]
    """How often each expert was chosen; without gradient."""
    probabilities: Float[Tensor, " e"]
    """Each expert's probabilities. Carries a gradient."""
    rows: Float[Tensor, ""]
    """How many tokens."""

    def balance(self, top_k: int) -> Balance:
        """How evenly that is; `top_k` are the choices of a token."""
        rows, n_experts = self.rows.clamp(min=1), len(self.hits)
        loss = n_experts * (self.hits / rows * (self.probabilities / rows)).sum()
        return Balance(loss, self.hits / (rows * top_k))


class Experts(nn.Module):
    """The experts' weights, fused as Hugging Face's version 5 keeps them.

    Args:
        d_model: Width.
        d_ff: Inner width of an expert.
        n_experts: How many.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        for weight in (self.gate_up_proj, self.down_proj):
            # As PyTorch starts linear maps, expert by expert.
            nn.init.uniform_(weight, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)

    def forward(
        self, x: Float[Tensor, "t d"], chosen: Int[Tensor, "t k"], weights: Float[Tensor, "t k"]
    ) -> Float[Tensor, "t d"]:
        """The weighted sum of the chosen experts' outputs."""
        top_k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        ends = counts_of(chosen, self.n_experts).cumsum(0).to(torch.int32)
        token = order // top_k
        gate, up = grouped_product(x[token], self.gate_up_proj, ends).chunk(2, dim=-1)
        y = grouped_product(F.silu(gate) * up, self.down_proj, ends)
        y = y * weights.flatten()[order, None].to(y.dtype)
        # Back in the tokens' order, then summed over the choices: no additions in an order left to chance.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return y[back].unflatten(0, (-1, top_k)).sum(1)


class MoE(nn.Module):
    """A layer of experts behind a router: softmax over all of them, the best `top_k`, weights not renormalised.

    Lieber et al. 2024, "Jamba", arXiv:2403.19887, Sec. 2, in Hugging Face's exact form.

    Args:
        d_model: Width.
        d_ff: Inner width of an expert.
        n_experts: How many experts.
        top_k: How many a token goes through.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int = 16, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ConfigError(f"top_k={top_k}: needs at least 1 and at most n_experts={n_experts}")
        self.n_experts, self.top_k = n_experts, top_k
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = Experts(d_model, d_ff, n_experts)

    def forward(self, x: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "t e"]]:
        """The mixture's output, and the router's logits of every token, in the order of the flattened input."""
        flat = x.flatten(0, -2)
        logits = self.router(flat)
        weights, chosen = routing(logits).topk(self.top_k, dim=-1)
        return self.experts(flat, chosen, weights.to(x.dtype)).view(x.shape), logits


def routing(logits: Float[Tensor, "t e"]) -> Float[Tensor, "t e"]:
    """The router's probabilities, in float32 at least."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def counts_of(chosen: Int[Tensor, "t k"], n_experts: int) -> Int[Tensor, " e"]:
    """How often each expert was chosen; the host does not wait for a GPU."""
    flat = chosen.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def grouped_product(
    x: Float[Tensor, "t i"], weight: Float[Tensor, "e o i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "t o"]:
    """Rows of x, sorted by group, times the transposed weight of their group; `ends` are the groups' ends.

    PyTorch's grouped kernel for half precision on a GPU, which keeps the host from waiting; other types there as one
    batch of products padded to the longest group; on a CPU segment by segment, where only what is used is read.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if not x.is_cuda:
        return _by_segments(x, weight, ends)
    # Its rows must start at multiples of 16 bytes.
    if x.dtype in (torch.bfloat16, torch.float16) and all(size % 8 == 0 for size in weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=ends)
    return padded_product(x, weight, ends)


def _by_segments(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    borders = [0, *ends.tolist()]
    parts = [
        F.linear(x[start:end], weight[group]) for group, (start, end) in enumerate(pairwise(borders)) if end > start
    ]
    return torch.cat(parts) if parts else F.linear(x, weight[0])


def padded_product(
    x: Float[Tensor, "t i"], weight: Float[Tensor, "e o i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "t o"]:
    """`grouped_product` as one batch of products over groups that are padded to the longest."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    longest = int(counts.max())
    group = torch.searchsorted(ends, torch.arange(len(x), dtype=ends.dtype, device=x.device), right=True)
    row = torch.arange(len(x), device=x.device) - (ends - counts)[group]
    padded = x.new_zeros(len(ends), longest, x.shape[1]).index_put((group, row), x)
    return torch.bmm(padded, weight.mT)[group, row]


def routing_of(
    router_logits: Sequence[Float[Tensor, "t e"]], top_k: int, mask: Bool[Tensor, "b l"] | None = None
) -> Routing:
    """What all layers' routers chose.

    Args:
        router_logits: Of every layer with experts.
        top_k: Choices of a token.
        mask: True where a token is present; others do not count.

    Raises:
        ConfigError: There are no router logits.
    """
    if not router_logits:
        raise ConfigError("there are no router logits: the model has no layer with experts.")
    # Layers one below the other: all have the same tokens.
    probabilities = routing(torch.cat(list(router_logits)))
    chosen = probabilities.topk(top_k, dim=-1).indices
    present = probabilities.new_ones(len(probabilities))
    if mask is not None:
        present = mask.flatten().repeat(len(router_logits)).to(probabilities.dtype)
    hits = present.new_zeros(probabilities.shape[1])
    hits = hits.scatter_add_(0, chosen.flatten(), present.repeat_interleave(top_k))
    return Routing(hits, (probabilities * present[:, None]).sum(0), present.sum())


def balance(
    router_logits: Sequence[Float[Tensor, "t e"]], top_k: int, mask: Bool[Tensor, "b l"] | None = None
) -> Balance:
    """The load-balancing loss over all layers together, as Hugging Face's `load_balancing_loss_func` counts it.

    Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, Eq. 4-6: n_experts times the sum over experts of their
    share of the tokens and their mean probability. All `top_k` choices count, so that even use gives `top_k`, not 1.

    Args:
        router_logits: Of every layer with experts.
        top_k: Choices of a token.
        mask: True where a token is present; others do not count.

    Raises:
        ConfigError: There are no router logits.
    """
    return routing_of(router_logits, top_k, mask).balance(top_k)
