"""Series with their covariates from data frames, for a first reading and for later ones of the same columns.

In a long frame (`unique_id, ds, y`) every further column is a covariate; in a wide one, which has a column a series,
only those that are named as known ahead. A covariate that says the same for all series at each stamp is one channel,
another one is a channel for each series.
"""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from selectra.data.channels import Channel, Channels, channel_values, channels_of, numbers, place
from selectra.data.covariates import Covariates, carried
from selectra.data.stamps import named_frequency, parse_stamps, short, time_column
from selectra.data.table import LONG_COLUMNS, Table, nearest, read_table
from selectra.errors import DataError


@dataclass(frozen=True)
class Panel:
    """Series on one axis, each with an end of its own, and covariates whose gaps carry the last known value forward.

    `ends[i]` is the number of rows up to the last one that the frame has for series `i`.
    """

    table: Table
    ends: np.ndarray
    covariates: Covariates
    channels: Channels

    def head(self, rows: int) -> Panel:
        """The first rows alone; covariates known ahead stay."""
        return self._cut(slice(0, rows), replace(self.covariates, past=self.covariates.past[:rows]))

    def tail(self, rows: int) -> Panel:
        """The last rows of every series at least."""
        first = max(0, int(self.ends.min()) - rows)
        past, future = self.covariates.past[first:], self.covariates.future[first:]
        return self._cut(slice(first, None), replace(self.covariates, past=past, future=future))

    def _cut(self, rows: slice, covariates: Covariates) -> Panel:
        table = self.table
        stamps, values, observed = table.stamps[rows], table.values[rows], table.observed[rows]
        table = replace(table, stamps=stamps, values=values, observed=observed, rows_read=len(stamps), gaps=())
        ends = np.minimum(self.ends - (rows.start or 0), len(stamps))
        return Panel(table, ends, covariates, self.channels)

    def stamps_ahead(self, rows: int) -> pd.DatetimeIndex:
        """The axis, and `rows` stamps after it."""
        table = self.table
        after = pd.date_range(table.stamps[-1], periods=rows + 1, freq=named_frequency(table.freq))[1:]
        return table.stamps.append(after)


def read_panel(
    frame: pd.DataFrame, *, freq: str | None, ahead: Sequence[str] = (), static: pd.DataFrame | None = None
) -> Panel:
    """Read a frame for the first time.

    Args:
        frame: Long or wide.
        freq: pandas' alias of the distance of rows; inferred when None.
        ahead: The covariates that are known ahead.
        static: One row a series, with `unique_id` and numbers.

    Raises:
        DataError: A column is missing, holds no numbers, or the table itself cannot be used.
    """
    long = _is_long(frame)
    absent = [name for name in ahead if name not in frame.columns]
    if absent:
        raise DataError(
            f"the frame has no column {absent[0]!r}, which is named as a covariate known ahead; "
            f"{nearest(absent[0], [str(name) for name in frame.columns])}"
        )
    extra = [name for name in frame.columns if name not in LONG_COLUMNS] if long else list(ahead)
    table = read_table(frame[list(LONG_COLUMNS)] if long else frame.drop(columns=extra), freq=freq)
    placed = {name: place(frame, name, table.stamps, table, long) for name in extra}
    past = [c for name in extra if name not in ahead for c in channels_of(name, placed[name], table.names)]
    future = [c for name in ahead for c in channels_of(name, placed[name], table.names)]
    names, values = read_static(static, table.names)
    channels = Channels(tuple(past), tuple(future), names)
    return _panel(frame, table, placed, channels, values)


def read_with_future(
    frame: pd.DataFrame, future: pd.DataFrame, horizon: int, *, time: str | None = None, freq: str | None = None
) -> tuple[Table, Covariates, list[str]]:
    """A table, the covariates that another one knows ahead, and what is said about them.

    Every column that both have, the time and `unique_id` apart, is known ahead; of a long table the other columns of
    numbers are covariates of the past.

    Raises:
        DataError: They share no column, or the second lacks one of the `horizon` rows after the first.
    """
    for each in (frame, future):
        each.columns = [str(name) for name in each.columns]
        if time is not None and time in each.columns:
            each.rename(columns={time: "ds"}, inplace=True)
    stamps = "ds" if "ds" in frame.columns else time_column(frame, None)
    ahead = [name for name in frame.columns if name in future.columns and name not in {stamps, *LONG_COLUMNS}]
    if not ahead:
        raise DataError(
            f"the future frame shares no column with the data beside the time; it has {', '.join(future.columns)}"
        )
    text = [name for name in frame.columns if name not in {stamps, *LONG_COLUMNS} and not _is_number(frame[name])]
    dropped = [name for name in text if name not in ahead] if _is_long(frame) else []
    panel = read_panel(frame.drop(columns=dropped), freq=freq, ahead=ahead)
    panel = with_future(panel, future, horizon)
    notes = [f"columns not used: {', '.join(dropped)}"] if dropped else []
    notes += [f"covariates known ahead: {', '.join(panel.covariates.future_names)}"]
    if panel.channels.past:
        notes.append(f"covariates of the past: {', '.join(panel.covariates.past_names)}")
    return panel.table, panel.covariates, notes


def _is_number(column: pd.Series) -> bool:
    return bool((pd.to_numeric(column, errors="coerce").notna() | column.isna()).all())


def read_again(frame: pd.DataFrame, like: Panel, *, partial: bool = False) -> Panel:
    """Read another frame of the same columns and series, in any order; static covariates stay.

    Args:
        partial: Whether series may be without values, and in a long frame without rows.

    Raises:
        DataError: Its series, its covariates or its frequency are others; the message names them.
    """
    channels, long = like.channels, _is_long(frame)
    columns = [str(name) for name in frame.columns]
    absent = [name for name in channels.columns if name not in columns]
    if absent:
        raise DataError(
            f"the frame has no column {absent[0]!r}, a covariate that was there at fit; {nearest(absent[0], columns)}"
        )
    extra = [name for name in columns if name not in {*LONG_COLUMNS, *channels.columns}] if long else []
    if extra:
        raise DataError(f"column {extra[0]!r} was not there at fit; remove it, or fit with it")
    parts = frame[list(LONG_COLUMNS)] if long else frame.drop(columns=channels.columns)
    parts, empty = _without_empty(parts, long) if partial else (parts, [])
    table = read_table(parts, freq=like.table.freq)
    table = _in_order(_emptied(table, empty), like.table.names, allow_absent=partial and long)
    placed = {name: place(frame, name, table.stamps, table, long) for name in channels.columns}
    return _panel(frame, table, placed, channels, like.covariates.static)


def with_future(panel: Panel, frame: pd.DataFrame | None, horizon: int) -> Panel:
    """The panel with its covariates known ahead for `horizon` rows after every series' end.

    Args:
        frame: `ds` (or the wide frame's time column) and the covariates; `unique_id` too where series differ.

    Raises:
        DataError: A column, or a value of one of these rows, is missing.
    """
    needed = panel.channels.future
    if frame is None and needed:
        names = ", ".join(dict.fromkeys(repr(c.column) for c in needed))
        raise DataError(
            f"the covariates {names} are known ahead, so their next {horizon} rows are needed (futr_df=..., with 'ds')"
        )
    if frame is None:
        return panel
    if not needed:
        raise DataError("there are no covariates known ahead (futr_exog_list), so futr_df has no effect; leave it out")
    stamps, table = panel.stamps_ahead(horizon), panel.table
    columns = [str(name) for name in frame.columns]
    for name in dict.fromkeys(c.column for c in needed):
        if name not in columns:
            raise DataError(f"futr_df has no column {name!r}; {nearest(name, columns)}")
    known = np.full((len(stamps), len(needed)), np.nan)
    known[: table.rows] = panel.covariates.future[: table.rows]
    for j, channel in enumerate(needed):
        placed = place(frame, channel.column, stamps, table, "unique_id" in frame.columns, where="futr_df")
        after = channel_values(placed, channel, table.names, "futr_df")[table.rows :]
        known[table.rows :, j] = after
        end = panel.ends.max() if channel.series is None else panel.ends[table.names.index(channel.series)]
        row = next((i for i in range(end, end + horizon) if np.isnan(known[i, j])), None)
        if row is not None:
            raise DataError(
                f"futr_df has no value of {channel.label!r} at {short(stamps[row])}; the {horizon} rows from "
                f"{short(stamps[end])} to {short(stamps[end + horizon - 1])} are needed"
            )
    return replace(panel, covariates=replace(panel.covariates, future=carried(known)))


def extended(panel: Panel, frame: pd.DataFrame) -> Panel:
    """The panel with rows that come after those it has; the axis goes on at its frequency.

    Raises:
        DataError: A row is not after the last one of its series, does not fit the frequency, or has other columns.
    """
    table = panel.table
    new = read_again(frame, panel, partial=True)
    late = new.ends > 0
    offset = named_frequency(table.freq)
    last = max(table.stamps[-1], new.table.stamps[-1])
    stamps = pd.date_range(table.stamps[0], last, freq=offset)
    rows = stamps.get_indexer(new.table.stamps)
    if (rows < 0).any() and not new.table.stamps[0] < table.stamps[0]:
        raise DataError(
            f"the new row at {short(new.table.stamps[rows < 0][0])} does not go on every {table.freq} from "
            f"{short(table.stamps[-1])}"
        )
    firsts = np.array([_first(new, i) for i in range(len(table.names))])
    for i in np.flatnonzero(late):
        stamp = new.table.stamps[firsts[i]]
        if stamp <= table.stamps[panel.ends[i] - 1]:
            raise DataError(
                f"series {table.names[i]!r} has a new row at {short(stamp)}, and it is known up to "
                f"{short(table.stamps[panel.ends[i] - 1])}; only rows after that can be added"
            )
    values = _joined(table.values, new.table.values, rows, len(stamps), np.nan)
    past = carried(_joined(panel.covariates.past[: table.rows], new.covariates.past, rows, len(stamps), np.nan))
    future = carried(_joined(panel.covariates.future[: table.rows], new.covariates.future, rows, len(stamps), np.nan))
    longer = replace(table, stamps=stamps, values=values, observed=~np.isnan(values), rows_read=len(stamps), gaps=())
    ends = panel.ends.copy()
    ends[late] = rows[new.ends[late] - 1] + 1
    return Panel(longer, ends, replace(panel.covariates, past=past, future=future), panel.channels)


def read_static(frame: pd.DataFrame | None, names: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and values `(s, e)` of static covariates, in the order of the series.

    Raises:
        DataError: `unique_id` is missing or repeats, a series has no row, or a value is no number.
    """
    if frame is None:
        return (), np.zeros((0, 0))
    if "unique_id" not in frame.columns:
        raise DataError(f"static_df needs the column 'unique_id'; it has {', '.join(map(str, frame.columns))}")
    ids = pd.Index(frame["unique_id"].astype(str))
    twice = ids[ids.duplicated()]
    if len(twice):
        raise DataError(f"static_df has more than one row of the series {twice[0]!r}; keep one")
    absent = [name for name in names if name not in ids]
    if absent:
        raise DataError(f"static_df has no row of the series {absent[0]!r} ({len(absent)} such series)")
    columns = [name for name in frame.columns if name != "unique_id"]
    if not columns:
        raise DataError("static_df has no column beside 'unique_id'")
    order = ids.get_indexer(list(names))
    values = np.stack([numbers(frame[name], str(name), "static_df")[order] for name in columns], 1)
    rows, places = np.nonzero(np.isnan(values))
    if len(rows):
        raise DataError(f"static_df has no value of {columns[places[0]]!r} for the series {names[rows[0]]!r}")
    return tuple(map(str, columns)), values


def _is_long(frame: pd.DataFrame) -> bool:
    return set(LONG_COLUMNS) <= set(map(str, frame.columns))


def _panel(
    frame: pd.DataFrame, table: Table, placed: dict[str, np.ndarray], channels: Channels, static: np.ndarray
) -> Panel:
    def stacked(kind: tuple[Channel, ...]) -> np.ndarray:
        columns = [channel_values(placed[c.column], c, table.names, "the frame") for c in kind]
        return carried(np.stack(columns, 1)) if columns else np.zeros((table.rows, 0))

    names = [tuple(channel.label for channel in kind) for kind in (channels.past, channels.future)]
    covariates = Covariates(
        stacked(channels.past), stacked(channels.future), static, names[0], names[1], channels.static
    )
    return Panel(table, _ends(frame, table), covariates, channels)


def _ends(frame: pd.DataFrame, table: Table) -> np.ndarray:
    """Rows up to the last one of each series; 0 for a series without any."""
    if table.layout != "long":
        return np.full(len(table.names), table.rows)
    index, _ = parse_stamps(frame["ds"], "ds", freq=table.freq)
    codes, names = pd.factorize(frame["unique_id"].astype(str))
    last = pd.Series(index).groupby(codes).max().set_axis(pd.Index(names)).reindex(list(table.names))
    rows = table.stamps.get_indexer(pd.DatetimeIndex(last))
    return rows + 1


def _first(panel: Panel, series: int) -> int:
    """The first row that holds a value of a series; where none does, its last one."""
    seen = np.flatnonzero(panel.table.observed[:, series])
    return int(seen[0]) if len(seen) else int(panel.ends[series]) - 1


def _without_empty(frame: pd.DataFrame, long: bool) -> tuple[pd.DataFrame, list[str]]:
    """Series without any value get one, since a table has no others; and their names."""
    if long:
        ids = frame["unique_id"].astype(str)
        seen = frame["y"].notna().groupby(ids.to_numpy()).any()
        empty = [str(name) for name in seen.index[~seen.to_numpy()]]
        return frame.assign(y=frame["y"].mask(ids.isin(empty), 0.0)) if empty else frame, empty
    empty = [str(name) for name in frame.columns if not frame[name].notna().any()]
    return frame.assign(**dict.fromkeys(empty, 0.0)), empty


def _emptied(table: Table, names: list[str]) -> Table:
    """Without any value of these series."""
    if not names:
        return table
    values = table.values.copy()
    values[:, [table.names.index(name) for name in names]] = np.nan
    return replace(table, values=values, observed=~np.isnan(values))


def _in_order(table: Table, names: tuple[str, ...], allow_absent: bool) -> Table:
    """The series of a table in the order of `names`."""
    strange = [name for name in table.names if name not in names]
    absent = [name for name in names if name not in table.names]
    if strange or (absent and not allow_absent):
        raise DataError(
            f"fit saw the series {list(names)[:5]}, this frame has {list(table.names)[:5]}; "
            + (f"{strange[0]!r} is new" if strange else f"{absent[0]!r} is missing")
        )
    place = pd.Index(table.names).get_indexer(list(names))
    values = np.where(place < 0, np.nan, table.values[:, place])
    return replace(table, names=names, values=values, observed=~np.isnan(values))


def _joined(old: np.ndarray, new: np.ndarray, rows: np.ndarray, length: int, empty: float) -> np.ndarray:
    """Old rows, and the new ones that hold a value, on the longer axis."""
    found = np.full((length, old.shape[1]), empty)
    found[: len(old)] = old
    inside = rows >= 0
    new, rows = new[inside], rows[inside]
    found[rows] = np.where(np.isnan(new), found[rows], new)
    return found
