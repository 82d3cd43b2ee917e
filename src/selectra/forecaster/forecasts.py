"""What a job's model forecasts in the user's units: beyond the data, for its last rows, and from each cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selectra.data.series import SeriesData
from selectra.data.windows import SeriesBatch
from selectra.forecaster.predictor import Predictor
from selectra.forecaster.scoring import device_of


@dataclass(frozen=True)
class Forecasts:
    """One model's columns `(horizon, s)`, and those of `cutoffs` `(cutoffs, horizon, s)`."""

    predictor: Predictor
    future: dict[str, np.ndarray]
    recent: dict[str, np.ndarray]
    cutoffs: dict[str, np.ndarray]

    def errors(self, data: SeriesData, cutoffs: Sequence[int]) -> dict[str, Any]:
        """MSE and MAE of standardised values over all cutoffs, the MSE of each, and the coverage of each level."""
        keep = slice(None) if data.target_index is None else [data.target_index]
        truth = np.stack([data.table.values[row : row + data.horizon] for row in cutoffs])[..., keep]
        alias, std = self.predictor.alias, data.scaler.std[keep]
        error = (self.cutoffs[alias][..., keep] - truth) / std
        seen = ~np.isnan(truth)
        found: dict[str, Any] = {
            "mse": _mean(error**2, seen),
            "mae": _mean(np.abs(error), seen),
            "mse_by_cutoff": [_mean(each**2, there) for each, there in zip(error, seen, strict=True)],
        }
        for level in self.predictor.levels:
            low, high = (self.cutoffs[f"{alias}-{side}-{level:g}"][..., keep] for side in ("lo", "hi"))
            found[f"coverage-{level:g}"] = _mean((low <= truth) & (truth <= high), seen)
        return found


def _mean(values: np.ndarray, seen: np.ndarray) -> float | None:
    return float(values[seen].mean()) if seen.any() else None


def forecasts(predictor: Predictor, data: SeriesData, cutoffs: Sequence[int]) -> Forecasts:
    """Run a model on the windows that a job shows."""

    def of(batch: SeriesBatch) -> dict[str, np.ndarray]:
        with torch.no_grad():
            predictor.model.eval()
            return predictor.columns(batch.to(device_of(predictor.model)))

    future = {name: values[0] for name, values in of(data.future_window()).items()}
    recent = {name: values[0] for name, values in of(data.window_at(data.table.rows - data.horizon)).items()}
    each = [of(data.window_at(row)) for row in cutoffs]
    joined = {name: np.concatenate([one[name] for one in each]) for name in each[0]} if each else {}
    return Forecasts(predictor, future, recent, joined)
