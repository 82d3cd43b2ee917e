"""Build, train and score one model on one table; what `Forecaster` and `forecast_job` share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import selectra.models  # noqa: F401 - registers every model
from selectra.data.series import SeriesData
from selectra.data.windows import SeriesBatch, Windows
from selectra.registry import models, tasks
from selectra.spec import Run, Spec
from selectra.tasks.forecasting import Forecasting, predict


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
    """Errors of one model on all test windows, standardised; `steps` and `series` are (mse, mae) rows."""

    metrics: dict[str, float]
    by_step: Float[np.ndarray, "2 h"]
    by_series: Float[np.ndarray, "2 s"]


def build_model(spec: Spec, data: SeriesData, seed: int) -> nn.Module:
    """The model that `spec` names, with lengths and counts from the data and weights from the seed."""
    torch.manual_seed(seed)
    model = models.build(spec, data.facts)
    assert isinstance(model, nn.Module)
    return model


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
def score(model: nn.Module, task: Forecasting, data: SeriesData, batch_size: int) -> Score:
    """Forecast all test windows once; the batch size changes time and memory alone."""
    model.eval()
    device = device_of(model)
    evaluator = task.evaluator()
    sums = torch.zeros(3, data.horizon, len(data.names), dtype=torch.float64)
    for batch in in_batches(data.windows("test"), batch_size):
        batch = batch.to(device)  # noqa: PLW2901
        forecast = predict(model, batch)
        evaluator.update(Answered(forecast), batch)
        assert batch.y is not None and batch.y_observed is not None
        errors = torch.where(batch.y_observed, forecast - batch.y, 0.0).double()
        sums += torch.stack([part.sum(0) for part in (errors.square(), errors.abs(), batch.y_observed.double())]).cpu()
    kept = sums if data.target_index is None else sums[:, :, [data.target_index]]
    steps, series = kept.sum(2), kept.sum(1)
    return Score(evaluator.compute(), (steps[:2] / steps[2]).numpy(), (series[:2] / series[2]).numpy())


@torch.no_grad()
def forecast_units(model: nn.Module, data: SeriesData, batch: SeriesBatch) -> Float[np.ndarray, "b h s"]:
    """Forecasts in the units of the data."""
    model.eval()
    forecast = predict(model, batch.to(device_of(model)))
    return data.scaler.inverse(forecast.cpu().double().numpy())
