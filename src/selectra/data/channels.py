"""Covariates in the columns of a frame, and the channels in which models see them.

A covariate that says the same for all series at each stamp is one channel, another one is a channel for each series.
"""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from selectra.data.stamps import parse_stamps, time_column
from selectra.data.table import Table
from selectra.errors import DataError


@dataclass(frozen=True)
class Channel:
    """One covariate as models see it: a column, of one series where series differ."""

    column: str
    series: str | None = None

    @property
    def label(self) -> str:
        """For messages and notes."""
        return self.column if self.series is None else f"{self.column}[{self.series}]"


@dataclass(frozen=True)
class Channels:
    """Which covariates there are, as the first frame had them; later frames are read by it."""

    past: tuple[Channel, ...] = ()
    future: tuple[Channel, ...] = ()
    static: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns of the frame that they come from."""
        return list(dict.fromkeys(channel.column for channel in (*self.past, *self.future)))


def place(
    frame: pd.DataFrame, name: str, stamps: pd.DatetimeIndex, table: Table, long: bool, *, where: str = "the frame"
) -> np.ndarray:
    """A covariate on the axis: `(rows, s)` for a long frame, `(rows, 1)` for one without series."""
    time = "ds" if "ds" in frame.columns else time_column(frame, None)
    index, _ = parse_stamps(frame[time], str(time), freq=table.freq)
    rows = stamps.get_indexer(index)
    values = numbers(frame[name], name, where)
    if not long:
        found = np.full((len(stamps), 1), np.nan)
        found[rows[rows >= 0], 0] = values[rows >= 0]
        return found
    columns = pd.Index(table.names).get_indexer(frame["unique_id"].astype(str))
    used = (rows >= 0) & (columns >= 0)
    found = np.full((len(stamps), len(table.names)), np.nan)
    found[rows[used], columns[used]] = values[used]
    return found


def numbers(column: pd.Series, name: str, where: str) -> np.ndarray:
    """A column as float64; the first text that is no number is an error with its place."""
    numbers = pd.to_numeric(column, errors="coerce")
    text = (column.notna() & numbers.isna()).to_numpy()
    if text.any() or pd.api.types.is_datetime64_any_dtype(column):
        row = int(np.flatnonzero(text)[0]) if text.any() else 0
        raise DataError(
            f"column {name!r} of {where}, row {row + 1}: {column.iloc[row]!r} is not a number; covariates are numbers. "
            "Encode it, or remove the column."
        )
    values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isinf(values), np.nan, values)


def channels_of(name: str, placed: np.ndarray, names: tuple[str, ...]) -> list[Channel]:
    """One channel where all series agree at every stamp, else one for each."""
    return [Channel(name)] if _agree(placed) else [Channel(name, series) for series in names]


def _agree(placed: np.ndarray) -> bool:
    top, bottom = np.nan_to_num(placed, nan=-np.inf).max(1), np.nan_to_num(placed, nan=np.inf).min(1)
    return bool(((top == bottom) | (top < bottom)).all())


def channel_values(placed: np.ndarray, channel: Channel, names: tuple[str, ...], where: str) -> np.ndarray:
    """One channel's value in each row."""
    if channel.series is not None:
        if placed.shape[1] == 1 and len(names) > 1:
            raise DataError(f"{channel.column!r} differs between series, so {where} needs the column 'unique_id'")
        return placed[:, names.index(channel.series) if placed.shape[1] > 1 else 0]
    if not _agree(placed):
        raise DataError(
            f"{channel.column!r} was the same for all series at fit, and differs between them in {where}; fit again"
        )
    found = np.nan_to_num(placed, nan=-np.inf).max(1)
    return np.where(np.isinf(found), np.nan, found)
