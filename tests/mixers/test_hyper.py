"""HyperAttention: exact where it says so, near where it does not."""

import pytest
import torch
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers.fixed import fixed_normal
from selectra.mixers.hyper import HyperAttention, added, plain


def heads(n: int, b: int = 2, h: int = 2, p: int = 8) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(b, h, n, p).double() for _ in range(3))


def exact(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_halves_and_their_view_are_the_whole():
    """With blocks that hold all keys nothing is sampled, and the recursion is exact."""
    q, k, v = heads(50)
    attention = HyperAttention(16, 2, exact_up_to=8, block_size=8)
    attention.block_size = 64
    assert torch.allclose(attention.causal(q, k, v).y, exact(q, k, v), atol=1e-12)


def test_two_sets_of_keys_are_added():
    q, k, v = heads(20)
    both = added(plain(q, k[:, :, :7], v[:, :, :7]), plain(q, k[:, :, 7:], v[:, :, 7:]))
    assert torch.allclose(both.y, plain(q, k, v).y, atol=1e-12)
    nothing = plain(q, k, v, torch.ones(20, 20, dtype=torch.bool))
    assert torch.equal(nothing.y, torch.zeros_like(v)) and torch.equal(added(both, nothing).y, both.y)


def test_long_sequences_are_near_in_the_mean():
    """The sample is without bias in the sums: many draws come near the exact attention."""
    q, k, v = (each / 2 for each in heads(128, 1, 2))
    attention = HyperAttention(16, 2, exact_up_to=16, block_size=16, sample_size=32)
    draws = torch.stack([attention.causal(q, k, v).y for _ in range(60)])
    wanted = exact(q, k, v)
    error = (draws.mean(0) - wanted).norm() / wanted.norm()
    one = (draws[0] - wanted).norm() / wanted.norm()
    assert error < 0.1 and error < one < 0.6


@pytest.mark.parametrize("n", [17, 63, 64, 100])
def test_any_length_is_causal_and_gets_gradients(n):
    torch.manual_seed(1)
    attention = HyperAttention(16, 2, exact_up_to=16, block_size=8, sample_size=8)
    x = torch.randn(2, n, 16, requires_grad=True)
    torch.manual_seed(2)
    y = attention(x)
    assert y.shape == (2, n, 16) and y.isfinite().all()
    y.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad.abs().sum((0, 2)) > 0).all()
    later = x.detach().clone()
    later[:, n // 2 :] += 1
    torch.manual_seed(2)
    assert torch.allclose(attention(later)[:, : n // 2], y[:, : n // 2], atol=1e-5)


def test_evaluation_draws_nothing():
    """Calls, places in a batch and a loaded state change nothing; in training torch's generator decides."""
    torch.manual_seed(0)
    attention, x = HyperAttention(16, 2, exact_up_to=16, block_size=8, sample_size=8).eval(), torch.randn(3, 100, 16)
    before = torch.get_rng_state()
    with torch.no_grad():
        y = attention(x)
        assert torch.equal(attention(x), y) and torch.equal(torch.get_rng_state(), before)
        assert torch.allclose(attention(x[2:]), y[2:], atol=1e-6)
        loaded = HyperAttention(16, 2, exact_up_to=16, block_size=8, sample_size=8).eval()
        loaded.load_state_dict(attention.state_dict())
        assert torch.equal(loaded(x), y)
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(attention.train()(x))
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2], atol=1e-4)


def test_a_fixed_sample_is_as_near_as_a_drawn_one():
    q, k, v = (each / 2 for each in heads(128, 1, 2))
    wanted = exact(q, k, v)
    outputs = [
        HyperAttention(16, 2, exact_up_to=16, block_size=16, sample_size=32, seed=seed).eval().causal(q, k, v).y
        for seed in range(60)
    ]
    error = (torch.stack(outputs).mean(0) - wanted).norm() / wanted.norm()
    assert error < 0.1 and error < (outputs[0] - wanted).norm() / wanted.norm() < 0.6


def test_fixed_values_are_as_of_a_normal_distribution():
    cpu = torch.device("cpu")
    values, others = (fixed_normal(200, 50, seed, cpu) for seed in (0, 1))
    assert (
        abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03 and 0.66 < (values.abs() < 1).float().mean() < 0.71
    )
    assert abs((values * others).mean()) < 0.03 and torch.equal(values, fixed_normal(200, 50, 0, cpu))


def test_short_sequences_are_exact_and_the_last_can_be_asked_for():
    attention, x = HyperAttention(16, 2), torch.randn(1, 12, 16)
    q, k, v = attention.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    wanted = attention.proj(exact(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x), wanted, atol=1e-6)
    assert torch.allclose(attention(x, queries=3), wanted[:, -3:], atol=1e-6)


def test_neighbouring_cells_differ_in_one_sign():
    attention = HyperAttention(16, 2, n_projections=3)
    x = torch.randn(1, 2, 500, 8)
    codes = attention.hashed(x)
    bits = ((x @ attention.directions(8, x.device)) > 0)[0, 0].int()
    found = {int(code): bits[i] for i, code in enumerate(codes[0, 0])}
    for code in range(7):
        if code in found and code + 1 in found:
            assert (found[code] != found[code + 1]).sum() == 1


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="n_heads=3 must divide d_model=16"):
        HyperAttention(16, 3)
