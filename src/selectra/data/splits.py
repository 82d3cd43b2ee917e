"""Borders of training, validation and test rows, as in the long-horizon benchmarks.

Source: Time-Series-Library, `data_provider/data_loader.py` (`Dataset_ETT_hour`, `Dataset_ETT_minute`,
`Dataset_Custom`). Inputs of validation and test windows reach back into the part before by the look-back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from selectra.data.stamps import short
from selectra.errors import DataError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
# Twelve, four and four months of thirty days.
ETT_DAYS = (360, 480, 600)
SPLITS = {
    "ratio": "70 % training, 10 % validation, 20 % test",
    "ett": "12/4/4 months of 30 days, rows after that unused",
    "fit": "90 % training, 10 % validation, no test",
    "last": "the last horizon is the test, the one before it validation, as in the M4 competition",
}


@dataclass(frozen=True)
class Borders:
    """Rows whose values are targets: `[0, train)`, `[train, val)`, `[val, test)`."""

    train: int
    val: int
    test: int

    def targets(self, part: Part) -> tuple[int, int]:
        """First row and end of a part."""
        return {"train": (0, self.train), "val": (self.train, self.val), "test": (self.val, self.test)}[part]

    def inputs(self, part: Part, seq_len: int) -> tuple[int, int]:
        """Rows that windows of a part may read: the part, and `seq_len` rows before it."""
        first, end = self.targets(part)
        return (first if part == "train" else first - seq_len), end

    def windows(self, part: Part, seq_len: int, horizon: int) -> int:
        """Number of windows at stride 1; zero or less where none fits."""
        first, end = self.inputs(part, seq_len)
        return 0 if first < 0 else end - first - seq_len - horizon + 1


def _rows_per_day(freq: str) -> int:
    steps = {"h": 24, "15min": 96}
    if freq not in steps:
        raise DataError(f"split 'ett' is for hourly and 15-minute rows, these are {freq!r}; use split 'ratio'")
    return steps[freq]


def _ratio(rows: int) -> Borders:
    train, test = int(rows * 0.7), int(rows * 0.2)
    return Borders(train, rows - test, rows)


def _fit(rows: int) -> Borders:
    return Borders(int(rows * 0.9), rows, rows)


def _last(rows: int, horizon: int) -> Borders:
    return Borders(rows - 2 * horizon, rows - horizon, rows)


def _of_rows(split: str, rows: int, horizon: int) -> Borders:
    """The borders of the splits that follow from the number of rows."""
    if split == "last":
        return _last(rows, horizon)
    return _ratio(rows) if split == "ratio" else _fit(rows)


def borders_of(split: str, rows: int, freq: str, seq_len: int, horizon: int) -> Borders:
    """The borders, where every part has a window; otherwise an error that says how many rows are needed."""
    for name, value in (("look-back", seq_len), ("horizon", horizon)):
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    if split == "ett":
        per_day = _rows_per_day(freq)
        borders = Borders(*(days * per_day for days in ETT_DAYS))
        if rows < borders.test:
            raise DataError(
                f"split 'ett' needs {borders.test:,} rows at {freq!r}, there are {rows:,}; use split 'ratio'"
            )
    elif split in SPLITS:
        borders = _of_rows(split, rows, horizon)
    else:
        raise DataError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
    short: list[Part] = [part for part in parts_of(split) if borders.windows(part, seq_len, horizon) < 1]
    if short:
        first, end = borders.targets(short[0])
        advice = (
            f"{rows_needed(split, seq_len, horizon):,} rows are needed, there are {rows:,}"
            if split != "ett"
            else "the borders of 'ett' are fixed"
        )
        raise DataError(
            f"too few rows: look-back {seq_len} + horizon {horizon} leave no window in the {short[0]} part of split "
            f"{split!r} ({end - first:,} rows); {advice}. Shorten the look-back or the horizon."
        )
    return borders


def parts_of(split: str) -> tuple[Part, ...]:
    """The parts of a split, in order of time."""
    return PARTS[:2] if split == "fit" else PARTS


def rows_needed(split: str, seq_len: int, horizon: int) -> int:
    """The smallest number of rows from which on every part has a window, however the parts are rounded."""
    # Enough for the rounding of every part: look-back and horizon in 70 %, the horizon in 10 %.
    rows = 10 + max(2 * (seq_len + 2 * horizon), 10 * horizon)
    while all(_of_rows(split, rows - 1, horizon).windows(part, seq_len, horizon) > 0 for part in parts_of(split)):
        rows -= 1
    return rows


def describe(split: str, borders: Borders, stamps: pd.DatetimeIndex, seq_len: int, horizon: int) -> list[str]:
    """One line for each part: rows, first and last stamp of its targets, windows."""
    lines = []
    for part in parts_of(split):
        first, end = borders.targets(part)
        count = borders.windows(part, seq_len, horizon)
        lines.append(
            f"{part:<5} {end - first:>7,} rows  {short(stamps[first])} to {short(stamps[end - 1])}  {count:>7,} windows"
        )
    return lines
