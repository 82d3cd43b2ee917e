"""Intervals: their coverage, how they are calibrated, and what they are scored by."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from selectra.data.windows import Windows
from selectra.errors import ConfigError
from selectra.forecaster import Forecaster
from selectra.forecaster.intervals import GRID, Calibration, IntervalScores, calibrate, check_levels, column_names

LEVELS = [80, 95]


class Zero(nn.Module):
    """Forecasts the mean of standardised data."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.zeros(len(x), 3, x.shape[2])


class Two(nn.Module):
    """The quantiles 0.1, 0.5 and 0.9, too narrow by half."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.tensor([-0.64, 0.0, 0.64]).expand(len(x), 3, x.shape[2], 3)


def noise(rows: int, series: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, series)).astype(np.float32)


def windows(values: np.ndarray, hidden: float = 0.0) -> Windows:
    observed = np.random.default_rng(1).random(values.shape) >= hidden
    # What is hidden must not count, whatever stands there.
    values = np.where(observed, values, np.float32(1e30))
    return Windows(values, observed, first=0, count=len(values) - 4, seq_len=2, horizon=3)


def stationary(rows: int = 900, series: int = 50) -> pd.DataFrame:
    """Daily waves with autoregressive noise; the largest series is a million times the smallest."""
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(rows + 50, series))
    for t in range(1, rows + 50):
        noise[t] += 0.5 * noise[t - 1]
    t = np.arange(rows)[:, None]
    wave = np.sin((t + rng.integers(0, 24, series)) * 2 * np.pi / 24)
    values = 10 ** np.linspace(-3, 3, series) * (5 + wave + 0.7 * noise[50:])
    columns = {f"s{i}": values[:, i] for i in range(series)}
    return pd.DataFrame({"time": pd.date_range("2020-01-01", periods=rows, freq="h"), **columns})


@pytest.mark.parametrize(
    ("model", "arguments"),
    [("linear", {}), ("naive", {}), ("itransformer_smoke", {}), ("dlinear", {"quantiles": (0.1, 0.5, 0.9)})],
)
def test_intervals_cover_what_they_say_on_stationary_series(model: str, arguments: dict[str, Any]) -> None:
    frame, h, n = stationary(), 12, 30
    forecaster = Forecaster(model, h=h, level=LEVELS, input_size=48, model_args=arguments, train_args={"max_steps": 60})
    found = forecaster.cross_validation(frame, n_windows=n, step_size=10, val_size=220)
    assert len(found) == 50 * h * n
    for level, (least, most) in zip(LEVELS, ((0.77, 0.83), (0.93, 0.97)), strict=True):
        inside = found["y"].between(found[f"{model}-lo-{level}"], found[f"{model}-hi-{level}"])
        assert least <= inside.mean() <= most
        # Each series on its own scale.
        assert inside.groupby(found["unique_id"]).mean().between(least - 0.15, 1).all()
        width = (found[f"{model}-hi-{level}"] - found[f"{model}-lo-{level}"]).groupby(found["unique_id"]).mean()
        assert width["s49"] / width["s0"] == pytest.approx(1e6, rel=0.5)


def test_the_radius_is_the_residual_of_the_corrected_rank() -> None:
    values = noise(43)
    found = calibrate(Zero(), windows(values), [80.0, 95.0])
    assert found.levels == tuple(sorted({*GRID, 95.0})) and found.windows == 39
    residuals = np.sort(np.abs(values[3:42, 2]))  # the second step of the third series
    for level, rank in ((80.0, 32), (95.0, 38)):
        assert found.radii[found.levels.index(level), 1, 2] == residuals[rank - 1]
    assert found.pooled == 0


def test_hidden_targets_do_not_count() -> None:
    values = noise(400)
    every, some = (calibrate(Zero(), windows(values, hidden), [80.0]).radii for hidden in (0.0, 0.4))
    assert np.isfinite(some).all() and np.abs(some - every).max() < 0.6 and not np.array_equal(every, some)


def test_too_few_residuals_are_joined_by_those_of_other_series() -> None:
    values = noise(14, series=20) * np.logspace(-2, 2, 20, dtype=np.float32)
    found = calibrate(Zero(), windows(values), [80.0, 95.0])
    assert found.windows == 10 and found.pooled == 1
    wide = found.radii[found.levels.index(95.0)]
    # For the rank 0.95 * 11 there is no residual among ten; pooled ones keep each series' scale.
    ratio = wide / np.logspace(-2, 2, 20)
    assert (ratio > 1).all() and (ratio < 5).all()
    lone = calibrate(Zero(), windows(values[:, :1]), [99.0])
    assert np.isfinite(lone.radii).all()


def test_a_models_own_quantiles_are_widened() -> None:
    values = noise(4000)
    found = calibrate(Two(), windows(values), [80.0, 95.0], (0.1, 0.5, 0.9))
    assert found.levels == (80.0, 95.0)
    low, high = found.bounds(Two()(torch.zeros(1, 2, 4)))
    # The quantiles 0.1 and 0.9 of a normal distribution; 95 % lie around the median, which is forecast.
    assert torch.allclose(high[0], torch.tensor(1.2816), atol=0.12) and torch.allclose(
        low[0], -torch.tensor(1.2816), atol=0.12
    )
    assert torch.allclose(high[1], torch.tensor(1.96), atol=0.15)


def test_levels_lie_within_each_other_and_around_the_forecast() -> None:
    radii = np.array([[[-2.0]], [[-3.0]]], np.float32)
    found = Calibration((80.0, 90.0), radii, (0.05, 0.1, 0.5, 0.9, 0.95))
    low, high = found.bounds(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])[None, None, None])
    assert low.flatten().tolist() == [0, 0] and high.flatten().tolist() == [0, 0]


def test_scores_of_intervals_and_the_crps() -> None:
    values = noise(20_000, series=2)
    found = calibrate(Zero(), windows(noise(20_000, series=2, seed=3)), [80.0, 95.0])
    batch = windows(values)[list(range(19_000))]
    assert batch.y is not None and batch.y_observed is not None
    scores = IntervalScores(found, (80.0, 95.0))
    scores.update(torch.zeros_like(batch.y[:9_000]), batch.y[:9_000], batch.y_observed[:9_000])
    scores.update(torch.zeros_like(batch.y[9_000:]), batch.y[9_000:], batch.y_observed[9_000:])
    metrics = scores.compute(np.array([1.0, 3.0]))
    assert metrics["coverage-80"] == pytest.approx(0.8, abs=0.01)
    assert metrics["coverage-95"] == pytest.approx(0.95, abs=0.01)
    assert metrics["width-80"] == pytest.approx(2 * 1.2816, rel=0.02)
    # Of N(0, 1) against draws from itself it is 1 / sqrt(pi); the mean over both scales.
    assert metrics["crps"] == pytest.approx(2 / np.sqrt(np.pi), rel=0.02)
    alone = IntervalScores(calibrate(Zero(), windows(noise(20_000, series=2, seed=3)), []), ())
    alone.update(torch.zeros_like(batch.y), batch.y, batch.y_observed)
    assert alone.compute(np.array([1.0, 3.0]))["crps"] == pytest.approx(metrics["crps"], rel=1e-6)


def test_names_and_levels() -> None:
    assert column_names("m", (80.0, 99.5)) == ["m", "m-lo-99.5", "m-lo-80", "m-hi-80", "m-hi-99.5"]
    assert check_levels([95, 80, 80]) == (80.0, 95.0) and check_levels(90) == (90.0,) and check_levels(None) == ()
    for wrong in ([0], [100], [True], ["80"], [float("nan")]):
        with pytest.raises(ConfigError, match="between 0 and 100"):
            check_levels(wrong)
