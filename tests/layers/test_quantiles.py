"""The wrapper that gives quantiles to models of points, and keeps those of others in order."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers import quantiles as room
from selectra.layers.quantiles import WithQuantiles

LEVELS = (0.1, 0.5, 0.8)


class Last(nn.Module):
    """Repeats the last value."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x[:, -1:].expand(-1, 2, -1)


class Crossed(nn.Module):
    """Quantiles in the wrong order."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.stack([Last()(x) + shift for shift in (1.0, 0.0, -1.0)], -1)


class Solved(nn.Module):
    """Forecasts a number that is found without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def solve(self, batches: Any) -> None:
        self.level.data.fill_(torch.cat([batch.y for batch in batches]).mean())

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.level.expand(len(x), 2, x.shape[2])


def batches(count: int = 40, size: int = 8) -> list[Any]:
    """Noise whose spread grows with the step and the series; a third of it hidden."""
    spread = torch.tensor([[1.0, 5.0], [2.0, 10.0]])
    found = []
    for _ in range(count):
        x, y = torch.randn(size, 3, 2), 3 + spread * torch.randn(size, 2, 2)
        seen = torch.rand_like(y) > 0.3
        given = {"observed": None, "past": None, "future": None, "static": None}
        found.append(SimpleNamespace(x=torch.zeros_like(x), y=y.where(seen, 1e30), y_observed=seen, **given))
    return found


def solve(model: nn.Module, data: list[Any]) -> None:
    """What the training loop does."""
    getattr(model, "solve")(data)  # noqa: B009


def wrapped(model: nn.Module, native: bool = False) -> WithQuantiles:
    return WithQuantiles(model, LEVELS, native=native, horizon=2, n_series=2)


def test_quantiles_of_a_model_are_put_in_order():
    y = wrapped(Crossed(), native=True)(torch.zeros(1, 3, 2))
    assert y.shape == (1, 2, 2, 3) and y[0, 0, 0].tolist() == [-1, 0, 1]
    assert list(wrapped(Crossed(), native=True).parameters()) == []


def test_a_model_of_points_without_anything_to_learn_gets_the_quantiles_of_its_residuals():
    model, data = wrapped(Last()), batches()
    solve(model, data)
    y = model(torch.zeros(1, 3, 2))[0]
    residuals = torch.cat([b.y.where(b.y_observed, torch.nan) for b in data])
    expected = residuals.nanquantile(torch.tensor(LEVELS), 0).permute(1, 2, 0)
    assert torch.allclose(y, expected, atol=1e-5)
    below = (residuals[..., None] < y).sum(0) / (~residuals.isnan()).sum(0)[..., None]
    assert torch.allclose(below, torch.tensor(LEVELS).expand_as(below), atol=0.02)


def test_a_solved_model_is_solved_first():
    model, data = (
        wrapped(Solved()),
        [SimpleNamespace(**{**vars(b), "y": b.y.where(b.y_observed, 3.0)}) for b in batches()],
    )
    solve(model, data)
    assert model.get_parameter("model.level").item() == pytest.approx(3, abs=0.3)
    assert torch.allclose(model(torch.zeros(1, 3, 2))[0, :, :, 1], torch.tensor(3.0), atol=0.6)


def test_many_windows_are_thinned_evenly(monkeypatch):
    data = batches()
    every, few = wrapped(Last()), wrapped(Last())
    solve(every, data)
    monkeypatch.setattr(room, "MAX_RESIDUALS", 400)
    solve(few, data)
    assert not torch.equal(every.offsets, few.offsets)
    spread = torch.tensor([[1.0, 5.0], [2.0, 10.0]])[..., None]
    assert torch.allclose(every.offsets / spread, few.offsets / spread, atol=1.0)


def test_a_learning_model_learns_its_offsets():
    class Learns(Last):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

    model = wrapped(Learns())
    assert not hasattr(model, "solve") and hasattr(wrapped(Last()), "solve")
    model(torch.randn(4, 3, 2)).square().sum().backward()
    assert model.offsets.grad is not None and model.offsets.grad.any()


@pytest.mark.parametrize("levels", [(0.5, 0.5), (0.9, 0.1), (0.0, 0.5), (0.5, 1.0)])
def test_levels_that_do_not_rise_are_refused(levels):
    with pytest.raises(ConfigError, match="they must rise"):
        WithQuantiles(Last(), levels, native=False, horizon=2, n_series=2)
