"""Stochastic depth and scales of branches."""

import pytest
import torch

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, LayerScale, rising_rates


def test_branches_are_left_out_for_whole_elements_and_keep_their_mean():
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, torch.where(kept[:, None, None], torch.tensor(4 / 3), torch.tensor(0.0)).expand_as(x))
    assert 0.72 < kept.float().mean() < 0.78
    assert drop.eval()(x) is x and DropPath(0.0)(x) is x


def test_types_are_kept():
    assert DropPath(0.5)(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rates_rise_in_equal_steps():
    assert rising_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert rising_rates(0.3, 1) == [0.0]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_are_checked(rate):
    with pytest.raises(ConfigError, match=f"drop_path={rate}"):
        DropPath(rate)


def test_a_scale_for_every_channel():
    scale, x = LayerScale(3, 0.1), torch.randn(2, 5, 3)
    assert torch.allclose(scale(x), 0.1 * x)
    scale(x).sum().backward()
    assert scale.gamma.grad is not None and torch.allclose(scale.gamma.grad, x.sum((0, 1)), atol=1e-5)
