"""Split-conformal intervals for any model, and what they are worth: coverage, width and CRPS.

Source: split conformal prediction (Vovk, Gammerman and Shafer 2005; Lei et al. 2018, arXiv:1604.04173) with the
absolute residual as score, and conformalised quantile regression (Romano, Patterson and Candes 2019, arXiv:1905.03222)
where the model forecasts quantiles.
Departures: the residuals are those of the validation windows, which overlap and follow one another in time, and on
which the model's weights were chosen; coverage is therefore expected on average over windows and series of a process
that does not drift, and nothing is guaranteed beyond that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.data.windows import Windows
from selectra.errors import ConfigError
from selectra.tasks.forecasting import crps_weights, middle, pinball, predict

# From these the CRPS of a model of points is computed, whatever levels are shown.
GRID = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0)
# Residuals that are kept; every second, third, ... window where there are more.
MAX_RESIDUALS = 2**26
# Windows times series in one pass.
MAX_SERIES_IN_BATCH = 2**13


@dataclass(frozen=True)
class Calibration:
    """By how much the intervals of each level are widened, in standard deviations of the training rows.

    Args:
        levels: Per cent, rising.
        radii: One for each level, step and series.
        quantiles: Levels of the model's last axis; empty for a model of points.
        windows: Validation windows that they come from.
        pooled: Share of series and steps with too few residuals of their own, whose radius comes from all series.
    """

    levels: tuple[float, ...]
    radii: Float[np.ndarray, "k h s"]
    quantiles: tuple[float, ...] = ()
    windows: int = 0
    pooled: float = 0.0

    def bounds(self, forecast: Float[Tensor, "b h s *q"]) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds `(k, b, h, s)` of all levels; a higher level lies around a lower one."""
        radii = torch.from_numpy(self.radii).to(forecast)
        pairs = [_base(forecast, self.quantiles, level) for level in self.levels]
        low = torch.stack([lo - radius for (lo, _), radius in zip(pairs, radii, strict=True)])
        high = torch.stack([hi + radius for (_, hi), radius in zip(pairs, radii, strict=True)])
        # Radii may be negative where the model's own quantiles are too far apart.
        point = middle(forecast, self.quantiles)
        return torch.minimum(low, point).cummin(0).values, torch.maximum(high, point).cummax(0).values

    def shown(self, levels: Sequence[float]) -> list[int]:
        """The places of these levels."""
        return [self.levels.index(level) for level in levels]


def check_levels(level: Any) -> tuple[float, ...]:
    """Levels in per cent, rising, from what a user gave.

    Raises:
        ConfigError: One is no number between 0 and 100.
    """
    if level is None:
        return ()
    given = list(level) if isinstance(level, (list, tuple, set, range, np.ndarray)) else [level]
    for each in given:
        number = isinstance(each, (int, float, np.number)) and not isinstance(each, bool)
        if not number or not 0 < float(each) < 100:
            raise ConfigError(f"level={level!r}: levels are numbers between 0 and 100, as [80, 95], or None for none")
    return tuple(sorted({float(each) for each in given}))


def column_names(alias: str, levels: Sequence[float]) -> list[str]:
    """Nixtla's columns: the forecast, then lower bounds from the widest, then upper bounds to the widest."""
    low = [f"{alias}-lo-{level:g}" for level in reversed(levels)]
    return [alias, *low, *(f"{alias}-hi-{level:g}" for level in levels)]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    windows: Windows,
    levels: Sequence[float],
    quantiles: tuple[float, ...] = (),
    batch_size: int = 256,
) -> Calibration:
    """Radii from a model's residuals on validation windows.

    For each series, step and level the radius is the ceil((n + 1) * level)-th smallest of its n residuals. Where n is
    too small for that, residuals of all series at that step are taken, each over its series' mean residual; where these
    are too few as well, the largest of them.
    """
    levels = sorted({*levels, *_grid(quantiles)})
    size = windows.horizon * windows.values.shape[1]
    chosen = range(0, len(windows), max(1, ceil(len(windows) * size / MAX_RESIDUALS)))
    kinds = {_pair(quantiles, level) for level in levels}
    scores: dict[tuple[int, int] | None, list[Tensor]] = {kind: [] for kind in kinds}
    batch_size = max(1, min(batch_size, MAX_SERIES_IN_BATCH // windows.values.shape[1]))
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for start in range(0, len(chosen), batch_size):
        batch = windows.__getitems__(chosen[start : start + batch_size]).to(device)
        assert batch.y is not None and batch.y_observed is not None
        forecast = predict(model, batch)
        for kind, found in scores.items():
            low, high = _of_pair(forecast, quantiles, kind)
            score = torch.maximum(low - batch.y, batch.y - high)
            found.append(torch.where(batch.y_observed, score, torch.inf).cpu())
    radii = np.empty((len(levels), windows.horizon, windows.values.shape[1]), np.float32)
    pooled = 0.0
    for kind in kinds:
        ordered = torch.cat(scores.pop(kind)).numpy()
        ordered.sort(axis=0)
        for i, level in enumerate(levels):
            if _pair(quantiles, level) == kind:
                radii[i], few = _radius(ordered, level / 100)
                pooled = max(pooled, float(few))
    return Calibration(tuple(levels), radii, quantiles, len(chosen), pooled)


def _radius(ordered: np.ndarray, level: float) -> tuple[np.ndarray, float]:
    """The radius of each step and series `(h, s)`, and the share that came from all series."""
    count = np.isfinite(ordered).sum(0)
    # The rounding keeps 0.95 * 20 at 19.
    rank = np.ceil(np.round((count + 1) * level, 9)).astype(int)
    few = rank > count
    radius = np.take_along_axis(ordered, np.minimum(rank, len(ordered))[None] - 1, 0)[0]
    if not few.any():
        return radius, 0.0
    finite = np.where(np.isfinite(ordered), np.abs(ordered), 0.0)
    mean = finite.sum((0, 1)) / np.maximum(count.sum(0), 1)
    usual = np.median(mean[mean > 0]) if (mean > 0).any() else 1.0
    mean = np.where(mean > 0, mean, usual)
    for step in np.flatnonzero(few.any(1)):
        every = (ordered[:, step] / mean).ravel()
        every = np.sort(every[np.isfinite(every)])
        if len(every) == 0:
            every = np.sort((ordered / mean)[np.isfinite(ordered)])
        place = min(ceil(round((len(every) + 1) * level, 9)), len(every)) - 1
        radius[step] = np.where(few[step], every[place] * mean, radius[step])
    return radius, float(few.mean())


def _grid(quantiles: tuple[float, ...]) -> tuple[float, ...]:
    """The levels from which the CRPS is computed: those that the model forecasts itself, else `GRID`."""
    own = [round(200 * q - 100, 6) for q in quantiles if q > 0.5]
    return tuple(level for level in own if _pair(quantiles, level)) or GRID


def _pair(quantiles: tuple[float, ...], level: float) -> tuple[int, int] | None:
    """Places of the quantiles that bound the level; None where the model does not forecast both."""
    wanted = ((1 - level / 100) / 2, (1 + level / 100) / 2)
    places = [next((i for i, q in enumerate(quantiles) if abs(q - each) < 1e-6), None) for each in wanted]
    return None if places[0] is None or places[1] is None else (places[0], places[1])


def _of_pair(
    forecast: Tensor, quantiles: tuple[float, ...], pair: tuple[int, int] | None
) -> tuple[Float[Tensor, "b h s"], Float[Tensor, "b h s"]]:
    if pair is None:
        point = middle(forecast, quantiles)
        return point, point
    return forecast[..., pair[0]], forecast[..., pair[1]]


def _base(forecast: Tensor, quantiles: tuple[float, ...], level: float) -> tuple[Tensor, Tensor]:
    """What the radius is added to: the model's own quantiles of this level, else its point forecast."""
    return _of_pair(forecast, quantiles, _pair(quantiles, level))


class IntervalScores:
    """Coverage, width and CRPS on observed targets, per series, in float64."""

    def __init__(self, calibration: Calibration, levels: Sequence[float]) -> None:
        self.calibration, self.levels = calibration, tuple(levels)
        self.sums: Float[Tensor, "r s"] | None = None

    @torch.no_grad()
    def update(self, forecast: Float[Tensor, "b h s *q"], y: Tensor, observed: Tensor) -> None:
        """Add one batch, standardised."""
        low, high = self.calibration.bounds(forecast)
        y = torch.where(observed, y, 0.0)
        rows = [observed.double(), self._crps(forecast, low, high, y)]
        for i in self.calibration.shown(self.levels):
            rows += [((low[i] <= y) & (y <= high[i])).double(), (high[i] - low[i]).double()]
        sums = torch.stack([torch.where(observed, row, 0.0).sum((0, 1)) for row in rows]).cpu()
        self.sums = sums if self.sums is None else self.sums + sums

    def _crps(self, forecast: Tensor, low: Tensor, high: Tensor, y: Tensor) -> Float[Tensor, "b h s"]:
        """Twice the pinball loss of the bounds and the point, as `crps_weights` approximates it."""
        # The levels that are shown beside the grid must not change it.
        grid = _grid(self.calibration.quantiles)
        places = [i for i, level in enumerate(self.calibration.levels) if level in grid]
        levels, low, high = np.array(grid) / 100, low[places], high[places]
        probabilities = [*((1 - levels) / 2)[::-1], 0.5, *((1 + levels) / 2)]
        point = middle(forecast, self.calibration.quantiles)[None]
        values = torch.cat([low.flip(0), point, high]).movedim(0, -1)
        weights = torch.tensor(crps_weights(probabilities), dtype=torch.float64, device=y.device)
        return 2 * pinball(values, y, probabilities).double() @ weights

    def compute(self, std: np.ndarray, target_index: int | None = None) -> dict[str, float]:
        """`coverage-80`, ... and `width-80`, ... of all observed targets, the width in standard deviations; `crps` in
        user units, as the mean over series."""
        assert self.sums is not None
        keep = slice(None) if target_index is None else [target_index]
        count, crps, *rest = self.sums.numpy()[:, keep]
        scaled = np.where(count > 0, crps / np.maximum(count, 1), np.nan) * np.asarray(std)[keep]
        found = {"crps": float(np.nanmean(scaled))}
        for i, level in enumerate(self.levels):
            found[f"coverage-{level:g}"] = float(rest[2 * i].sum() / count.sum())
            found[f"width-{level:g}"] = float(rest[2 * i + 1].sum() / count.sum())
        return found
