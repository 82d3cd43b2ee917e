"""The wrapper that gives covariates and gaps to models that know neither."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import WithCovariates

SIZES: dict[str, Any] = {"seq_len": 6, "horizon": 4, "n_series": 2}


class Last(nn.Module):
    """Repeats the last value; knows nothing else, and would fail if it were given more."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1:].expand(-1, 4, -1)


class Quantiles(nn.Module):
    """Two quantiles, and a covariate that it uses itself."""

    def forward(self, x: Tensor, *, past: Tensor) -> Tensor:
        y = x[:, -1:].expand(-1, 4, -1) + past[:, -1:, :1]
        return torch.stack([y - 1, y + 1], -1)


def test_without_covariates_it_adds_nothing_and_has_nothing_to_learn():
    model = WithCovariates(Last(), takes=(), **SIZES)
    assert list(model.parameters()) == []
    x = torch.randn(3, 6, 2)
    assert torch.equal(model(x), Last()(x))


def test_gaps_are_filled_with_the_last_observed_value():
    model = WithCovariates(Last(), takes=(), name="last", **SIZES)
    x = torch.tensor([[[1.0, 5.0]], [[2.0, 6.0]]]).expand(2, 6, 2).clone()
    x[0, 4:, 0] = math.nan
    x[1, :, 1] = math.nan
    x[0, 3, 0] = 3.0
    y = model(x, observed=~x.isnan())
    assert y[0, 0].tolist() == [3, 5] and y[1, 0].tolist() == [2, 0]
    assert len(model.notes) == 1 and model.notes[0].startswith("last cannot use missing values")


def test_a_model_gets_what_it_takes_and_the_encoder_the_rest():
    model = WithCovariates(Quantiles(), takes=("past",), n_past=1, n_static=3, **SIZES)
    assert list(model.encoded) == ["static"]
    nn.init.normal_(model.get_parameter("encoder.head.weight"))
    x, past, static = torch.randn(3, 6, 2), torch.randn(3, 6, 1), torch.randn(3, 2, 3)
    y = model(x, past=past, static=static)
    residual = y - Quantiles()(x, past=past)
    assert y.shape == (3, 4, 2, 2)
    # Quantiles move together; what is static adds the same at every step.
    assert torch.allclose(residual[..., 0], residual[..., 1], atol=1e-6)
    assert torch.allclose(residual[:, 0], residual[:, 3], atol=1e-6)
    assert not torch.allclose(residual[:, 0, 0], residual[:, 0, 1], atol=1e-3)
    assert model.notes[-1] == "Quantiles takes no static covariates itself: an encoder and a residual head add them."


def test_it_learns_what_a_covariate_says():
    """The future covariate is the target; within some steps the wrapper has found out."""
    model = WithCovariates(Last(), takes=(), n_future=1, **SIZES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    errors = []
    for _ in range(100):
        future = torch.randn(64, 10, 1)
        error = (model(torch.zeros(64, 6, 2), future=future) - future[:, -4:]).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[0] > 0.8 and errors[-1] < 0.2


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="takes names 'gaps'; a series model takes observed, past, future, static"):
        WithCovariates(Last(), takes=("gaps",), **SIZES)
    with pytest.raises(ConfigError, match="past covariates were given, but Last was built with n_past=0"):
        WithCovariates(Last(), takes=(), **SIZES)(torch.randn(1, 6, 2), past=torch.randn(1, 6, 1))
    with pytest.raises(ConfigError, match="static covariates are missing"):
        WithCovariates(Last(), takes=(), n_static=1, **SIZES)(torch.randn(1, 6, 2))


class Mean(nn.Module):
    """Solved in closed form: the mean of the observed targets of each series."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(2))

    def solve(self, batches: Any) -> None:
        batches = list(batches)
        y, seen = (torch.cat([getattr(b, name) for b in batches]) for name in ("y", "y_observed"))
        self.level.data.copy_(y.where(seen, 0.0).sum((0, 1)) / seen.sum((0, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.level.expand(len(x), 4, 2)


@dataclass(frozen=True)
class Batch:
    """What `solve` reads."""

    x: Tensor
    observed: Tensor
    y: Tensor
    y_observed: Tensor
    past: Tensor | None
    future: Tensor | None
    static: Tensor | None


def test_a_solved_model_gets_solved_covariates():
    weights, batches = torch.tensor([[2.0, -1.0], [0.5, 3.0]]), []
    for _ in range(20):
        x, past, future = torch.randn(8, 6, 2), torch.randn(8, 6, 1), torch.randn(8, 10, 2)
        y = 7 + future[:, 6:] @ weights - 4 * future[:, 5:6] @ weights + 2 * past[:, -1:]
        seen = torch.rand_like(y) > 0.3
        batches.append(Batch(x, torch.ones_like(x).bool(), y.where(seen, 1e30), seen, past, future, None))
    model = WithCovariates(Mean(), takes=(), n_past=1, n_future=2, **SIZES)
    model.solve(batches)
    for b in batches[:2]:
        found = model(b.x, past=b.past, future=b.future)
        assert torch.allclose(found.where(b.y_observed, 0.0), b.y.where(b.y_observed, 0.0), atol=1e-3)
    assert model.notes[-1].endswith(
        "takes no past and future covariates itself: a regression of its residuals adds them."
    )
    # A constant of each series is all that static covariates can say.
    static = WithCovariates(Mean(), takes=(), n_static=3, **SIZES)
    constant = torch.randn(8, 2, 3)
    static.solve([replace(b, past=None, future=None, static=constant) for b in batches])
    assert static(batches[0].x, static=constant).shape == (8, 4, 2)


def test_too_many_covariates_for_a_regression_are_left_out():
    model = WithCovariates(Mean(), takes=(), n_future=2000, **SIZES)
    assert model.notes[-1].endswith("they are left out.")
    x, y, future = torch.zeros(1, 6, 2), torch.ones(1, 4, 2), torch.randn(1, 10, 2000)
    batch = Batch(x, torch.ones_like(x).bool(), y, torch.ones_like(y).bool(), None, future, None)
    model.solve([batch])
    assert torch.equal(model(batch.x, future=batch.future), torch.ones(1, 4, 2))
