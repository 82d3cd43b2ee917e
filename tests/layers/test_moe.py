"""Mixtures of experts against a loop over tokens, and how their loss counts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers import moe
from selectra.layers.moe import MoE, balance, grouped_product, padded_product


def by_token(layer: MoE, x: Tensor) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for token in x.flatten(0, -2):
        probabilities = F.linear(token, layer.router.weight).softmax(-1)
        y = torch.zeros_like(token)
        for e in probabilities.argsort(descending=True)[: layer.top_k].tolist():
            gate, up = (layer.experts.gate_up_proj[e] @ token).chunk(2)
            # The weights of the chosen are not made to sum to 1.
            y = y + probabilities[e] * (layer.experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(("n_experts", "top_k", "tokens"), [(16, 2, 40), (3, 1, 7), (4, 4, 5), (5, 2, 1), (1, 1, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients_are_those_of_a_loop(monkeypatch, n_experts, top_k, tokens, padded):
    if padded:
        monkeypatch.setattr(moe, "grouped_product", padded_product)
    layer = MoE(6, 9, n_experts, top_k).double()
    x = torch.randn(tokens, 1, 6, dtype=torch.float64, requires_grad=True)
    inputs, weights = [x, *layer.parameters()], torch.randn(tokens, 1, 6, dtype=torch.float64)
    y, logits = layer(x)
    wanted = by_token(layer, x)
    assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-12) and logits.shape == (tokens, n_experts)
    found = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad((wanted * weights).sum(), inputs, allow_unused=True)
    for got, want in zip(found, expected, strict=True):
        assert torch.allclose(
            torch.zeros(()) if got is None else got, torch.zeros(()) if want is None else want, rtol=1e-10, atol=1e-12
        )


def test_groups_may_be_empty():
    x, weight = torch.randn(5, 3), torch.randn(4, 2, 3)
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    wanted = torch.cat([x[:3] @ weight[1].T, x[3:] @ weight[3].T])
    for product in (grouped_product, padded_product):
        assert torch.allclose(product(x, weight, ends), wanted, atol=1e-6)


def test_even_use_costs_top_k_and_one_expert_for_all_costs_more():
    even = 20 * torch.eye(4).repeat(5, 1) + 10 * torch.eye(4).roll(1, 1).repeat(5, 1)
    found = balance([even.double()], top_k=2)
    assert float(found.loss) == pytest.approx(2, abs=1e-3)
    assert found.use.tolist() == pytest.approx([0.25] * 4)
    lazy = torch.tensor([[9.0, 5.0, 0.0, 0.0]]).repeat(8, 1)
    found = balance([lazy], top_k=2)
    assert float(found.loss) == pytest.approx(4, abs=0.1) and found.use.tolist() == [0.5, 0.5, 0, 0]


def test_absent_tokens_and_layers_are_counted_as_one_pool():
    first, second = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    kept = mask.flatten()
    both = balance([first, second], 2, mask)
    alone = balance([first[kept], second[kept]], 2)
    assert torch.allclose(both.loss, alone.loss) and torch.allclose(both.use, alone.use)
    with pytest.raises(ConfigError, match="no layer with experts"):
        balance([], 2)
    with pytest.raises(ConfigError, match="top_k=3"):
        MoE(4, 4, 2, 3)
