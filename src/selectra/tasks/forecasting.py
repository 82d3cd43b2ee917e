"""Forecasting: an error over every observed target, and MSE, MAE and MASE that no batch size can change."""

import copy
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from selectra.errors import ConfigError
from selectra.registry import tasks
from selectra.tasks.task import Loss


class SeriesWindows(Protocol):
    """What the task reads of a batch of windows."""

    @property
    def x(self) -> Float[Tensor, "b l s"]: ...
    @property
    def observed(self) -> Bool[Tensor, "b l s"]: ...
    @property
    def y(self) -> Float[Tensor, "b h s"] | None: ...
    @property
    def y_observed(self) -> Bool[Tensor, "b h s"] | None: ...
    @property
    def past(self) -> Float[Tensor, "b l c"] | None: ...
    @property
    def future(self) -> Float[Tensor, "b t c"] | None: ...
    @property
    def static(self) -> Float[Tensor, "b s c"] | None: ...


def predict(model: nn.Module, batch: SeriesWindows) -> Float[Tensor, "b h s"]:
    """Call a series model by its contract."""
    return model(batch.x, observed=batch.observed, past=batch.past, future=batch.future, static=batch.static)


def _errors(model: nn.Module, batch: SeriesWindows) -> tuple[Float[Tensor, "b h s"], Bool[Tensor, "b h s"]]:
    """Forecast minus truth, and exactly 0 where there is no truth, whatever stands there; and where there is one."""
    assert batch.y is not None
    assert batch.y_observed is not None
    forecast = predict(model, batch)
    if forecast.shape != batch.y.shape:
        raise ConfigError(
            f"{type(model).__name__} forecasts the shape {tuple(forecast.shape)}, "
            f"and the data's targets have {tuple(batch.y.shape)} (batch, horizon, series)."
        )
    return torch.where(batch.y_observed, forecast - batch.y, 0.0), batch.y_observed


class ForecastEvaluator:
    """Sums of errors per series in float64, over observed targets alone.

    Args:
        target_index: The series that count; None counts all.
        seasonal_errors: Mean absolute error of the seasonal naive forecast on the training rows, per series and in
            user units: the denominators of MASE (Hyndman and Koehler 2006).
        std: Standard deviation by which each series was divided, in user units.
    """

    def __init__(
        self,
        target_index: tuple[int, ...] | None = None,
        seasonal_errors: ArrayLike | None = None,
        std: ArrayLike | None = None,
    ) -> None:
        self.target_index = target_index
        self.scale: Float[Tensor, " s"] | None = None
        if seasonal_errors is not None and std is not None:
            # Errors are standardised; this brings them to units of the seasonal naive error.
            self.scale = torch.from_numpy(np.array(std, np.float64)) / torch.from_numpy(
                np.array(seasonal_errors, np.float64)
            )
        self.sums: Float[Tensor, "3 s"] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, batch: SeriesWindows) -> None:
        """Add one batch."""
        errors, observed = _errors(model, batch)
        errors = errors.double()
        rows = (errors.square(), errors.abs(), observed.double())
        sums = torch.stack([row.sum(dim=(0, 1)) for row in rows])
        self.sums = sums if self.sums is None else self.sums + sums

    def reduce(self, gather: Callable[[Any], list[Any]]) -> None:
        """Add the sums of all processes; one that had no window brings none."""
        sums = [each for each in gather(None if self.sums is None else self.sums.cpu()) if each is not None]
        self.sums = torch.stack(sums).sum(dim=0) if sums else None

    def per_series(self) -> dict[str, list[float]]:
        """MSE and MAE of every series, standardised; NaN for a series without an observed target."""
        assert self.sums is not None
        square, absolute, count = self.sums.cpu()
        return {"mse": (square / count).tolist(), "mae": (absolute / count).tolist()}

    def compute(self) -> dict[str, float]:
        """MSE and MAE over all observed targets (standardised), and MASE as the mean over series."""
        if self.sums is None:
            return {"mse": float("nan"), "mae": float("nan")}
        keep = list(self.target_index) if self.target_index is not None else slice(None)
        square, absolute, count = self.sums.cpu()[:, keep]
        metrics = {"mse": float(square.sum() / count.sum()), "mae": float(absolute.sum() / count.sum())}
        if self.scale is not None:
            scaled = absolute / count * self.scale[keep]
            # A series that is constant over the season, or has no target, has no scaled error.
            metrics["mase"] = float(scaled[scaled.isfinite()].mean())
        return metrics


@tasks.register("forecasting", kind="series")
class Forecasting:
    """Predict the next `horizon` values of every series.

    Args:
        loss: What training lowers: squared, absolute or Huber error of standardised values.
        target_index: The series that are forecast for; None is all of them.
    """

    def __init__(
        self, *, loss: Literal["mse", "mae", "huber"] = "mse", target_index: tuple[int, ...] | None = None
    ) -> None:
        self.kind = loss
        self.target_index = target_index
        self.seasonal_errors: ArrayLike | None = None
        self.std: ArrayLike | None = None

    def for_data(self, data: Any) -> Self:
        """The same task on the data's target, with MASE in units of its seasonal naive error.

        Raises:
            ConfigError: `target_index` names a series that the data does not have, or none at all.
        """
        task, n_series = copy.copy(self), np.size(data.scaler.std)
        if task.target_index is not None and not all(0 <= index < n_series for index in task.target_index or (-1,)):
            raise ConfigError(
                f"'task.target_index' is {task.target_index}, and the data has {n_series} series; "
                f"allowed are numbers from 0 to {n_series - 1}, at least one, or none for all."
            )
        if task.target_index is None and data.target_index is not None:
            task.target_index = (data.target_index,)
        task.seasonal_errors = data.seasonal_errors
        task.std = data.scaler.std
        return task

    def loss(self, model: nn.Module, batch: SeriesWindows) -> Loss:
        """The error summed over observed targets, and how many there are."""
        errors, observed = _errors(model, batch)
        if self.target_index is not None:
            keep = list(self.target_index)
            errors, observed = errors[..., keep], observed[..., keep]
        if self.kind == "mse":
            total = errors.square().sum()
        elif self.kind == "mae":
            total = errors.abs().sum()
        else:
            total = functional.huber_loss(errors, torch.zeros_like(errors), reduction="sum")
        return Loss(total, observed.sum())

    def evaluator(self, seasonal_errors: ArrayLike | None = None, std: ArrayLike | None = None) -> ForecastEvaluator:
        """A fresh evaluator; both arguments together add MASE, and default to those of `for_data`."""
        seasonal_errors = self.seasonal_errors if seasonal_errors is None else seasonal_errors
        return ForecastEvaluator(self.target_index, seasonal_errors, self.std if std is None else std)

    def score(self, metrics: dict[str, float]) -> float:
        """The validation error that decides: MAE for the loss "mae", MSE for "mse" and "huber"; lower is better."""
        return metrics["mae" if self.kind == "mae" else "mse"]
