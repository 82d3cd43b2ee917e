"""A trained model, and what it takes to forecast in the user's units from new rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from selectra.data.covariates import CovariateScalers
from selectra.data.panel import Panel
from selectra.data.windows import Scaler, SeriesBatch
from selectra.forecaster.intervals import Calibration, column_names
from selectra.forecaster.scoring import device_of, quantiles_of
from selectra.tasks.forecasting import middle, predict

# Windows times series in one pass of the model.
MAX_SERIES_IN_BATCH = 2**13


@dataclass(frozen=True)
class Predictor:
    """Forecasts panels of the series that the model was trained on.

    Args:
        model: The trained model.
        seq_len: Rows that it sees.
        horizon: Rows that it forecasts.
        scaler: Of the series, from the training rows.
        covariate_scalers: Of the covariates.
        calibration: Of the intervals; None where there are none.
        levels: The intervals that are given out, in per cent.
        alias: The name of the forecast's column.
    """

    model: nn.Module
    seq_len: int
    horizon: int
    scaler: Scaler
    covariate_scalers: CovariateScalers
    calibration: Calibration | None
    levels: tuple[float, ...]
    alias: str

    def from_ends(self, panel: Panel) -> pd.DataFrame:
        """The `horizon` rows after each series' own last row, as `unique_id, ds, ...`.

        Series that end at the same row are forecast together, from one window of all series up to that row.
        """
        ends, stamps = panel.ends, panel.stamps_ahead(self.horizon)
        distinct = np.unique(ends)
        columns = self.at(panel, distinct)
        place = np.searchsorted(distinct, ends)
        rows = ends[:, None] + np.arange(self.horizon)
        return pd.DataFrame(
            {
                "unique_id": np.repeat(panel.table.names, self.horizon),
                "ds": stamps.to_numpy()[rows].ravel(),
                **{name: found[place, :, np.arange(len(ends))].ravel() for name, found in columns.items()},
            }
        )

    @torch.no_grad()
    def at(self, panel: Panel, ends: np.ndarray) -> dict[str, np.ndarray]:
        """Forecasts `(len(ends), horizon, s)` from the rows before each of `ends`, and their bounds."""
        self.model.eval()
        parts: list[dict[str, np.ndarray]] = []
        size = max(1, MAX_SERIES_IN_BATCH // len(panel.table.names))
        for start in range(0, len(ends), size):
            batch = self.window(panel, ends[start : start + size]).to(device_of(self.model))
            parts.append(self.columns(batch))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def columns(self, batch: SeriesBatch) -> dict[str, np.ndarray]:
        """The forecast of a batch and its bounds by column, `(b, h, s)` in the user's units."""
        forecast = predict(self.model, batch)
        found = [middle(forecast, quantiles_of(self.model))]
        if self.calibration is not None and self.levels:
            low, high = self.calibration.bounds(forecast)
            shown = self.calibration.shown(self.levels)
            found += [*(low[i] for i in reversed(shown)), *(high[i] for i in shown)]
        values = [self.scaler.inverse(each.cpu().double().numpy()) for each in found]
        return dict(zip(column_names(self.alias, self.levels if len(found) > 1 else ()), values, strict=True))

    def window(self, panel: Panel, ends: np.ndarray) -> SeriesBatch:
        """The `seq_len` rows before each of `ends`; rows before the first one count as not observed."""
        rows = ends[:, None] + np.arange(-self.seq_len, self.horizon)
        inside = (rows >= 0)[:, : self.seq_len, None]
        rows = np.maximum(rows, 0)
        before = rows[:, : self.seq_len]
        observed = panel.table.observed[before] & inside
        values = np.where(observed, self.scaler.transform(panel.table.values[before]), 0.0)
        covariates, scalers = panel.covariates, self.covariate_scalers
        past, future, static = covariates.past, covariates.future, covariates.static
        return SeriesBatch(
            x=torch.from_numpy(values.astype(np.float32)),
            observed=torch.from_numpy(observed),
            past=None if scalers.past is None else _scaled(past[before], scalers.past),
            future=None if scalers.future is None else _scaled(future[rows], scalers.future),
            static=None if scalers.static is None else _scaled(static, scalers.static).expand(len(ends), -1, -1),
        )


def _scaled(values: np.ndarray, scaler: Scaler) -> torch.Tensor:
    """In standard deviations; 0, the mean, where nothing is known."""
    return torch.from_numpy(np.nan_to_num(scaler.transform(values)).astype(np.float32))
