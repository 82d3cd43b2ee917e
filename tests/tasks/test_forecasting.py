"""The forecasting task against utilsforecast's metrics, and what may not change them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from utilsforecast import losses

from selectra.data.windows import SeriesBatch
from selectra.errors import ConfigError
from selectra.registry import tasks
from selectra.spec import Spec
from selectra.tasks import Forecasting
from selectra.tasks.forecasting import crps_weights, pinball
from selectra.train.evaluation import evaluate
from selectra.train.parallel import World
from tests.train.tiny import HORIZON, N_SERIES, TinyNaive, windows


class Oracle(nn.Module):
    """Forecasts stored values, whatever it sees."""

    def __init__(self, forecast: torch.Tensor) -> None:
        super().__init__()
        self.forecast = forecast

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.forecast[: len(x)]


def make_batch(b: int = 5, s: int = 3) -> tuple[SeriesBatch, torch.Tensor]:
    y, forecast = torch.randn(b, HORIZON, s), torch.randn(b, HORIZON, s)
    observed = torch.rand(b, HORIZON, s) > 0.3
    x = torch.randn(b, 6, s)
    # What stands at an unobserved target must not matter.
    return SeriesBatch(x, torch.ones_like(x, dtype=torch.bool), y.where(observed, float("nan")), observed), forecast


def long_frame(batch: SeriesBatch, forecast: torch.Tensor, std: np.ndarray) -> pd.DataFrame:
    """Observed targets in user units, a row each."""
    assert batch.y is not None
    assert batch.y_observed is not None
    rows = [
        {
            "unique_id": k,
            "ds": i * 100 + h,
            "y": batch.y[i, h, k].item() * std[k],
            "model": forecast[i, h, k].item() * std[k],
        }
        for i, h, k in batch.y_observed.nonzero().tolist()
    ]
    return pd.DataFrame(rows)


def test_metrics_are_those_of_utilsforecast():
    batch, forecast = make_batch()
    std = np.array([1.0, 10.0, 0.3])
    evaluator = Forecasting().evaluator(seasonal_errors=np.array([0.5, 7.0, 0.2]), std=std)
    evaluator.update(Oracle(forecast), batch)
    metrics = evaluator.compute()
    standard = long_frame(batch, forecast, np.ones(3)).assign(unique_id=0)
    assert metrics["mse"] == pytest.approx(losses.mse(standard, ["model"])["model"][0], rel=1e-6)
    assert metrics["mae"] == pytest.approx(losses.mae(standard, ["model"])["model"][0], rel=1e-6)
    # A training frame whose seasonal naive errors (season 1) are the stated ones.
    history = pd.DataFrame(
        [{"unique_id": k, "ds": t, "y": t % 2 * error} for k, error in enumerate([0.5, 7.0, 0.2]) for t in range(6)]
    )
    frame = long_frame(batch, forecast, std).sort_values(["unique_id", "ds"])
    mase = losses.mase(frame, ["model"], seasonality=1, train_df=history)["model"].mean()
    assert metrics["mase"] == pytest.approx(mase, rel=1e-6)
    per_series = losses.mae(long_frame(batch, forecast, np.ones(3)), ["model"]).sort_values("unique_id")["model"]
    assert evaluator.per_series()["mae"] == pytest.approx(per_series.tolist(), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 40])
@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_neither_batch_size_nor_processes_change_a_metric(size, batch_size):
    expected = evaluate(TinyNaive(), Forecasting(), windows(30), 30)
    evaluators = []
    for rank in range(size):
        task = Forecasting()
        kept = task.evaluator()
        task.evaluator = lambda kept=kept: kept  # type: ignore[method-assign]
        evaluate(TinyNaive(), task, windows(30), batch_size, _Alone(rank, size))
        evaluators.append(kept)
    evaluators[0].reduce(lambda _: [evaluator.sums for evaluator in evaluators])
    assert evaluators[0].compute() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("batch_size", "most"), [(16, 4), (3, 1)])
def test_processes_share_a_batch_of_an_evaluation(batch_size, most):
    sizes = []

    class Counting(TinyNaive):
        def forward(self, x, **options):
            sizes.append(len(x))
            return super().forward(x, **options)

    evaluate(Counting(), Forecasting(), windows(30), batch_size, _Alone(1, 4))
    assert max(sizes) == most and sum(sizes) == 8


class _Alone(World):
    """One of several processes, before their sums are brought together."""

    def gather(self, item):
        return [item]


@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
def test_loss_is_a_sum_over_observed_targets(kind):
    batch, forecast = make_batch()
    assert batch.y is not None
    assert batch.y_observed is not None
    forecast.requires_grad_()
    loss = Forecasting(loss=kind).loss(Oracle(forecast), batch)
    y, seen = batch.y[batch.y_observed], forecast[batch.y_observed]
    functions = {"mse": nn.functional.mse_loss, "mae": nn.functional.l1_loss, "huber": nn.functional.huber_loss}
    torch.testing.assert_close(loss.sum, functions[kind](seen, y, reduction="sum"))
    assert loss.count == batch.y_observed.sum()
    loss.sum.backward()
    assert forecast.grad is not None
    assert forecast.grad.isfinite().all()
    assert (forecast.grad[~batch.y_observed] == 0).all()


def test_target_alone_counts():
    batch, forecast = make_batch()
    data = SimpleNamespace(target_index=1, seasonal_errors=np.ones(3), scaler=SimpleNamespace(std=np.ones(3)))
    task = Forecasting().for_data(data)
    evaluator = task.evaluator()
    evaluator.update(Oracle(forecast), batch)
    assert evaluator.compute()["mse"] == pytest.approx(evaluator.per_series()["mse"][1])
    assert evaluator.compute()["mase"] == pytest.approx(evaluator.per_series()["mae"][1])
    loss = task.loss(Oracle(forecast), batch)
    assert float(loss.sum / loss.count) == pytest.approx(evaluator.compute()["mse"], rel=1e-5)


def test_series_without_a_scale_stays_out_of_mase():
    batch, forecast = make_batch()
    evaluator = Forecasting().evaluator(np.array([1.0, np.nan, 0.0]), np.ones(3))
    evaluator.update(Oracle(forecast), batch)
    assert evaluator.compute()["mase"] == pytest.approx(evaluator.per_series()["mae"][0])


def test_no_window_is_not_a_number():
    assert np.isnan(Forecasting().evaluator().compute()["mse"])


def test_a_forecast_of_another_shape_is_said():
    batch, forecast = make_batch()
    with pytest.raises(ConfigError, match=r"Oracle forecasts the shape \(5, 3, 3\)"):
        Forecasting().loss(Oracle(forecast[:, 1:]), batch)


def test_registered():
    task = tasks.build(Spec("forecasting", loss="mae"), {"horizon": HORIZON, "n_series": N_SERIES})
    assert task.score({"mse": 1.0, "mae": 2.0}) == 2.0
    with pytest.raises(ConfigError, match=r"'mse' \| 'mae' \| 'huber'"):
        tasks.build(Spec("forecasting", loss="rmse"))


@pytest.mark.parametrize("index", [(3,), (0, 7), (-1,), ()])
def test_target_that_the_data_does_not_have(index):
    data = SimpleNamespace(target_index=None, seasonal_errors=np.ones(3), scaler=SimpleNamespace(std=np.ones(3)))
    with pytest.raises(ConfigError, match="allowed are numbers from 0 to 2"):
        Forecasting(target_index=index).for_data(data)
    assert Forecasting(target_index=(0, 2)).for_data(data).target_index == (0, 2)


class TwoLevels(nn.Module):
    """Two stored quantiles."""

    def __init__(self, forecast: torch.Tensor) -> None:
        super().__init__()
        self.forecast = nn.Parameter(forecast)

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.forecast[: len(x)]


def test_pinball_loss_is_utilsforecasts_and_ignores_what_is_hidden():
    batch, forecast = make_batch()
    levels = (0.1, 0.7)
    model = TwoLevels(torch.stack([forecast - 1, forecast + 0.5], -1))
    found = Forecasting(loss="pinball", quantiles=levels).loss(model, batch)
    frame = long_frame(batch, forecast, np.ones(3))
    expected = [
        losses.quantile_loss(frame.assign(model=frame["model"] + shift), {"model": "model"}, q=level)
        for level, shift in zip(levels, (-1, 0.5), strict=True)
    ]
    counts = frame.groupby("unique_id").size().to_numpy()
    total = sum((each["model"].to_numpy() * counts).sum() for each in expected) / 2
    assert found.sum.item() == pytest.approx(total, rel=1e-5)
    assert found.count == counts.sum()
    found.sum.backward()
    assert model.forecast.grad is not None and model.forecast.grad.isfinite().all()
    assert batch.y_observed is not None
    assert not model.forecast.grad[~batch.y_observed].any()


def test_the_least_pinball_loss_is_at_the_quantile():
    y = torch.randn(2000, 1, 1)
    candidates = torch.linspace(-3, 3, 601)[:, None]
    for level in (0.1, 0.5, 0.9):
        means = torch.stack([pinball(c.expand(2000, 1, 1, 1), y, [level]).mean() for c in candidates])
        assert candidates[means.argmin()].item() == pytest.approx(y.quantile(level).item(), abs=0.02)


def test_crps_of_a_normal_distribution():
    # Of N(0, 1) against draws from itself it is 1 / sqrt(pi).
    levels = tuple(np.arange(1, 100) / 100)
    y = torch.randn(20_000, 1, 1)
    forecast = torch.special.ndtri(torch.tensor(levels)).expand(20_000, 1, 1, 99)
    batch = SeriesBatch(torch.zeros(20_000, 1, 1), torch.ones(20_000, 1, 1).bool(), y, torch.ones_like(y).bool())
    evaluator = Forecasting(loss="pinball", quantiles=levels).evaluator(std=np.array([3.0]))
    evaluator.update(Oracle(forecast), batch)
    metrics = evaluator.compute()
    assert metrics["crps"] == pytest.approx(3 / np.sqrt(np.pi), rel=0.02)
    assert metrics["mse"] == pytest.approx(1, rel=0.05) and "mase" not in metrics
    assert sum(crps_weights(levels)) == pytest.approx(1)


def test_quantiles_and_their_loss_come_together():
    cases: list[dict[str, Any]] = [{"loss": "pinball"}, {"quantiles": (0.5,)}]
    for arguments in [*cases, {"loss": "pinball", "quantiles": (0.9, 0.1)}]:
        with pytest.raises(ConfigError, match="quantiles"):
            Forecasting(**arguments)
    batch, forecast = make_batch()
    with pytest.raises(ConfigError, match=r"batch, horizon, series, 2 quantiles"):
        Forecasting(loss="pinball", quantiles=(0.1, 0.9)).loss(Oracle(forecast), batch)
