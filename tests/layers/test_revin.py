"""Normalisation of windows: what goes in comes back, and gaps have no part in it."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from selectra.errors import ConfigError
from selectra.layers import missing, revin
from selectra.layers.missing import carry_forward, is_complete
from selectra.layers.revin import RevIN

MODES = pytest.mark.parametrize("mode", ["none", "last", "mean", "instance"])


def window() -> tuple[torch.Tensor, torch.Tensor]:
    x = 5 + 3 * torch.randn(4, 20, 3, dtype=torch.float64)
    return x, torch.rand(x.shape) > 0.4


@MODES
@pytest.mark.parametrize("affine", [False, True])
def test_the_inverse_gives_the_window_back(mode, affine):
    x, _ = window()
    layer = RevIN(3, mode, affine=affine, eps=1e-8).double()
    if affine:
        assert layer.weight is not None and layer.bias is not None
        torch.nn.init.normal_(layer.weight, 2.0)
        torch.nn.init.normal_(layer.bias)
    y, statistics = layer(x)
    assert torch.allclose(layer.inverse(y, statistics), x, atol=1e-6)
    quantiles = torch.stack([y, y + 1], -1)
    assert torch.allclose(layer.inverse(quantiles, statistics)[..., 0], x, atol=1e-6)


def test_instance_mode_gives_mean_0_and_deviation_1():
    y, _ = RevIN(3)(window()[0])
    assert y.mean(1).abs().max() < 1e-9 and (y.std(1, correction=0) - 1).abs().max() < 1e-4


def test_last_mode_subtracts_the_last_observed_value():
    x = torch.tensor([[[1.0], [4.0], [9.0]]])
    y, statistics = RevIN(1, "last")(x, torch.tensor([[[True], [True], [False]]]))
    assert y.flatten().tolist() == [-3, 0, 0] and statistics.shift.item() == 4 and statistics.scale.item() == 1


@MODES
def test_statistics_see_observed_values_alone(mode):
    x, observed = window()
    for i in range(4):
        for series in range(3):
            seen = observed[i, :, series]
            alone, expected = RevIN(1, mode)(x[i, seen, series][None, :, None])
            y, statistics = RevIN(3, mode)(x.masked_fill(~observed, math.nan), observed)
            assert torch.allclose(y[i, seen, series], alone.flatten())
            assert (y[~observed] == 0).all()
            assert torch.allclose(statistics.shift[i, 0, series], expected.shift.flatten())
            assert torch.allclose(statistics.scale[i, 0, series], expected.scale.flatten())


@MODES
def test_nothing_observed_is_finite(mode):
    x, observed = window()
    observed[:, :, 1] = False
    y, statistics = RevIN(3, mode)(x.masked_fill(~observed, math.nan), observed)
    assert y.isfinite().all()
    assert (statistics.shift[..., 1] == 0).all() and (statistics.scale[..., 1] == 1).all()


def test_statistics_carry_no_gradient():
    x = window()[0].requires_grad_()
    y, statistics = RevIN(3)(x)
    assert not statistics.shift.requires_grad and not statistics.scale.requires_grad
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, (1 / statistics.scale).expand_as(x))


def test_the_gradient_passes_the_scale_where_asked():
    x = window()[0].requires_grad_()
    layer = RevIN(3, scale_gradient=True)
    y, statistics = layer(x)
    assert not statistics.shift.requires_grad and statistics.scale.requires_grad
    y.square().sum().backward()
    # Without the shift's part, the sum of squares of what has deviation 1 does not depend on x but through the mean.
    assert x.grad is not None and x.grad.abs().max() < 1e-4


def test_revin_is_instance_with_a_gain_and_a_bias():
    x = window()[0]
    layer = RevIN(3, "revin").double()
    torch.nn.init.constant_(layer.weight, 2.0)  # pyright: ignore[reportArgumentType]
    torch.nn.init.constant_(layer.bias, 1.0)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(layer(x)[0], 2 * RevIN(3)(x)[0] + 1)
    assert list(RevIN(3, "revin").state_dict()) == ["weight", "bias"]


def test_an_unknown_mode_is_named():
    # The shape-checking hook, where it runs, refuses the value before the constructor does.
    with pytest.raises((ConfigError, TypeCheckError), match="'mean'"):
        RevIN(1, "median")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["none", "last", "mean", "instance", "revin"])
def test_a_window_that_is_known_to_be_complete_gives_the_same_bits(mode, monkeypatch):
    x, observed = torch.randn(3, 9, 2), torch.ones(3, 9, 2, dtype=torch.bool)
    norm = RevIN(2, mode)
    known, filled = norm(x, observed), carry_forward(x, observed)
    for module in (missing, revin):
        monkeypatch.setattr(module, "is_complete", lambda observed: observed is None)
    unknown = norm(x, observed)
    assert torch.equal(filled, x) and torch.equal(carry_forward(x, observed), x)
    for one, other in zip((known[0], *known[1]), (unknown[0], *unknown[1]), strict=True):
        assert torch.equal(one, other)


def test_completeness_is_not_asked_of_a_trace():
    observed = torch.ones(2, 4, 1, dtype=torch.bool)
    assert is_complete(observed) and is_complete(None) and not is_complete(observed.logical_not())
    assert not is_complete(observed.to("meta"))
    seen = []
    torch.func.vmap(lambda each: seen.append(is_complete(each)) or each)(observed)
    assert seen == [False]
