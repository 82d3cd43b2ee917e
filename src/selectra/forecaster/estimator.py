"""A scikit-learn style forecaster on Nixtla's data frames."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import pandas as pd
from torch import nn

from selectra.data.series import SeriesData
from selectra.data.stamps import season_of
from selectra.data.table import Table, read_table, to_pandas
from selectra.errors import ConfigError, DataError
from selectra.forecaster.files import long_frame
from selectra.forecaster.scoring import build_model, build_task, forecast_units
from selectra.spec import Optim, Run, Spec, Train
from selectra.train.loop import Fitted, fit

# Nixtla's words at this border, and ours inside.
WORDS = {"h": "horizon", "input_size": "seq_len"}


class Forecaster:
    """Forecast all series of a data frame with one model.

    The constructor stores its arguments and nothing else, as scikit-learn asks.

    Args:
        model: A registered name (`selectra list`), or a `Spec` with arguments.
        h: Rows to forecast.
        input_size: Rows that the model sees; None is the largest of `h`, two seasons and 96.
        freq: pandas' alias of the distance of rows; None infers it.
        max_steps: Training steps; None is ten passes over the training windows.
        batch_size: Windows in a training step.
        learning_rate: Highest learning rate.
        early_stop_patience: Passes without a better validation error after which training stops.
        seed: Seed of weights and of the order of windows.
        device: "cpu", "cuda", or "auto".
        verbose: Show progress.
    """

    def __init__(
        self,
        model: str | Spec = "tsm2",
        h: int = 96,
        *,
        input_size: int | None = None,
        freq: str | None = None,
        max_steps: int | None = None,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        early_stop_patience: int = 3,
        seed: int = 0,
        device: str = "auto",
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.h = h
        self.input_size = input_size
        self.freq = freq
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.early_stop_patience = early_stop_patience
        self.seed = seed
        self.device = device
        self.verbose = verbose

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Change some of the constructor's arguments."""
        for name, value in params.items():
            if name not in self._names():
                raise ConfigError(f"Forecaster takes no argument {name!r}; it takes {self._names()}.")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"Forecaster({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    @property
    def alias(self) -> str:
        """The name of the forecast's column."""
        return self.model if isinstance(self.model, str) else self.model.name

    def fit(self, df: object) -> Self:
        """Train on a long frame `unique_id, ds, y`, or on a wide one; the last tenth of the rows is for validation.

        Raises:
            ConfigError: An argument of the constructor is not of its kind.
            DataError: The frame cannot be used as it is; the message says what to change.
        """
        self._check()
        frame = to_pandas(df)
        table = read_table(frame, freq=self.freq)
        self.dtypes_ = _Dtypes.of(frame, table)
        self.data_ = self._data(table)
        self.model_, self.fitted_ = self._train(self.data_)
        return self

    def predict(self, df: object | None = None) -> pd.DataFrame:
        """The `h` rows after the last one, as `unique_id, ds, <model>`.

        Args:
            df: Rows to forecast from, with the series of `fit` in any order; None takes those of `fit`.
        """
        data, dtypes = self._fitted(), self.dtypes_
        if df is not None:
            frame = to_pandas(df)
            table = read_table(frame, freq=data.freq)
            dtypes = _Dtypes.of(frame, table)
            data = _Continued(_in_order(table, data.names), data)
        forecast = forecast_units(self.model_, data, data.future_window())[0]
        columns = {self.alias: forecast}
        return dtypes.restored(long_frame(data.names, data.future_stamps(), columns, list(range(len(data.names)))))

    def cross_validation(self, df: object, n_windows: int = 1, step_size: int | None = None) -> pd.DataFrame:
        """Forecasts of the last rows from moving cutoffs, as `unique_id, ds, cutoff, y, <model>`.

        The model is trained once, on the rows up to the first cutoff.

        Args:
            n_windows: Number of cutoffs.
            step_size: Rows between cutoffs; `h` when None.
        """
        self._check()
        _check_count("n_windows", n_windows)
        _check_count("step_size", step_size, optional=True)
        step = self.h if step_size is None else step_size
        frame = to_pandas(df)
        table = read_table(frame, freq=self.freq)
        self.dtypes_ = _Dtypes.of(frame, table)
        first = table.rows - self.h - step * (n_windows - 1)
        if first < 2:
            needed = self.h + step * (n_windows - 1)
            raise DataError(
                f"{n_windows} windows of {self.h} rows, {step} apart, need more than {needed} rows, "
                f"there are {table.rows}"
            )
        self.data_ = self._data(_head(table, first))
        self.model_, self.fitted_ = self._train(self.data_)
        whole, parts = _Continued(table, self.data_), []
        for row in range(first, table.rows - self.h + 1, step):
            forecast = forecast_units(self.model_, whole, whole.window_at(row))[0]
            columns = {"y": table.values[row : row + self.h], self.alias: forecast}
            part = long_frame(table.names, table.stamps[row : row + self.h], columns, list(range(len(table.names))))
            part.insert(2, "cutoff", table.stamps[row - 1])
            parts.append(part)
        return self.dtypes_.restored(pd.concat(parts, ignore_index=True))

    def _check(self) -> None:
        """Refuse what no training could use; the constructor itself stores everything."""
        if not isinstance(self.model, str | Spec):
            raise ConfigError(f"model must be a name or a Spec, got {self.model!r}")
        for name in ("h", "batch_size"):
            _check_count(name, getattr(self, name))
        for name in ("input_size", "max_steps", "early_stop_patience"):
            _check_count(name, getattr(self, name), optional=True)
        _check_count("seed", self.seed, least=0)
        rate = self.learning_rate
        if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 < float(rate) < math.inf:
            raise ConfigError(f"learning_rate must be a number above 0, got {rate!r}")
        if not isinstance(self.device, str):
            raise ConfigError(f'device must be "cpu", "cuda" or "auto", got {self.device!r}')
        if not isinstance(self.freq, str | None):
            raise ConfigError(f'freq must be an alias of pandas such as "h", or None, got {self.freq!r}')

    def _data(self, table: Table) -> SeriesData:
        size = self.input_size
        if size is None:
            season = season_of(table.freq)
            size = max(self.h, 2 * season, 96)
        lengths: dict[str, Any] = {WORDS["h"]: self.h, WORDS["input_size"]: size}
        return SeriesData(table, split="fit", **lengths)

    def _train(self, data: SeriesData) -> tuple[nn.Module, Fitted]:
        spec = Spec(self.model) if isinstance(self.model, str) else self.model
        length: dict[str, Any] = {"epochs": 10} if self.max_steps is None else {"steps": self.max_steps}
        run = Run(
            model=spec,
            data=Spec("data_frame"),
            task=Spec("forecasting"),
            optim=Optim(lr=self.learning_rate),
            train=Train(
                **length,
                batch_size=self.batch_size,
                patience=self.early_stop_patience,
                seed=self.seed,
                device=self.device,
            ),
            name=self.alias,
        )
        model = build_model(spec, data, self.seed)
        task = build_task(run, data)
        return model, fit(model, task, data.windows("train"), data.windows("val"), run, None, progress=self.verbose)

    def _fitted(self) -> SeriesData:
        if not hasattr(self, "model_"):
            raise ConfigError("this Forecaster is not fitted; call fit(df) first")
        return self.data_


def _check_count(name: str, value: object, *, least: int = 1, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        allowed = " or None" if optional else ""
        raise ConfigError(f"{name} must be a whole number of at least {least}{allowed}, got {value!r}")


@dataclass(frozen=True)
class _Dtypes:
    """What the user's frame has in the columns that tables hold as text and as stamps in UTC."""

    ids: Any = None
    zone: Any = None

    @classmethod
    def of(cls, frame: pd.DataFrame, table: Table) -> _Dtypes:
        """Of a frame and the table that was read from it."""
        dtypes = dict(zip(map(str, frame.columns), frame.dtypes, strict=True))
        ids = dtypes["unique_id"] if table.layout == "long" else None
        whole = ids is not None and pd.api.types.is_integer_dtype(ids)
        return cls(ids if whole else None, getattr(dtypes[table.time_name], "tz", None))

    def restored(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A forecast in the user's types."""
        if self.ids is not None:
            frame["unique_id"] = frame["unique_id"].astype("int64").astype(self.ids)
        if self.zone is not None:
            for name in {"ds", "cutoff"} & set(frame.columns):
                frame[name] = frame[name].dt.tz_localize("UTC").dt.tz_convert(self.zone)
        return frame


def _in_order(table: Table, names: tuple[str, ...]) -> Table:
    """The series of a table in the order of `names`."""
    if set(table.names) != set(names):
        raise DataError(f"fit saw the series {list(names)[:5]}, this frame has {list(table.names)[:5]}")
    order = [table.names.index(name) for name in names]
    return replace(table, names=names, values=table.values[:, order], observed=table.observed[:, order])


class _Continued(SeriesData):
    """Another table of the same series, scaled as the one that the model was trained on."""

    def __init__(self, table: Table, fitted: SeriesData) -> None:
        if table.rows < fitted.seq_len:
            raise DataError(f"the model sees {fitted.seq_len} rows, the frame has {table.rows}")
        self.table, self.scaler = table, fitted.scaler
        self.seq_len, self.horizon, self.target_index = fitted.seq_len, fitted.horizon, fitted.target_index


def _head(table: Table, rows: int) -> Table:
    """The first rows of a table."""
    return Table(
        table.names,
        table.stamps[:rows],
        np.ascontiguousarray(table.values[:rows]),
        np.ascontiguousarray(table.observed[:rows]),
        table.freq,
        rows,
    )
