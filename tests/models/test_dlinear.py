"""DLinear against its decomposition written out, its published size, and missing values."""

import pytest
import torch

from selectra.errors import ConfigError
from selectra.models.dlinear import DLinear


def test_published_sizes() -> None:
    for (seq_len, horizon), count in {(96, 96): 18_624, (96, 720): 139_680, (512, 720): 738_720}.items():
        model = DLinear(seq_len=seq_len, horizon=horizon)
        assert sum(p.numel() for p in model.parameters()) == count


def test_decomposition_written_out() -> None:
    x, model = torch.randn(2, 30, 3), DLinear(seq_len=30, horizon=7)
    ends = torch.cat([x[:, :1].repeat(1, 12, 1), x, x[:, -1:].repeat(1, 12, 1)], 1)
    trend = torch.stack([ends[:, i : i + 25].mean(1) for i in range(30)], 1)
    seasonal, level = (x - trend).transpose(1, 2), trend.transpose(1, 2)
    expected = (
        seasonal @ model.seasonal.weight.T + model.seasonal.bias + level @ model.trend.weight.T + model.trend.bias
    )
    torch.testing.assert_close(model(x), expected.transpose(1, 2))


def test_what_is_masked_has_no_influence() -> None:
    x, observed, model = torch.randn(2, 30, 3), torch.rand(2, 30, 3) > 0.3, DLinear(seq_len=30, horizon=7)
    poisoned = x.masked_fill(~observed, float("nan"))
    assert torch.equal(model(x, observed=observed), model(poisoned, observed=observed))


def test_even_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="odd 'kernel' of at least 1, got 24"):
        DLinear(seq_len=30, horizon=7, kernel=24)
