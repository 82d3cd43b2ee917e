"""A scikit-learn style forecaster on Nixtla's data frames."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from selectra.data.panel import Panel, extended, read_again, read_panel, with_future
from selectra.data.series import SeriesData
from selectra.data.splits import Borders
from selectra.data.stamps import season_of
from selectra.errors import ConfigError, DataError
from selectra.forecaster.frames import read_frame
from selectra.forecaster.intervals import calibrate, check_levels
from selectra.forecaster.predictor import Predictor
from selectra.forecaster.scoring import build_model, build_task, quantiles_of, task_of
from selectra.forecaster.settings import check_count, model_spec, refuse_unknown, run_of
from selectra.spec import Spec
from selectra.train.loop import fit

# Nixtla's words at this border, and ours inside.
WORDS = {"h": "horizon", "input_size": "seq_len"}
# The part of the rows that is for validation where `fit` is not told.
VALIDATION = 0.1


class Forecaster:
    """Forecast all series of a data frame with one model, and say how sure it is.

    The constructor stores its arguments and nothing else, as scikit-learn asks; `fit` checks them.

    Frames are pandas, polars or arrow, long (`unique_id, ds, y`) or wide (a time column and a column a series), and
    results are of the kind that came in. Further columns of a long frame are covariates, numbers all: those in
    `futr_exog_list` are known ahead, the others up to the last row. Gaps of time and missing values are masked in
    inputs and targets. Series may begin and end where they like: each is forecast from its own last row.

    Args:
        model: A registered name (`selectra list`), or a `Spec` with arguments.
        h: Rows to forecast.
        freq: pandas' alias of the distance of rows; None infers it.
        level: Intervals in per cent, such as [80, 95], or None for none. They are split-conformal, of the validation
            rows' residuals for each series and step; where the model forecasts the quantiles itself
            (`model_args={"quantiles": (0.1, 0.5, 0.9)}`) they widen or narrow those.
        input_size: Rows that the model sees; None is the largest of `h`, two seasons and 96.
        model_args: Arguments of the model, as `selectra show` lists them.
        train_args: Of the training: max_steps or epochs (default 10), batch_size (windows; 32, and with over 512
            series fewer), learning_rate (1e-3), early_stop_patience (3; passes without a better validation error),
            loss ("mse", "mae", "huber"), device ("cpu", "cuda", "auto"), verbose, weight_decay, warmup_steps,
            schedule, clip, accumulate, eval_every, threads.
        seed: Seed of weights and of the order of windows.
        futr_exog_list: Columns that are known ahead; `predict` asks for their next rows in `futr_df`.
    """

    def __init__(
        self,
        model: str | Spec = "tsm2",
        h: int = 96,
        freq: str | None = None,
        level: Sequence[float] | None = None,
        input_size: int | None = None,
        model_args: Mapping[str, Any] = {},
        train_args: Mapping[str, Any] = {},
        seed: int = 0,
        futr_exog_list: Sequence[str] = (),
        **moved: Any,
    ) -> None:
        refuse_unknown(moved, self._names())
        self.model = model
        self.h = h
        self.freq = freq
        self.level = level
        self.input_size = input_size
        self.model_args = model_args
        self.train_args = train_args
        self.seed = seed
        self.futr_exog_list = futr_exog_list

    @classmethod
    def _names(cls) -> list[str]:
        parameters = inspect.signature(cls).parameters.values()
        return [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Change some of the constructor's arguments."""
        refuse_unknown({name: value for name, value in params.items() if name not in self._names()}, self._names())
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"Forecaster({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    @property
    def alias(self) -> str:
        """The name of the forecast's column."""
        return self.model if isinstance(self.model, str) else self.model.name

    def fit(self, df: object, static_df: object | None = None, val_size: int | None = None) -> Self:
        """Train on a frame.

        Args:
            df: Long or wide.
            static_df: Covariates that are constant in time: `unique_id` and numbers, one row a series.
            val_size: Rows at the end that choose the weights and calibrate the intervals; None is the last tenth.

        Raises:
            ConfigError: An argument is not of its kind.
            DataError: The frame cannot be used as it is; the message says what to change.
        """
        self._check(val_size)
        panel = self._read(df, static_df)
        self._fit(panel, val_size)
        self.panel_ = panel.tail(self.predictor_.seq_len)
        return self

    def predict(self, df: object | None = None, futr_df: object | None = None) -> Any:
        """The `h` rows after the last one of each series, as `unique_id, ds, <model>` and bounds of each level.

        Args:
            df: Rows to forecast from, with the columns and series of `fit` in any order; None goes on from those of
                `fit` and `update`.
            futr_df: The next `h` rows of the covariates in `futr_exog_list`.

        Raises:
            ConfigError: This Forecaster is not fitted.
            DataError: A frame has other columns or series than that of `fit`, too few rows, or lacks a value.
        """
        predictor, style = self._fitted(), self.style_
        panel = self.panel_
        if df is not None:
            frame, style = read_frame(df, like=self.style_)
            panel = read_again(frame, panel)
            if panel.table.rows < predictor.seq_len:
                raise DataError(f"the model sees {predictor.seq_len} rows, the frame has {panel.table.rows}")
        panel = with_future(panel, self._ahead(futr_df), predictor.horizon)
        return style.restored(predictor.from_ends(panel))

    def update(self, new_rows: object, futr_df: object | None = None) -> Any:
        """Add rows that came after those of `fit`, and forecast from them without training again.

        The result is what `predict` gives for the whole longer frame, and what `predict()` gives from here on. Every
        model reads a window of `input_size` rows that moves on with the data, and most normalise it by its own
        statistics, so that no state of a model can be carried from one window to the next without changing the
        forecast: an update reads the new rows alone, and costs one pass of the model over the last window.

        Args:
            new_rows: Rows after the last one of their series, with the columns of `fit`; series may be absent from a
                long frame, and then stay where they end.
            futr_df: As for `predict`.

        Raises:
            DataError: A row is not new, does not fit the frequency, or has other columns or series.
        """
        self._fitted()
        frame, style = read_frame(new_rows, "new_rows", self.style_)
        panel = extended(self.panel_, frame)
        ahead = with_future(panel, self._ahead(futr_df), self.predictor_.horizon)
        found = self.predictor_.from_ends(ahead)
        self.panel_ = panel.tail(self.predictor_.seq_len)
        return style.restored(found)

    def cross_validation(
        self,
        df: object,
        n_windows: int = 1,
        step_size: int | None = None,
        static_df: object | None = None,
        val_size: int | None = None,
    ) -> Any:
        """Forecasts of the last rows from moving cutoffs, as `unique_id, ds, cutoff, y, <model>` and bounds.

        The model is trained once, on the rows up to the first cutoff. Cutoffs are rows of the common axis; a series has
        no rows after its own end.

        Args:
            df: As for `fit`.
            n_windows: Number of cutoffs.
            step_size: Rows between cutoffs; `h` when None.
            static_df: As for `fit`.
            val_size: As for `fit`; the rows before the first cutoff.
        """
        self._check(val_size)
        check_count("n_windows", n_windows)
        check_count("step_size", step_size, optional=True)
        step = self.h if step_size is None else step_size
        panel = self._read(df, static_df)
        table, needed = panel.table, self.h + step * (n_windows - 1)
        first = table.rows - needed
        if first < 2:
            raise DataError(
                f"{n_windows} windows of {self.h} rows, {step} apart, need more than {needed} rows, "
                f"there are {table.rows}"
            )
        head = panel.head(first)
        self._fit(head, val_size)
        self.panel_ = head.tail(self.predictor_.seq_len)
        starts = np.arange(first, table.rows - self.h + 1, step)
        columns = self.predictor_.at(panel, starts)
        parts = []
        for i, start in enumerate(starts):
            rows = start + np.arange(self.h)
            part = {"unique_id": np.repeat(table.names, self.h), "ds": np.tile(table.stamps[rows], len(table.names))}
            part |= {"cutoff": table.stamps[start - 1], "y": table.values[rows].T.ravel()}
            part |= {name: found[i].T.ravel() for name, found in columns.items()}
            inside = (rows[None] < panel.ends[:, None]).ravel()
            parts.append(pd.DataFrame(part)[inside])
        return self.style_.restored(pd.concat(parts, ignore_index=True))

    def save(self, path: str | Path) -> None:
        """Write everything that `predict` and `update` need into a folder: safetensors and JSON, whole or not at all.

        Raises:
            ConfigError: Not fitted, or the folder holds something else, or cannot be written.
        """
        from selectra.forecaster.storage import save_forecaster  # noqa: PLC0415 - it needs this class

        self._fitted()
        save_forecaster(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Forecaster:
        """Read what `save` wrote; nothing in it is executed.

        Raises:
            DataError: The folder holds no saved Forecaster, or a damaged one.
        """
        from selectra.forecaster.storage import load_forecaster  # noqa: PLC0415 - it needs this class

        return load_forecaster(Path(path))

    def _check(self, val_size: int | None) -> None:
        """Refuse what no training could use; the constructor itself stores everything."""
        spec = model_spec(self.model, self.model_args)
        check_count("h", self.h)
        check_count("input_size", self.input_size, optional=True)
        check_count("val_size", val_size, optional=True)
        check_count("seed", self.seed, least=0)
        check_levels(self.level)
        run_of(spec, Spec("forecasting"), self.train_args, self.seed, self.alias)
        if not isinstance(self.freq, str | None):
            raise ConfigError(f'freq must be an alias of pandas such as "h", or None, got {self.freq!r}')
        names = self.futr_exog_list
        if isinstance(names, str) or any(not isinstance(name, str) for name in names):
            raise ConfigError(f"futr_exog_list must be a list of columns, got {names!r}")

    def _read(self, df: object, static_df: object | None) -> Panel:
        frame, self.style_ = read_frame(df)
        static = None if static_df is None else read_frame(static_df, "static_df")[0]
        return read_panel(frame, freq=self.freq, ahead=list(self.futr_exog_list), static=static)

    def _fit(self, panel: Panel, val_size: int | None) -> None:
        data = self._data(panel, val_size)
        spec, args = model_spec(self.model, self.model_args), dict(self.train_args)
        n_series = len(panel.table.names)
        run = run_of(spec, task_of(spec, args.get("loss")), args, self.seed, self.alias, n_series)
        model = build_model(spec, data, self.seed)
        val, levels = data.windows("val"), check_levels(self.level)
        progress = bool(args.get("verbose", False))
        self.fitted_ = fit(model, build_task(run, data), data.windows("train"), val, run, None, progress=progress)
        calibration = calibrate(model, val, levels, quantiles_of(model)) if levels else None
        self.facts_ = data.facts
        # What `set_params` changes from here on is for the next fit.
        self.params_ = self.get_params()
        self.predictor_ = Predictor(
            model, data.seq_len, data.horizon, data.scaler, data.covariate_scalers, calibration, levels, self.alias
        )

    def _data(self, panel: Panel, val_size: int | None) -> SeriesData:
        table, size = panel.table, self.input_size
        if size is None:
            size = max(self.h, 2 * season_of(table.freq), 96)
        lengths: dict[str, Any] = {WORDS["h"]: self.h, WORDS["input_size"]: size}
        borders = None
        if val_size is not None:
            borders = Borders(table.rows - val_size, table.rows, table.rows)
            if val_size < self.h or borders.windows("train", size, self.h) < 1:
                raise DataError(
                    f"val_size={val_size} leaves no window of {size} rows in and {self.h} out in one of the parts; "
                    f"between {self.h} and {table.rows - size - self.h} rows fit, there are {table.rows}"
                )
        return SeriesData(table, split="fit", covariates=panel.covariates, borders=borders, **lengths)

    def _ahead(self, futr_df: object | None) -> pd.DataFrame | None:
        return None if futr_df is None else read_frame(futr_df, "futr_df", self.style_)[0]

    def _fitted(self) -> Predictor:
        if not hasattr(self, "predictor_"):
            raise ConfigError("this Forecaster is not fitted; call fit(df) first")
        return self.predictor_
