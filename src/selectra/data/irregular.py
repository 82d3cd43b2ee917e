"""What is wrong with time stamps that repeat, go back or have several distances, in words with their place."""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from selectra.errors import DataError

Place = Callable[[pd.Timestamp], str]
"""Where in the source a stamp stands, in words."""

# As many steps of one length, one after the other, are a frequency of their own and no gaps.
RUN_LENGTH = 10
RUN_SHARE = 0.05
# A series has a step where this share of its steps are of that length.
STEP_SHARE = 0.8
HOUR = pd.Timedelta(hours=1)
# When clocks are set back, north and south; at night.
MONTHS, LAST_HOUR = (3, 4, 9, 10, 11), 3
ADVICE = "Keep one row for each stamp, or read rows as evenly spaced, whatever their stamps, with stamps=order."


def place_in(name: str, index: pd.DatetimeIndex, series_of: Callable[[int], str] | None = None) -> Place:
    """Finds the first row of a stamp; `series_of` names the series of a long table's row."""

    def place(stamp: pd.Timestamp) -> str:
        row = int(np.flatnonzero(index == stamp)[0])
        series = "" if series_of is None else f", series {series_of(row)!r}"
        return f"time column {name!r}, row {row + 1} below the header{series}"

    return place


def refuse_repeats(index: pd.DatetimeIndex, name: str, *, several: bool) -> None:
    """Refuse stamps that occur twice in a wide table.

    Args:
        several: Whether the rows might be of several series, whose names are missing.
    """
    twice = index.duplicated()
    if not twice.any():
        return
    shown = ", ".join(str(stamp) for stamp in index[twice].unique()[:3])
    row = int(np.flatnonzero(twice)[0])
    first = int(np.flatnonzero(index == index[row])[0])
    hint = "If they are of several series, name these in a column 'unique_id'. " if several else ""
    raise DataError(
        f"{int(twice.sum())} rows repeat a time stamp: {shown}{', ...' if twice.sum() > 3 else ''} (first: time column "
        f"{name!r}, row {row + 1} below the header, as row {first + 1}). {daylight(index)}{hint}{ADVICE}"
    )


def refuse_going_back(index: pd.DatetimeIndex, name: str) -> None:
    """Refuse rows of a wide table that are not in order of time, which is how misread dates show."""
    back = np.flatnonzero(index[1:] < index[:-1]) + 1
    if len(back):
        row = int(back[0])
        raise DataError(
            f"time column {name!r}, row {row + 1} below the header: {index[row]} comes after {index[row - 1]} "
            f"({len(back)} such rows). Sort the rows by {name!r}; if they are in order already, the dates are misread: "
            "write them as 2013-01-31 18:00."
        )


def daylight(index: pd.DatetimeIndex) -> str:
    """A sentence where the repeated stamps are the hour that clocks go through twice in autumn; otherwise nothing."""
    repeated = index[index.duplicated()].unique()
    at_night = repeated.month.isin(MONTHS) & (repeated.hour <= LAST_HOUR)
    days = pd.Series(repeated, index=repeated).groupby(repeated.normalize())
    if not at_night.all() or ((days.max() - days.min()) >= HOUR).any():
        return ""
    return (
        "They are the hour that the end of daylight-saving time repeats: write the stamps in UTC, or each with its "
        "offset (2021-10-31 02:00+01:00). "
    )


def refuse_mixed(index: pd.DatetimeIndex, place: Place) -> None:
    """Refuse a time axis whose rows are one distance apart in one stretch and another in the next."""
    unique = index.unique().sort_values()
    steps = np.diff(unique.to_numpy())
    if len(steps) < 2 * RUN_LENGTH:
        return
    lengths, counts = np.unique(steps, return_counts=True)
    usual = lengths[counts.argmax()]
    starts = np.flatnonzero(np.concatenate([[True], steps[1:] != steps[:-1]]))
    runs = np.diff(np.append(starts, len(steps)))
    other = (runs >= max(RUN_LENGTH, RUN_SHARE * len(steps))) & (steps[starts] != usual)
    if other.any():
        start = starts[int(np.flatnonzero(other)[0])]
        raise DataError(
            f"mixed frequencies: most rows are {_said(usual)} apart, and from {unique[start]} on "
            f"({place(unique[start])}) they are {_said(steps[start])} apart. Resample the table to one frequency, or "
            "cut it; freq=... takes the rows between as missing."
        )


def refuse_mixed_series(keys: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse a long table whose series have different distances or phases of rows.

    Args:
        keys: Columns `unique_id`, a number into `names`, and `ds`.
    """
    rows = keys.assign(row=np.arange(len(keys))).sort_values(["unique_id", "ds"], kind="stable")
    steps = rows["ds"].diff().where(rows["unique_id"].eq(rows["unique_id"].shift())).dropna()
    if steps.empty:
        return
    ids = rows.loc[steps.index, "unique_id"]
    grouped = steps.groupby(ids)
    usual = grouped.median()
    same = steps.eq(ids.map(usual)).groupby(ids).mean()
    regular = usual[(same >= STEP_SHARE) & (grouped.size() >= RUN_LENGTH)]
    if regular.nunique() > 1:
        kinds = regular.drop_duplicates()
        one, other = kinds.index[0], kinds.index[1]
        raise DataError(
            f"mixed frequencies: the rows of series {names[one]!r} are {_said(regular[one])} apart, those of series "
            f"{names[other]!r} "
            f"(column 'ds', row {_first_row(rows, other)} below the header) {_said(regular[other])}. Resample them to "
            "one frequency, or forecast them apart; freq=... takes the rows between as missing."
        )
    if len(regular) < 2:
        return
    step = regular.iloc[0]
    first = rows.groupby("unique_id")["ds"].first()[regular.index]
    phase = (first - first.iloc[0]) % step
    if (phase != pd.Timedelta(0)).any():
        other = phase.index[int(np.flatnonzero((phase != pd.Timedelta(0)).to_numpy())[0])]
        raise DataError(
            f"the rows of all series are {_said(step)} apart, and those of series {names[other]!r} (column 'ds', row "
            f"{_first_row(rows, other)} below the header: {first[other]}) lie between those of "
            f"{names[first.index[0]]!r} "
            f"({first.iloc[0]}). Round the stamps, or forecast them apart; freq=... takes the rows between as missing."
        )


def _first_row(rows: pd.DataFrame, name: int) -> int:
    return int(rows.loc[rows["unique_id"] == name, "row"].min()) + 1


def _said(step: object) -> str:
    """A distance in the largest unit that is whole."""
    step = pd.Timedelta(step)
    for unit, name in (("D", "day"), ("h", "hour"), ("min", "minute"), ("s", "second")):
        count = step / pd.Timedelta(1, unit=unit)
        if count == round(count) and count >= 1:
            return f"{count:.0f} {name}{'s' if count > 1 else ''}"
    return str(step)
