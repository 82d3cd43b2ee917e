"""Covariates beside the series of a table: known up to now, known ahead, or constant in time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from selectra.data.windows import Scaler
from selectra.errors import DataError


def _nothing() -> np.ndarray:
    return np.zeros((0, 0))


@dataclass(frozen=True)
class Covariates:
    """Values in the units of the user, one row for each row of the table; NaN where nothing is known yet.

    `future` may have more rows than the table; `static` has one row for each series.
    """

    past: np.ndarray = field(default_factory=_nothing)
    future: np.ndarray = field(default_factory=_nothing)
    static: np.ndarray = field(default_factory=_nothing)
    past_names: tuple[str, ...] = ()
    future_names: tuple[str, ...] = ()
    static_names: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, int]:
        """What a model's constructor may take; kinds that are not there are left out."""
        counts = {"n_past": self.past_names, "n_future": self.future_names, "n_static": self.static_names}
        return {name: len(names) for name, names in counts.items() if names}


class CovariateScalers(NamedTuple):
    """Means and standard deviations of each covariate."""

    past: Scaler | None
    future: Scaler | None
    static: Scaler | None

    @classmethod
    def fit(cls, covariates: Covariates, rows: int) -> CovariateScalers:
        """From the first `rows` rows, those of training; static ones over the series.

        Raises:
            DataError: A covariate has no value in the training rows.
        """
        past = _fitted(covariates.past[:rows], covariates.past_names)
        future = _fitted(covariates.future[:rows], covariates.future_names)
        return cls(past, future, _fitted(covariates.static, covariates.static_names))

    def transform(self, covariates: Covariates) -> Standardised:
        """In standard deviations; 0, the mean, where nothing is known."""
        kinds = (covariates.past, covariates.future, covariates.static)
        return Standardised(
            *(
                None if scaler is None else np.nan_to_num(scaler.transform(values)).astype(np.float32)
                for scaler, values in zip(self, kinds, strict=True)
            )
        )


class Standardised(NamedTuple):
    """Covariates as models see them; None for a kind that is not there."""

    past: np.ndarray | None
    future: np.ndarray | None
    static: np.ndarray | None


def _fitted(values: np.ndarray, names: tuple[str, ...]) -> Scaler | None:
    if not names:
        return None
    seen = ~np.isnan(values)
    for name, known in zip(names, np.asarray(seen.any(axis=0)), strict=True):
        if not known:
            raise DataError(f"covariate {name!r} has no value in the training rows, so it cannot be scaled; remove it")
    return Scaler.fit(values, seen)


def carried(values: np.ndarray) -> np.ndarray:
    """Every gap filled with the last value known before it; NaN stays where none was."""
    return pd.DataFrame(values).ffill().to_numpy(dtype=np.float64)
