"""The closed form against a textbook solver, with gaps, batches and the benchmark's figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from selectra.data.series import SeriesFile
from selectra.data.windows import SeriesBatch
from selectra.errors import ConfigError
from selectra.forecaster.scoring import build_model, build_task, in_batches, score
from selectra.layers.revin import WindowNorm
from selectra.models import linear
from selectra.models.linear import Linear
from selectra.spec import Run, Spec

L, H, S = 12, 5, 3


def windows(count: int = 60, missing: float = 0.0) -> SeriesBatch:
    series = torch.randn(count + L + H, S).cumsum(0)
    rows = torch.arange(count)[:, None] + torch.arange(L + H)
    seen = torch.rand(series.shape) >= missing
    values, seen = series[rows], seen[rows]
    return SeriesBatch(values[:, :L], seen[:, :L], values[:, L:], seen[:, L:])


def pieces(batch: SeriesBatch, size: int) -> list[SeriesBatch]:
    parts = [
        tensor.split(size) for tensor in (batch.x, batch.observed, batch.y, batch.y_observed) if tensor is not None
    ]
    return [SeriesBatch(*part) for part in zip(*parts, strict=True)]


def solved(batches: list[SeriesBatch], window_norm: WindowNorm = "last") -> Tensor:
    model = Linear(seq_len=L, horizon=H, window_norm=window_norm)
    model.solve(batches)
    return torch.cat([model.proj.weight, model.proj.bias[:, None]], 1).detach().double()


def filled(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Last observed value carried forward, the first one backward: one row at a time, for comparison."""
    values = values.copy()
    for row, mask in zip(values, seen, strict=True):
        known = np.flatnonzero(mask)
        for i in range(len(row)):
            before = known[known <= i]
            row[i] = row[before[-1]] if len(before) else row[known[0]] if len(known) else 0.0
    return values


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_solution_is_that_of_least_squares_on_observed_targets(missing: float) -> None:
    batch = windows(200, missing)
    assert batch.y is not None and batch.y_observed is not None
    x = batch.x.double().transpose(1, 2).reshape(-1, L).numpy()
    x = filled(x, batch.observed.transpose(1, 2).reshape(-1, L).numpy())
    y = batch.y.double().transpose(1, 2).reshape(-1, H).numpy() - x[:, -1:]
    seen = batch.y_observed.transpose(1, 2).reshape(-1, H).numpy()
    inputs = np.concatenate([x - x[:, -1:], np.ones((len(x), 1))], 1)
    found = solved(pieces(batch, 32)).numpy()
    for step in range(H):
        rows = inputs[seen[:, step]]
        gram = rows.T @ rows
        gram += 1e-6 * gram.diagonal().mean() * np.eye(L + 1)
        expected = np.linalg.solve(gram, rows.T @ y[seen[:, step], step])
        np.testing.assert_allclose(found[step], expected, atol=2e-6)


@pytest.mark.parametrize("mode", ["none", "last", "mean", "instance"])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_every_norm_gives_the_least_squared_error_of_the_forecast(mode: WindowNorm, missing: float) -> None:
    """Any step away from the solution raises the error on the windows that it was solved on."""
    batch = windows(120, missing)
    assert batch.y is not None and batch.y_observed is not None
    model = Linear(seq_len=L, horizon=H, window_norm=mode).double()
    model.solve(pieces(batch, 50))
    exact = SeriesBatch(batch.x.double(), batch.observed, batch.y.double(), batch.y_observed)

    def error() -> Tensor:
        return (model(exact.x, observed=exact.observed) - exact.y)[exact.y_observed].square().mean()

    least = error()
    least.backward()
    for parameter in model.parameters():
        # The ridge alone keeps the gradient from 0.
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e-4 * least.item()
    with torch.no_grad():
        for parameter in model.parameters():
            kept = parameter.clone()
            for _ in range(3):
                parameter.add_(0.01 * torch.randn_like(parameter))
                assert error() > least
                parameter.copy_(kept)


def test_flat_windows_do_not_decide_the_instance_norm() -> None:
    """Their deviation is the norm's epsilon, by which a target would be divided."""
    batch = windows(120)
    assert batch.y is not None
    flat = SeriesBatch(
        torch.cat([batch.x, torch.zeros(1, L, S)]),
        torch.cat([batch.observed, torch.ones(1, L, S, dtype=torch.bool)]),
        torch.cat([batch.y, torch.full((1, H, S), 0.1)]),
    )
    torch.testing.assert_close(solved([flat], "instance"), solved([batch], "instance"), atol=5e-3, rtol=0)


def test_revin_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no window_norm 'revin'.*Take 'instance', or the model rlinear"):
        Linear(seq_len=L, horizon=H, window_norm="revin")


def test_batches_do_not_matter() -> None:
    batch = windows(150, 0.1)
    torch.testing.assert_close(solved(pieces(batch, 7)), solved([batch]), atol=1e-6, rtol=1e-6)


def test_what_is_masked_has_no_influence() -> None:
    batch = windows(80, 0.3)
    assert batch.y is not None and batch.y_observed is not None
    nan = float("nan")
    poisoned = SeriesBatch(
        batch.x.masked_fill(~batch.observed, nan),
        batch.observed,
        batch.y.masked_fill(~batch.y_observed, nan),
        batch.y_observed,
    )
    assert torch.equal(solved([batch]), solved([poisoned]))
    model = Linear(seq_len=L, horizon=H)
    assert torch.equal(model(poisoned.x, observed=batch.observed), model(batch.x, observed=batch.observed))


def test_long_windows_are_strided_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = windows(100)
    whole = solved([batch])
    fourth = [SeriesBatch(batch.x[::4], batch.observed[::4], batch.y[::4] if batch.y is not None else None)]
    expected = solved(fourth)
    monkeypatch.setattr(linear, "GATHERED_ROWS", 30)
    monkeypatch.setattr(linear, "STRIDE_ABOVE_WINDOWS", 99)
    assert torch.allclose(solved(pieces(batch, 7)), whole)
    monkeypatch.setattr(linear, "STRIDE_ABOVE_LENGTH", L - 1)
    torch.testing.assert_close(solved(pieces(batch, 7)), expected, atol=1e-6, rtol=1e-6)
    monkeypatch.setattr(linear, "STRIDE_ABOVE_WINDOWS", 100)
    assert torch.allclose(solved(pieces(batch, 7)), whole)


def test_a_level_is_carried_along() -> None:
    batch = windows(80)
    model = Linear(seq_len=L, horizon=H)
    model.solve([batch])
    torch.testing.assert_close(model(batch.x + 100.0), model(batch.x) + 100.0, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "mse", "mae"), [("linear", 0.383, 0.392), ("naive", 1.294, 0.713), ("seasonal_naive", 0.512, 0.433)]
)
def test_etth1_figures_on_all_windows(data_folder: Path, name: str, mse: float, mae: float) -> None:
    data = SeriesFile(str(data_folder / "ett-small" / "ETTh1.csv.gz"), seq_len=96, horizon=96, split="ett")
    model = build_model(Spec(name), data, seed=0)
    if isinstance(model, Linear):
        model.solve(in_batches(data.windows("train"), 256))
    task = build_task(Run(model=Spec(name), data=Spec("series_file"), task=Spec("forecasting")), data)
    found = [score(model, task, data, batch_size) for batch_size in (512, 97)]
    assert found[0].metrics["mse"] == pytest.approx(mse, abs=0.002)
    assert found[0].metrics["mae"] == pytest.approx(mae, abs=0.002)
    assert found[0].metrics == pytest.approx(found[1].metrics, abs=1e-6)
    # The curves that the report shows average to the same figure: every step has as many targets.
    assert found[0].by_step[0].mean() == pytest.approx(found[0].metrics["mse"], abs=1e-9)
    assert found[0].by_series[1].mean() == pytest.approx(found[0].metrics["mae"], abs=1e-9)
