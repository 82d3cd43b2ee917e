"""Time stamps: which column holds them, what they mean, how far apart they are."""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable

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
)
# These hold a whole date more rarely than a part of one, so dates under any other name go before them.
PART_NAMES = ("year", "month", "week", "day")
FREQUENCIES = {"s": "second", "min": "minute", "15min": "15 minutes", "h": "hour", "D": "day", "B": "business day"}
FREQUENCIES |= {"W": "week", "MS": "month", "ME": "month, last day", "QS": "quarter", "YS": "year"}
# What older versions of pandas called them.
FORMER = {"t": "min", "m": "ME", "q": "QS", "y": "YS", "a": "YS"}
CALENDAR = ("B", "W-SUN", "MS", "ME", "QS-JAN", "QS-FEB", "QS-MAR", "QE-MAR", "QE-JAN", "QE-FEB", "YS", "YE")
# A grid that has more than this many rows for each row of the file means that the frequency is not understood.
MAX_SPARSITY = 20
# Numbers that are years, and dates written as one number.
YEARS = (1000, 3000)
WRITTEN = (1000_01_01, 3000_12_31)
DAY = pd.Timedelta(days=1)
# Months from a stamp within a month, such as the 15th; pandas has no alias for them.
MONTHS = re.compile(r"(\d+) months?")
MONTH_STEPS = (1, 3, 12)
LAST_DAY_OF_ALL_MONTHS = 28


def time_column(frame: pd.DataFrame, named: str | None) -> str:
    """The time column: the named one, else by its name, else the first whose contents are dates."""
    columns = list(frame.columns)
    if named is not None:
        if named not in columns:
            close = difflib.get_close_matches(named, columns, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(columns[:20])}"
            raise DataError(f"there is no column {named!r} for the time; {hint}")
        return named
    called = {kind: [name for name in columns if name.strip().lower() == kind] for kind in (*TIME_NAMES, *PART_NAMES)}
    usual = [name for kind in TIME_NAMES for name in called[kind]]
    parts = [name for kind in PART_NAMES for name in called[kind]]
    for candidates in (usual, [name for name in columns if name not in parts], parts):
        for name in candidates:
            # In the usual place a date here and there may be wrong: the row is named later.
            if _dates_in(frame[name], name) >= (0.5 if candidates is usual else 1.0):
                return name
    if usual:
        return usual[0]
    raise DataError(
        f"no time column: none of {', '.join(columns[:10])}{', ...' if len(columns) > 10 else ''} is called "
        f"{'/'.join(TIME_NAMES[:4])} or holds dates. Name it (time=...), or add one."
    )


def _dates_in(column: pd.Series, name: str) -> float:
    """The share of dates among the first values."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return 1.0
    sample = column.dropna().head(20)
    if pd.api.types.is_numeric_dtype(column):
        whole = len(sample) > 0 and bool((sample == sample.round()).all())
        if whole and "year" in name.lower():
            return float(sample.between(*YEARS).mean())
        return float(sample.between(*WRITTEN).mean()) if whole and name.strip().lower() in TIME_NAMES else 0.0
    text = sample.astype(str).str.strip()
    # A bare number ("12"), a time of day ("12:30") or a word ("May") would pass for a date.
    if len(text) == 0 or pd.to_numeric(text, errors="coerce").notna().any():
        return 0.0
    dated = text.str.contains(r"\d") & ~text.str.match(r"\d{1,2}:\d\d")
    return float((_readings(text)[0].notna() & dated).mean())


def _readings(column: pd.Series) -> list[pd.Series]:
    """Ways to read text as dates, the one that reads most first; those after it read as much, and otherwise."""
    ways: list[dict[str, object]] = [{"format": "ISO8601"}, {}, {"dayfirst": True}]
    if column.str.match(r"\s*\d{4}").any():
        # With the year first nobody puts the day before the month.
        ways.pop()
    with warnings.catch_warnings():
        # That pandas reads one value at a time where formats are mixed is of no use to a reader.
        warnings.simplefilter("ignore", UserWarning)
        readings = [pd.to_datetime(column, errors="coerce", utc=True, **way) for way in ways]
    readings.sort(key=lambda reading: int(reading.isna().sum()))
    first = readings[0]
    return [first] + [other for other in readings[1:] if other.notna().all() and not other.equals(first)]


def _read_text(text: pd.Series, name: str, freq: str | None, notes: list[str]) -> pd.Series:
    """Text as stamps; of month first and day first, the one that gives a regular axis."""
    first, *others = _readings(text)
    if not others or first.isna().any():
        return first
    axes = [_irregularity(pd.DatetimeIndex(reading).tz_convert(None), freq) for reading in (first, others[0])]
    if axes[0] == axes[1]:
        row = int(np.flatnonzero((first != others[0]).to_numpy())[0])
        raise DataError(
            f"time column {name!r} can be read in two ways: {text.iloc[row]!r} is {first.iloc[row]:%Y-%m-%d} with the "
            f"month first and {others[0].iloc[row]:%Y-%m-%d} with the day first, and the rows do not tell which. "
            "Write dates as 2013-01-31, or name the frequency (freq=...)."
        )
    if axes[0] < axes[1]:
        return first
    notes.append(f"dates are read with the day first: {text.iloc[0]!r} is {others[0].iloc[0]:%Y-%m-%d}")
    return others[0]


def _irregularity(index: pd.DatetimeIndex, freq: str | None) -> int:
    """0 where the stamps are a regular axis, 1 where it has gaps, 2 where there is none."""
    index = index.unique().sort_values()
    try:
        grid = regular_grid(index, named_frequency(freq) if freq else infer_frequency(index), named=freq is not None)
    except DataError:
        return 2
    return int(len(grid) > len(index))


def parse_stamps(
    column: pd.Series, name: str, *, freq: str | None = None, years: bool = False
) -> tuple[pd.DatetimeIndex, list[str]]:
    """The column as naive stamps (those with a zone in UTC), and notes; the first that is no date is an error.

    Args:
        freq: The named frequency, which may tell month first from day first.
        years: Whether whole numbers are years, whatever the name of the column.
    """
    notes: list[str] = []
    if pd.api.types.is_numeric_dtype(column):
        column = _from_numbers(column, name, years or "year" in name.lower())
    aware = isinstance(column.dtype, pd.DatetimeTZDtype)
    if pd.api.types.is_datetime64_any_dtype(column):
        parsed = pd.to_datetime(column, utc=True)
    else:
        text = column.astype("string")
        parsed = _read_text(text, name, freq, notes)
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


def _from_numbers(column: pd.Series, name: str, years: bool) -> pd.Series:
    """Years (1998), or dates written as one number (19980131), as text."""
    if column.notna().all() and (column == column.round()).all():
        if years and column.between(*YEARS).all():
            return column.astype("int64").astype(str) + "-01-01"
        if column.between(*WRITTEN).all():
            return pd.to_datetime(column.astype("int64").astype(str), format="%Y%m%d", errors="coerce").astype(str)
    first = column.iloc[0].item()
    raise DataError(
        f"time column {name!r} holds numbers ({first!r}, ...); write dates as 2013-01-31 18:00 or 20130131, or "
        "years in a column called 'year'. "
        "If another column holds the time, name it (time=...)."
    )


def named_frequency(freq: str) -> BaseOffset:
    """pandas' offset of an alias, or of "1 month", "3 months", ..., which count from a stamp within a month."""
    months = MONTHS.fullmatch(freq)
    if months:
        return pd.DateOffset(months=int(months[1]))
    try:
        offset = to_offset(freq)
    except ValueError as error:
        meant = _meant(freq)
        hint = f" Did you mean {meant!r}?" if meant else ""
        known = ", ".join(f"{alias!r} ({word})" for alias, word in FREQUENCIES.items())
        raise DataError(f"unknown frequency {freq!r}; pandas' aliases are taken, such as {known}.{hint}") from error
    if offset is None or offset.n <= 0:
        raise DataError(f"frequency {freq!r} does not go forward")
    return offset


def _meant(freq: str) -> str | None:
    """The alias that is probably meant: "15min" for "15T", "h" for "H" and for "hour"."""
    word = freq.strip().lower().lstrip("0123456789")
    count = freq.strip()[: -len(word)] if word else ""
    aliases = FORMER | {alias.lower(): alias for alias in FREQUENCIES}
    if word not in aliases:
        close = difflib.get_close_matches(word, [*FREQUENCIES.values()], n=1)
        aliases |= {name: alias for alias, name in FREQUENCIES.items()}
        word = close[0] if close else word
    return count + aliases[word] if word in aliases else None


def alias_of(offset: BaseOffset) -> str:
    """The text from which `named_frequency` makes this offset."""
    if type(offset) is pd.DateOffset:
        months = offset.kwds["months"]
        return f"{months} month" + ("s" if months > 1 else "")
    return offset.freqstr


def infer_frequency(index: pd.DatetimeIndex, place: Callable[[pd.Timestamp], str] | None = None) -> BaseOffset:
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
    within = [pd.DateOffset(months=n) for n in MONTH_STEPS if unique[0].day <= LAST_DAY_OF_ALL_MONTHS]
    for offset in (usual, *map(to_offset, CALENDAR), *within):
        assert offset is not None
        grid = _span(unique, offset)
        if grid is not None and len(grid) <= MAX_SPARSITY * len(unique) and unique.isin(grid).all():
            fits.append((len(grid), offset))
    if fits:
        return min(fits, key=lambda fit: fit[0])[1]
    assert usual is not None
    # Raises with the first stamp that is off the usual axis.
    regular_grid(unique, usual, named=False, place=place)
    raise DataError(f"no regular frequency fits the time stamps (most are {alias_of(usual)} apart); name it (freq=...)")


def _fixed(step: pd.Timedelta) -> BaseOffset | None:
    """A fixed distance as an offset; whole days as days, which pandas would write as "24h"."""
    return to_offset(f"{step // DAY}D" if step % DAY == pd.Timedelta(0) else step)


def _span(index: pd.DatetimeIndex, offset: BaseOffset) -> pd.DatetimeIndex | None:
    if isinstance(offset, Tick) and (index[-1] - index[0]) / pd.Timedelta(offset) > MAX_SPARSITY * len(index) + 1:
        return None
    return pd.date_range(index[0], index[-1], freq=offset)


def regular_grid(
    index: pd.DatetimeIndex,
    offset: BaseOffset,
    *,
    named: bool,
    place: Callable[[pd.Timestamp], str] | None = None,
) -> pd.DatetimeIndex:
    """Every stamp from first to last; a stamp of the file that is not among them is an error.

    Args:
        place: Says where in the file a stamp stands.
    """
    grid = _span(index, offset)
    if grid is None:
        raise DataError(
            f"with frequency {alias_of(offset)!r} more than {MAX_SPARSITY} of {MAX_SPARSITY + 1} rows would be "
            "missing; name a longer one (freq=...)"
        )
    outside = ~index.isin(grid)
    if outside.any():
        origin = "named" if named else "most usual"
        first = index[outside][0]
        where = f" ({place(first)})" if place else ""
        raise DataError(
            f"{int(outside.sum())} time stamps do not fit the {origin} frequency {alias_of(offset)!r}, the first is "
            f"{first}{where}. Name another (freq=...), or resample the file."
        )
    return grid


def short(stamp: object) -> str:
    """A stamp to the minute, for a line of text."""
    return format(stamp, "%Y-%m-%d %H:%M")


def season_of(freq: str) -> int:
    """Rows of the shortest usual season: a day below daily rows, then a week, a year; 1 where there is none."""
    offset = named_frequency(freq)
    if type(offset) is pd.DateOffset:
        return max(12 // offset.kwds["months"], 1)
    if isinstance(offset, Tick) or offset.rule_code == "D":
        step = pd.Timedelta(offset) if isinstance(offset, Tick) else DAY * offset.n
        for season in (pd.Timedelta(hours=1), DAY) if step < pd.Timedelta(minutes=1) else (DAY, 7 * DAY):
            if step < season and season % step == pd.Timedelta(0):
                return int(season / step)
        return 52 if step == 7 * DAY else 1
    code = offset.rule_code.split("-")[0]
    seasons = {"B": 5, "W": 52, "MS": 12, "ME": 12, "BMS": 12, "BME": 12, "QS": 4, "QE": 4, "BQS": 4, "BQE": 4}
    return max(seasons.get(code, 1) // offset.n, 1)
