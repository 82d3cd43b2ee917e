"""Files and data frames to one regular table of series, with what is missing marked and nothing filled.

A wide table has one time column and one column a series; a long one has the columns `unique_id, ds, y`.
"""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import narwhals as nw
import numpy as np
import pandas as pd
import pyarrow

from selectra.data.irregular import (
    Place,
    daylight,
    place_in,
    refuse_going_back,
    refuse_mixed,
    refuse_mixed_series,
    refuse_repeats,
)
from selectra.data.stamps import alias_of, infer_frequency, named_frequency, parse_stamps, regular_grid, time_column
from selectra.errors import DataError

# A unit at the end of a name, as in "T (degC)".
UNIT = re.compile(r"\s*[(\[][^()\[\]]*[)\]]$")
LONG_COLUMNS = ("unique_id", "ds", "y")
SEPARATORS = (",", ";", "\t", "|")
# What pandas calls a column without a name, as an index in a CSV file is.
UNNAMED = re.compile(r"(Unnamed: \d+)?")
# A value this many times the range of all others away from them is reported as a probable code for "missing".
CODE_DISTANCE = 3.0
# The square of anything larger, of which a standard deviation is made, may overflow.
LARGEST = 1e150


@dataclass(frozen=True)
class Table:
    """Series on one regular time axis.

    `values` is `(rows, series)` in float64 in the units of the file, NaN where `observed` is False.
    """

    names: tuple[str, ...]
    stamps: pd.DatetimeIndex
    values: np.ndarray
    observed: np.ndarray
    freq: str
    rows_read: int
    gaps: tuple[tuple[pd.Timestamp, int], ...] = ()
    notes: tuple[str, ...] = ()
    time_name: str = "ds"
    layout: str = "wide"

    @property
    def rows(self) -> int:
        """Rows of the regular axis, inserted ones included."""
        return len(self.stamps)

    def index_of(self, target: str) -> int:
        """Position of the series called `target`; its unit in brackets may be left out where that is clear."""
        bare = [name for name in self.names if UNIT.sub("", name) == target]
        if target not in self.names and len(bare) == 1:
            target = bare[0]
        if target not in self.names:
            raise DataError(f"there is no series {target!r}; {nearest(target, self.names)}")
        return self.names.index(target)


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Say which of `allowed` is meant, or list them."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    shown = ", ".join(map(str, allowed[:20])) + (f" and {len(allowed) - 20} more" if len(allowed) > 20 else "")
    return f"did you mean {close[0]!r}? There are: {shown}" if close else f"there are: {shown}"


def read_file(path: Path) -> pd.DataFrame:
    """Read CSV, TSV or parquet, compressed or not, as pandas does; say in words what stands in the way."""
    if not path.exists():
        others = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, others, n=1)
        raise DataError(f"there is no file {str(path)!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder; name one CSV or parquet file")
    try:
        frame = pd.read_parquet(path) if path.suffix in {".parquet", ".pq"} else _read_csv(path)
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{str(path)!r} is empty") from error
    except UnicodeError as error:
        raise DataError(f"{str(path)!r} is not text in UTF-8 ({error}); save it as CSV in UTF-8") from error
    except (OSError, EOFError, zlib.error, pd.errors.ParserError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); CSV and parquet are, also as .gz"
        ) from error
    if frame.empty:
        raise DataError(f"{str(path)!r} has a header and no rows")
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    # From the header alone: with decimal commas the rows have other counts of commas.
    columns = {mark: pd.read_csv(path, sep=mark, nrows=0).shape[1] for mark in SEPARATORS}
    mark = max(SEPARATORS, key=columns.__getitem__)
    return pd.read_csv(path, sep=mark, decimal="," if mark == ";" else ".")


def to_pandas(data: object) -> pd.DataFrame:
    """Any data frame that narwhals knows (pandas, polars, arrow, ...) as a new pandas one; a time index is kept."""
    if isinstance(data, pd.DataFrame):
        frame = data.copy(deep=False)
    else:
        try:
            frame = nw.from_native(data, eager_only=True).to_pandas()
        except TypeError as error:
            raise DataError(f"expected a data frame (pandas, polars, arrow), got {type(data).__name__}") from error
    if frame.empty:
        raise DataError("the data frame has no rows")
    return _with_index(frame)


def _with_index(frame: pd.DataFrame) -> pd.DataFrame:
    """A time index as a column."""
    if not isinstance(frame.index, pd.DatetimeIndex):
        return frame
    name = frame.index.name or "ds"
    return frame.rename_axis(name).reset_index(drop=name in frame.columns)


def _without_numbering(frame: pd.DataFrame, keep: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Without a nameless column that only counts the rows, and what is said about it."""
    notes = []
    for name in [name for name in frame.columns if UNNAMED.fullmatch(name) and name != keep]:
        column = frame[name]
        if not pd.api.types.is_integer_dtype(column) or column.isna().any() or column.iloc[0] not in (0, 1):
            continue
        if (column.to_numpy() == np.arange(len(column)) + column.iloc[0]).all():
            frame = frame.drop(columns=name)
            notes.append(f"column {name!r} only counts the rows and is left out")
    return frame, notes


def read_table(
    source: Path | pd.DataFrame, *, time: str | None = None, freq: str | None = None, stamps: str = "check"
) -> Table:
    """Read a source as a regular table.

    Args:
        time: Name of the time column; inferred from names and contents when None.
        freq: pandas' alias of the distance of rows ("h", "15min", "D", "MS", ...); inferred when None.
        stamps: "check" places every row by its stamp and refuses duplicates; "order" counts rows from the first stamp
            on, as the benchmark papers do with files whose stamps are damaged.
    """
    frame = _with_index(read_file(source)) if isinstance(source, Path) else to_pandas(source)
    frame.columns = [str(name) for name in frame.columns]
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise DataError(f"the column name {repeated[0]!r} occurs more than once")
    frame, dropped = _without_numbering(frame, time)
    if "unique_id" in frame.columns:
        wide, index, notes, place = _from_long(frame, freq)
        layout, time_name = "long", "ds"
    else:
        layout, time_name = "wide", time_column(frame, time)
        index, notes = parse_stamps(frame[time_name], time_name, freq=freq, years=time is not None)
        wide, place = _numbers(frame.drop(columns=time_name)), place_in(time_name, index)
        if stamps != "order":
            refuse_repeats(index, time_name, several="y" in wide)
            refuse_going_back(index, time_name)
    if wide.shape[1] == 0:
        raise DataError(f"there is only the time column {time_name!r}; at least one column of numbers is needed")
    return _regular(wide, index, freq, stamps, dropped + notes, place, time_name=time_name, layout=layout)


def _require_long_columns(frame: pd.DataFrame) -> None:
    absent = [name for name in LONG_COLUMNS if name not in frame.columns]
    if absent:
        others = [name for name in frame.columns if name not in LONG_COLUMNS]
        close = difflib.get_close_matches(absent[0], others, n=1) or others[:1]
        hint = f"; if it is {close[0]!r}, rename that" if close else ""
        raise DataError(
            f"a table with the column 'unique_id' is long and has the columns {', '.join(LONG_COLUMNS)}; there is no "
            f"column {absent[0]!r}{hint}"
        )


def _from_long(frame: pd.DataFrame, freq: str | None) -> tuple[pd.DataFrame, pd.DatetimeIndex, list[str], Place]:
    _require_long_columns(frame)
    nameless = np.flatnonzero(frame["unique_id"].isna().to_numpy())
    if len(nameless):
        raise DataError(
            f"column 'unique_id', row {nameless[0] + 1} below the header, is empty ({len(nameless)} such rows); "
            "name the series or remove these rows"
        )
    index, notes = parse_stamps(frame["ds"], "ds", freq=freq)
    unused = [name for name in frame.columns if name not in LONG_COLUMNS]
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    # Whole numbers in the place of names: millions of rows of text are gigabytes.
    codes, names = pd.factorize(frame["unique_id"].astype(str))
    codes, names = codes.astype(np.int32), [str(name) for name in names]
    keys = pd.DataFrame({"unique_id": codes, "ds": index})
    twice = keys.duplicated()
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        same = pd.DatetimeIndex(keys.loc[keys["unique_id"] == codes[row], "ds"])
        raise DataError(
            f"{int(twice.sum())} rows repeat a stamp of their own series; the first is "
            f"{index[row]} of {names[codes[row]]!r} (column 'ds', row {row + 1} below the header). {daylight(same)}"
            "Keep one row for each series and stamp."
        )
    if freq is None:
        refuse_mixed_series(keys, names)
    stamps, rows = np.unique(index.to_numpy(), return_inverse=True)
    values = np.full((len(stamps), len(names)), np.nan)
    values[rows, codes] = _numbers(frame[["y"]])["y"].to_numpy()
    place = place_in("ds", index, lambda row: names[codes[row]])
    return pd.DataFrame(values, columns=names, copy=False), pd.DatetimeIndex(stamps), notes, place


def _numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Every column as float64; the first text that is no number is an error with its place."""
    columns: dict[str, np.ndarray] = {}
    for name in frame.columns:
        column = frame[name]
        if pd.api.types.is_datetime64_any_dtype(column):
            raise DataError(f"column {name!r} holds dates; a table has one time column and numbers beside it")
        if pd.api.types.is_complex_dtype(column) or pd.api.types.is_timedelta64_dtype(column):
            what = "complex numbers" if pd.api.types.is_complex_dtype(column) else "durations"
            raise DataError(f"column {name!r} holds {what}; write them as numbers, or remove the column")
        numbers = pd.to_numeric(column, errors="coerce")
        text = column.notna() & numbers.isna()
        if column.dtype == object or isinstance(column.dtype, pd.StringDtype):
            text &= column.astype(str).str.strip() != ""
        if text.any():
            row = int(np.flatnonzero(text.to_numpy())[0])
            raise DataError(
                f"column {name!r}, row {row + 1} below the header: {column.iloc[row]!r} is not a number "
                f"({int(text.sum())} such values). Correct them, leave them empty, or remove the column."
            )
        columns[name] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
        _refuse_unbounded(name, columns[name])
    return pd.DataFrame(columns)


def _refuse_unbounded(name: str, values: np.ndarray) -> None:
    large = np.flatnonzero(np.abs(values) > LARGEST)
    if len(large):
        row = int(large[0])
        raise DataError(
            f"column {name!r}, row {row + 1} below the header: {values[row]:g} is infinite or too large to be squared "
            f"({len(large)} such values). Leave it empty if it stands for 'missing', or correct it."
        )


def _regular(
    wide: pd.DataFrame,
    index: pd.DatetimeIndex,
    freq: str | None,
    stamps: str,
    notes: list[str],
    place: Place,
    *,
    time_name: str,
    layout: str,
) -> Table:
    names = tuple(wide.columns)
    values = wide.to_numpy(dtype=np.float64)
    if stamps == "order":
        offset = named_frequency(freq) if freq else infer_frequency(index)
        grid = pd.date_range(index[0], periods=len(index), freq=offset)
        notes.append("stamps are counted from the first row on; those in the file are not used")
    else:
        if freq is None:
            refuse_mixed(index, place)
        offset = named_frequency(freq) if freq else infer_frequency(index, place)
        grid = regular_grid(index, offset, named=freq is not None, place=place)
        placed = np.full((len(grid), len(names)), np.nan)
        placed[grid.get_indexer(index)] = values
        values = placed
    observed = ~np.isnan(values)
    empty = [name for name, any_value in zip(names, observed.any(0), strict=True) if not any_value]
    if empty:
        raise DataError(f"column {empty[0]!r} has no value at all ({len(empty)} such columns); remove it")
    notes += _codes(names, values)
    gaps = () if stamps == "order" else _gaps(grid, index)
    return Table(names, grid, values, observed, alias_of(offset), len(wide), gaps, tuple(notes), time_name, layout)


def _gaps(grid: pd.DatetimeIndex, index: pd.DatetimeIndex) -> tuple[tuple[pd.Timestamp, int], ...]:
    """Runs of inserted rows: first missing stamp and number of rows."""
    missing = np.flatnonzero(~grid.isin(index))
    if len(missing) == 0:
        return ()
    runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
    return tuple((grid[run[0]], len(run)) for run in runs)


def _codes(names: Sequence[str], values: np.ndarray) -> list[str]:
    """One line for each series with a value far outside all others, such as -9999."""
    notes = []
    for name, column in zip(names, values.T, strict=True):
        seen = np.unique(column[~np.isnan(column)])
        if len(seen) < 4:
            continue
        for code, rest in ((seen[0], seen[1:]), (seen[-1], seen[:-1])):
            distance = min(abs(code - rest[0]), abs(code - rest[-1]))
            if distance > CODE_DISTANCE * (rest[-1] - rest[0]):
                count = int((column == code).sum())
                times = "once" if count == 1 else f"{count} times"
                notes.append(
                    f"{name}: {code:g} ({times}) lies far outside all other values; kept as it is. "
                    "If it stands for 'missing', empty it in the file."
                )
    return notes
