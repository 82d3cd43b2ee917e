"""Build, train and score one model on one table; what `Forecaster` and `forecast_job` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import selectra.models  # noqa: F401 - registers every model
from selectra.data.series import SeriesData
from selectra.data.windows import SeriesBatch, Windows
from selectra.forecaster.intervals import Calibration, IntervalScores
from selectra.layers.covariates import WithCovariates
from selectra.layers.quantiles import WithQuantiles
from selectra.registry import models, tasks
from selectra.spec import Run, Spec
from selectra.tasks.forecasting import Forecasting, middle, predict
from selectra.values import read_value


class Answered(nn.Module):
    """Stands for a model whose forecast of the batch is there already, so that no metric runs it twice."""

    def __init__(self, forecast: Float[Tensor, "b h s"]) -> None:
        super().__init__()
        self.forecast = forecast

    def forward(self, x: Float[Tensor, "b l s"], **_: Any) -> Float[Tensor, "b h s"]:
        """The stored forecast."""
        return self.forecast


@dataclass(frozen=True)
class Score:
    """Errors of one model on all test windows, standardised; `steps` and `series` are (mse, mae) rows.

    `metrics` also holds what the intervals are worth, where there are any.
    """

    metrics: dict[str, float]
    by_step: Float[np.ndarray, "2 h"]
    by_series: Float[np.ndarray, "2 s"]


def build_model(spec: Spec, data: SeriesData, seed: int) -> nn.Module:
    """The model that `spec` names, with lengths and counts from the data and weights from the seed."""
    return build_from_facts(spec, data.facts, seed)


def build_from_facts(spec: Spec, facts: Mapping[str, int], seed: int) -> nn.Module:
    """The same from the data's facts alone.

    Covariates that the model does not take itself, and quantiles where it forecasts points, are added by the wrappers
    of `layers`.
    """
    torch.manual_seed(seed)
    entry = models.entry(spec.name)
    quantiles = _quantiles(spec)
    native = "quantiles" in entry.parameters()
    if quantiles and not native:
        spec = Spec(spec.name, **{name: value for name, value in spec.args.items() if name != "quantiles"})
    model = models.build(spec, facts)
    assert isinstance(model, nn.Module)
    lengths = {name: facts[name] for name in ("seq_len", "horizon", "n_series")}
    counts = {name: n for name, n in facts.items() if name in ("n_past", "n_future", "n_static")}
    if any(name.removeprefix("n_") not in entry.takes for name in counts):
        model = WithCovariates(model, takes=entry.takes, name=spec.name, **lengths, **counts)
    if quantiles:
        sizes = {name: facts[name] for name in ("horizon", "n_series")}
        model = WithQuantiles(model, quantiles, native=native, **sizes)
    return model


def _quantiles(spec: Spec) -> tuple[float, ...]:
    """The levels that a model is built with; text is read as on the command line."""
    return read_value(spec.args.get("quantiles", ()), tuple[float, ...], f"{spec.name}: 'quantiles'")


def quantiles_of(model: nn.Module) -> tuple[float, ...]:
    """The levels of a model's last axis; empty for a model of points."""
    return model.quantiles if isinstance(model, WithQuantiles) else ()


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """What the wrappers do for a model, in sentences for a report."""
    inner = model.model if isinstance(model, WithQuantiles) else model
    return inner.notes if isinstance(inner, WithCovariates) else ()


def task_of(spec: Spec, loss: str | None = None) -> Spec:
    """The task that trains a model: with the pinball loss of its quantiles, if it has any.

    Raises:
        ConfigError: Another loss is named for a model of quantiles.
    """
    quantiles = _quantiles(spec)
    if not quantiles:
        return Spec("forecasting") if loss is None else Spec("forecasting", loss=loss)
    return Spec("forecasting", loss=loss or "pinball", quantiles=quantiles)


def build_task(run: Run, data: SeriesData) -> Forecasting:
    """The task of a run, for the target of the data and with the data's MASE."""
    spec = run.task
    if data.target_index is not None:
        spec = spec.replace(target_index=(data.target_index,))
    task = tasks.build(spec).for_data(data)
    assert isinstance(task, Forecasting)
    return task


def count_parameters(model: nn.Module) -> int:
    """Numbers that training sets."""
    return sum(p.numel() for p in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for one without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def in_batches(windows: Windows, batch_size: int) -> Iterator[SeriesBatch]:
    """Every window once, in order."""
    for start in range(0, len(windows), batch_size):
        yield windows.__getitems__(range(start, min(start + batch_size, len(windows))))


@torch.no_grad()
def score(
    model: nn.Module,
    task: Forecasting,
    data: SeriesData,
    batch_size: int,
    calibration: Calibration | None = None,
    levels: tuple[float, ...] = (),
) -> Score:
    """Forecast all test windows once; the batch size changes time and memory alone."""
    model.eval()
    device = device_of(model)
    evaluator = task.evaluator()
    intervals = None if calibration is None else IntervalScores(calibration, levels)
    sums = torch.zeros(3, data.horizon, len(data.names), dtype=torch.float64)
    for batch in in_batches(data.windows("test"), batch_size):
        batch = batch.to(device)  # noqa: PLW2901
        forecast = predict(model, batch)
        evaluator.update(Answered(forecast), batch)
        assert batch.y is not None and batch.y_observed is not None
        if intervals is not None:
            intervals.update(forecast, batch.y, batch.y_observed)
        errors = torch.where(batch.y_observed, middle(forecast, task.quantiles) - batch.y, 0.0).double()
        sums += torch.stack([part.sum(0) for part in (errors.square(), errors.abs(), batch.y_observed.double())]).cpu()
    kept = sums if data.target_index is None else sums[:, :, [data.target_index]]
    steps, series = kept.sum(2), kept.sum(1)
    metrics = evaluator.compute()
    if intervals is not None:
        metrics |= intervals.compute(data.scaler.std, data.target_index)
    return Score(metrics, (steps[:2] / steps[2]).numpy(), (series[:2] / series[2]).numpy())
