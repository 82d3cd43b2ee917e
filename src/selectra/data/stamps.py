"""Time stamps: which column holds them, what they mean, how far apart they are."""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import difflib
import warnings

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import BaseOffset, Tick

from selectra.errors import DataError

TIME_NAMES = (
    "ds",
    "date",
    "time",
    "datetime",
    "timestamp",
    "date_time",
    "stamp",
    "time_stamp",
    "year",
    "month",
    "week",
    "day",
)
FREQUENCIES = {"s": "second", "min": "minute", "15min": "15 minutes", "h": "hour", "D": "day", "B": "business day"}
FREQUENCIES |= {"W": "week", "MS": "month", "ME": "month, last day", "QS": "quarter", "YS": "year"}
CALENDAR = ("B", "W-SUN", "MS", "ME", "QS-JAN", "QS-FEB", "QS-MAR", "QE-MAR", "QE-JAN", "QE-FEB", "YS", "YE")
# A grid that has more than this many rows for each row of the file means that the frequency is not understood.
MAX_SPARSITY = 20
DAY = pd.Timedelta(days=1)


def time_column(frame: pd.DataFrame, named: str | None) -> str:
    """The time column: the named one, else by its name, else the first whose contents are dates."""
    columns = list(frame.columns)
    if named is not None:
        if named not in columns:
            close = difflib.get_close_matches(named, columns, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(columns[:20])}"
            raise DataError(f"there is no column {named!r} for the time; {hint}")
        return named
    for name in columns:
        if name.strip().lower() in TIME_NAMES and not (_is_part(name) and pd.api.types.is_numeric_dtype(frame[name])):
            return name
    for name in columns:
        if _holds_dates(frame[name]):
            return name
    raise DataError(
        f"no time column: none of {', '.join(columns[:10])}{', ...' if len(columns) > 10 else ''} is called "
        f"{'/'.join(TIME_NAMES[:4])} or holds dates. Name it (time=...), or add one."
    )


def _is_part(name: str) -> bool:
    """Whether numbers under this name would be a part of a date."""
    return name.strip().lower() in ("day", "month", "week")


def _holds_dates(column: pd.Series) -> bool:
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if pd.api.types.is_numeric_dtype(column):
        return False
    sample = column.dropna().astype(str).head(20)
    # A bare number in text ("12") would pass for a date.
    texts = not pd.to_numeric(sample, errors="coerce").notna().any()
    return texts and len(sample) > 0 and bool(_readings(sample)[0].notna().all())


def _readings(column: pd.Series) -> list[pd.Series]:
    """Ways to read text as dates, the one that reads most first."""
    ways: list[dict[str, object]] = [{"format": "ISO8601"}, {}, {"dayfirst": True}]
    with warnings.catch_warnings():
        # That pandas reads one value at a time where formats are mixed is of no use to a reader.
        warnings.simplefilter("ignore", UserWarning)
        readings = [pd.to_datetime(column, errors="coerce", utc=True, **way) for way in ways]
    return sorted(readings, key=lambda reading: int(reading.isna().sum()))


def parse_stamps(column: pd.Series, name: str) -> tuple[pd.DatetimeIndex, list[str]]:
    """The column as naive stamps (those with a zone in UTC), and notes; the first that is no date is an error."""
    notes: list[str] = []
    if pd.api.types.is_numeric_dtype(column):
        column = _from_numbers(column, name)
    aware = isinstance(column.dtype, pd.DatetimeTZDtype)
    if pd.api.types.is_datetime64_any_dtype(column):
        parsed = pd.to_datetime(column, utc=True)
    else:
        text = column.astype("string")
        parsed = _readings(text)[0]
        aware = bool(text.str.contains(r"(?:Z|[+-]\d\d:?\d\d)$", regex=True).any() and text.str.contains(":").any())
    bad = np.flatnonzero(parsed.isna().to_numpy())
    if len(bad):
        raise DataError(
            f"time column {name!r}, row {bad[0] + 1} below the header: {column.iloc[int(bad[0])]!r} is not a date "
            f"({len(bad)} such rows). Write dates as 2013-01-31 or 2013-01-31 18:00."
        )
    if aware:
        notes.append("time stamps have a zone and are read as UTC")
    return pd.DatetimeIndex(parsed).tz_convert(None), notes


def _from_numbers(column: pd.Series, name: str) -> pd.Series:
    """Years (1998), or dates written as one number (19980131), as text."""
    if column.notna().all() and (column == column.round()).all():
        if column.between(1000, 3000).all():
            return column.astype("int64").astype(str) + "-01-01"
        if column.between(1000_01_01, 3000_12_31).all():
            return pd.to_datetime(column.astype("int64").astype(str), format="%Y%m%d", errors="coerce").astype(str)
    first = column.iloc[0].item()
    raise DataError(
        f"time column {name!r} holds numbers ({first!r}, ...); write dates as 2013-01-31 18:00, 20130131, or years. "
        "If another column holds the time, name it (time=...)."
    )


def named_frequency(freq: str) -> BaseOffset:
    """pandas' offset of an alias."""
    try:
        offset = to_offset(freq)
    except ValueError as error:
        close = difflib.get_close_matches(freq.lower(), [*FREQUENCIES.values()], n=1)
        hint = next((f" Did you mean {alias!r}?" for alias, word in FREQUENCIES.items() if [word] == close), "")
        known = ", ".join(f"{alias!r} ({word})" for alias, word in FREQUENCIES.items())
        raise DataError(f"unknown frequency {freq!r}; pandas' aliases are taken, such as {known}.{hint}") from error
    if offset is None or offset.n <= 0:
        raise DataError(f"frequency {freq!r} does not go forward")
    return offset


def infer_frequency(index: pd.DatetimeIndex) -> BaseOffset:
    """The frequency whose regular axis holds every stamp with the fewest rows; gaps do not disturb it."""
    unique = index.unique().sort_values()
    if len(unique) < 3:
        raise DataError(f"{len(unique)} different time stamps are too few to infer the frequency; name it (freq=...)")
    with warnings.catch_warnings():
        # It returns text in some versions of pandas and an offset in others, and says so; `to_offset` takes both.
        warnings.simplefilter("ignore", DeprecationWarning)
        found = pd.infer_freq(unique)
    if found is not None:
        offset = to_offset(found)
        assert offset is not None
        return offset
    steps = np.diff(unique.to_numpy())
    lengths, counts = np.unique(steps, return_counts=True)
    usual = _fixed(pd.Timedelta(lengths[counts.argmax()]))
    fits: list[tuple[int, BaseOffset]] = []
    for offset in (usual, *map(to_offset, CALENDAR)):
        assert offset is not None
        grid = _span(unique, offset)
        if grid is not None and len(grid) <= MAX_SPARSITY * len(unique) and unique.isin(grid).all():
            fits.append((len(grid), offset))
    if fits:
        return min(fits, key=lambda fit: fit[0])[1]
    assert usual is not None
    # Raises with the first stamp that is off the usual axis.
    regular_grid(unique, usual, named=False)
    raise DataError(f"no regular frequency fits the time stamps (most are {usual.freqstr} apart); name it (freq=...)")


def _fixed(step: pd.Timedelta) -> BaseOffset | None:
    """A fixed distance as an offset; whole days as days, which pandas would write as "24h"."""
    return to_offset(f"{step // DAY}D" if step % DAY == pd.Timedelta(0) else step)


def _span(index: pd.DatetimeIndex, offset: BaseOffset) -> pd.DatetimeIndex | None:
    if isinstance(offset, Tick) and (index[-1] - index[0]) / pd.Timedelta(offset) > MAX_SPARSITY * len(index) + 1:
        return None
    return pd.date_range(index[0], index[-1], freq=offset)


def regular_grid(index: pd.DatetimeIndex, offset: BaseOffset, *, named: bool) -> pd.DatetimeIndex:
    """Every stamp from first to last; a stamp of the file that is not among them is an error."""
    grid = _span(index, offset)
    if grid is None:
        raise DataError(
            f"with frequency {offset.freqstr!r} more than {MAX_SPARSITY} of {MAX_SPARSITY + 1} rows would be missing; "
            "name a longer one (freq=...)"
        )
    outside = ~index.isin(grid)
    if outside.any():
        origin = "named" if named else "most usual"
        raise DataError(
            f"{int(outside.sum())} time stamps do not fit the {origin} frequency {offset.freqstr!r}, the first is "
            f"{index[outside][0]}. Name another (freq=...), or resample the file."
        )
    return grid


def short(stamp: object) -> str:
    """A stamp to the minute, for a line of text."""
    return format(stamp, "%Y-%m-%d %H:%M")


def season_of(freq: str) -> int:
    """Rows of the shortest usual season: a day below daily rows, then a week, a year; 1 where there is none."""
    offset = named_frequency(freq)
    if isinstance(offset, Tick) or offset.rule_code == "D":
        step = pd.Timedelta(offset) if isinstance(offset, Tick) else DAY * offset.n
        for season in (pd.Timedelta(hours=1), DAY) if step < pd.Timedelta(minutes=1) else (DAY, 7 * DAY):
            if step < season and season % step == pd.Timedelta(0):
                return int(season / step)
        return 52 if step == 7 * DAY else 1
    code = offset.rule_code.split("-")[0]
    seasons = {"B": 5, "W": 52, "MS": 12, "ME": 12, "BMS": 12, "BME": 12, "QS": 4, "QE": 4, "BQS": 4, "BQE": 4}
    return max(seasons.get(code, 1) // offset.n, 1)
