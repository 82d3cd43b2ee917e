"""Forecasting: an error over every observed target, and MSE, MAE, MASE and CRPS that no batch size can change."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from selectra.errors import ConfigError
from selectra.layers.quantiles import require_quantiles
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


def predict(model: nn.Module, batch: SeriesWindows) -> Float[Tensor, "b h s *q"]:
    """Call a series model by its contract."""
    return model(batch.x, observed=batch.observed, past=batch.past, future=batch.future, static=batch.static)


def middle(forecast: Float[Tensor, "b h s *q"], quantiles: Sequence[float]) -> Float[Tensor, "b h s"]:
    """The point forecast: the forecast itself, or of its quantiles the one nearest to the median."""
    if not quantiles:
        return forecast
    return forecast[..., min(range(len(quantiles)), key=lambda i: abs(quantiles[i] - 0.5))]


def pinball(
    forecast: Float[Tensor, "b h s q"], y: Float[Tensor, "b h s"], quantiles: Sequence[float]
) -> Float[Tensor, "b h s q"]:
    """The quantile loss of every level (Koenker and Bassett 1978): its mean is least at that quantile of `y`."""
    levels = torch.as_tensor(quantiles, dtype=forecast.dtype, device=forecast.device)
    below = y[..., None] - forecast
    return torch.maximum(levels * below, (levels - 1) * below)


def crps_weights(quantiles: Sequence[float]) -> list[float]:
    """The share of probabilities that each level stands for: those nearer to it than to any other; they add up to 1.

    With them twice the weighted sum of pinball losses approximates the continuous ranked probability score, which is
    twice their integral over all levels (Gneiting and Ranjan 2011, Eq. 6-9); what lies beyond the outermost levels is
    taken to be as far out as these are.
    """
    borders = [0.0, *((a + b) / 2 for a, b in pairwise(quantiles)), 1.0]
    return [b - a for a, b in pairwise(borders)]


def _forecast(model: nn.Module, batch: SeriesWindows, quantiles: Sequence[float]) -> Float[Tensor, "b h s *q"]:
    """The model's forecast, of the shape that the task expects."""
    assert batch.y is not None
    forecast = predict(model, batch)
    wanted = (*batch.y.shape, len(quantiles)) if quantiles else batch.y.shape
    if forecast.shape != wanted:
        axes = "batch, horizon, series" + (f", {len(quantiles)} quantiles" if quantiles else "")
        raise ConfigError(
            f"{type(model).__name__} forecasts the shape {tuple(forecast.shape)}, "
            f"and the data's targets and the task's quantiles ask for {tuple(wanted)} ({axes})."
        )
    return forecast


class ForecastEvaluator:
    """Sums of errors per series in float64, over observed targets alone.

    Args:
        target_index: The series that count; None counts all.
        seasonal_errors: Mean absolute error of the seasonal naive forecast on the training rows, per series and in
            user units: the denominators of MASE (Hyndman and Koehler 2006).
        std: Standard deviation by which each series was divided, in user units.
        quantiles: Levels of the model's last axis; empty for a model of points.
    """

    def __init__(
        self,
        target_index: tuple[int, ...] | None = None,
        seasonal_errors: ArrayLike | None = None,
        std: ArrayLike | None = None,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        self.target_index, self.quantiles = target_index, quantiles
        self.std = None if std is None else torch.from_numpy(np.array(std, np.float64))
        self.scale: Float[Tensor, " s"] | None = None
        if seasonal_errors is not None and self.std is not None:
            # Errors are standardised; this brings them to units of the seasonal naive error.
            self.scale = self.std / torch.from_numpy(np.array(seasonal_errors, np.float64))
        self.sums: Float[Tensor, "r s"] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, batch: SeriesWindows) -> None:
        """Add one batch."""
        forecast = _forecast(model, batch, self.quantiles)
        assert batch.y is not None and batch.y_observed is not None
        observed = batch.y_observed
        # Exactly 0 where there is no truth, whatever stands there.
        errors = torch.where(observed, middle(forecast, self.quantiles) - batch.y, 0.0).double()
        rows = [errors.square(), errors.abs(), observed.double()]
        if self.quantiles:
            losses = pinball(forecast, torch.where(observed, batch.y, 0.0), self.quantiles).double()
            weights = torch.tensor(crps_weights(self.quantiles), dtype=torch.float64, device=losses.device)
            rows += [torch.where(observed, each, 0.0) for each in (losses.mean(-1), 2 * losses @ weights)]
        sums = torch.stack([row.sum(dim=(0, 1)) for row in rows])
        self.sums = sums if self.sums is None else self.sums + sums

    def reduce(self, gather: Callable[[Any], list[Any]]) -> None:
        """Add the sums of all processes; one that had no window brings none."""
        sums = [each for each in gather(None if self.sums is None else self.sums.cpu()) if each is not None]
        self.sums = torch.stack(sums).sum(dim=0) if sums else None

    def per_series(self) -> dict[str, list[float]]:
        """MSE and MAE of every series, standardised; NaN for a series without an observed target."""
        assert self.sums is not None
        square, absolute, count = self.sums.cpu()[:3]
        return {"mse": (square / count).tolist(), "mae": (absolute / count).tolist()}

    def compute(self) -> dict[str, float]:
        """MSE and MAE over all observed targets (standardised), and MASE as the mean over series.

        With quantiles also the mean pinball loss (standardised), and the CRPS in user units as the mean over series,
        approximated as `crps_weights` says.
        """
        if self.sums is None:
            nothing = {"mse": float("nan"), "mae": float("nan")}
            return {**nothing, "pinball": float("nan")} if self.quantiles else nothing
        keep = list(self.target_index) if self.target_index is not None else slice(None)
        square, absolute, count, *probable = self.sums.cpu()[:, keep]
        metrics = {"mse": float(square.sum() / count.sum()), "mae": float(absolute.sum() / count.sum())}
        if self.scale is not None:
            metrics["mase"] = mean_of_finite(absolute / count * self.scale[keep])
        if probable:
            metrics["pinball"] = float(probable[0].sum() / count.sum())
            if self.std is not None:
                metrics["crps"] = mean_of_finite(probable[1] / count * self.std[keep])
        return metrics


def mean_of_finite(values: Float[Tensor, " s"]) -> float:
    """The mean over series; one that is constant over the season, or has no target, has no scaled error."""
    return float(values[values.isfinite()].mean())


@tasks.register("forecasting", kind="series")
class Forecasting:
    """Predict the next `horizon` values of every series.

    Args:
        loss: What training lowers: squared, absolute or Huber error of standardised values, or the pinball loss of
            `quantiles`.
        target_index: The series that are forecast for; None is all of them.
        quantiles: Levels that the model forecasts, for the loss "pinball"; its last axis is theirs.
    """

    def __init__(
        self,
        *,
        loss: Literal["mse", "mae", "huber", "pinball"] = "mse",
        target_index: tuple[int, ...] | None = None,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        require_quantiles(quantiles)
        if (loss == "pinball") != bool(quantiles):
            raise ConfigError(
                f"loss={loss!r} with quantiles={quantiles}: the loss 'pinball' needs quantiles, as (0.1, 0.5, 0.9), "
                "and quantiles need the loss 'pinball'."
            )
        self.kind = loss
        self.quantiles = quantiles
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
        """The error summed over observed targets, and how many there are; of quantiles the mean over levels."""
        forecast = _forecast(model, batch, self.quantiles)
        assert batch.y is not None and batch.y_observed is not None
        y, observed = batch.y, batch.y_observed
        if self.target_index is not None:
            keep = list(self.target_index)
            forecast, y, observed = forecast[:, :, keep], y[..., keep], observed[..., keep]
        if self.kind == "pinball":
            each = pinball(forecast, torch.where(observed, y, 0.0), self.quantiles).mean(-1)
            return Loss(torch.where(observed, each, 0.0).sum(), observed.sum())
        # Exactly 0 where there is no truth, whatever stands there.
        errors = torch.where(observed, forecast - y, 0.0)
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
        std = self.std if std is None else std
        return ForecastEvaluator(self.target_index, seasonal_errors, std, self.quantiles)

    def score(self, metrics: dict[str, float]) -> float:
        """The validation error that decides, lower is better: that of the loss, and MSE for "mse" and "huber"."""
        return metrics[self.kind if self.kind in ("mae", "pinball") else "mse"]
