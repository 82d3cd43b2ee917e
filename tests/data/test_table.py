"""Files and frames to tables: what is found, what is marked, and what is refused in which words."""

import gzip
from collections.abc import Callable
from pathlib import Path

import narwhals as nw
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from selectra.data.stamps import season_of
from selectra.data.table import read_table
from selectra.errors import DataError
from tests.data.frames import hourly, long

BASE = hourly()
ROWS = len(BASE)


def changed(column: str, row: int, value: object) -> pd.DataFrame:
    frame = BASE.astype({column: object})
    frame.loc[row, column] = value
    return frame


def at(freq: str, start: str = "2000-01-03") -> pd.DataFrame:
    return BASE.assign(time=pd.date_range(start, periods=ROWS, freq=freq))


def written(rows: int, freq: str, form: str) -> pd.DataFrame:
    frame = BASE.iloc[:rows]
    return frame.assign(time=pd.date_range("2013-01-01", periods=rows, freq=freq).strftime(form))


def same(frame: pd.DataFrame | Path) -> None:
    table = read_table(frame)
    assert table.names == ("a (°C)", "b")
    assert table.freq == "h" and table.rows == ROWS
    np.testing.assert_allclose(table.values, BASE[["a (°C)", "b"]].to_numpy())
    assert table.observed.all()


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "semicolons.csv", "tabs.csv"])
def test_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        BASE.to_parquet(path)
    elif name == "semicolons.csv":
        BASE.to_csv(path, index=False, sep=";", decimal=",")
    else:
        BASE.to_csv(path, index=False, sep="\t" if name == "tabs.csv" else ",")
    same(path)


def test_wide_long_index_and_other_frames_agree() -> None:
    same(BASE)
    same(long(BASE))
    same(BASE.set_index("time"))
    same(nw.to_native(nw.from_native(pa.Table.from_pandas(BASE))))


@pytest.mark.parametrize(
    "stamps",
    [
        BASE["time"].dt.strftime("%d.%m.%Y %H:%M"),
        BASE["time"].dt.strftime("%Y/%m/%d %H:%M"),
        BASE["time"].dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        BASE["time"].dt.tz_localize("UTC"),
    ],
)
def test_stamps_are_read(stamps: pd.Series) -> None:
    same(BASE.assign(time=stamps))
    # Found by content where the name says nothing.
    same(BASE.assign(time=stamps).rename(columns={"time": "Zeitpunkt"}))


def test_only_a_long_table_has_rows_in_any_order() -> None:
    same(long(BASE).iloc[::-1][["ds", "unique_id", "y"]].sort_values("unique_id", kind="stable"))
    swapped = BASE.iloc[[0, 1, 3, 2, *range(4, ROWS)]]
    with pytest.raises(DataError, match=r"'time', row 4 below .*: 2020-01-01 02:00:00 comes after .*Sort the rows by"):
        read_table(swapped)
    assert read_table(swapped, stamps="order").rows == ROWS


def zoned(start: str, zone: str, freq: str, rows: int = 96) -> pd.DataFrame:
    """A clock on the wall, which shows no offset."""
    stamps = pd.date_range(start, periods=rows, freq=freq, tz=zone)
    return pd.DataFrame({"time": stamps.tz_localize(None), "a": np.arange(float(rows))})


@pytest.mark.parametrize(
    ("start", "zone", "freq"),
    [
        ("2021-10-30", "Europe/Berlin", "h"),
        ("2021-10-30 18:00", "Europe/Berlin", "15min"),
        ("2021-11-06", "America/New_York", "30min"),
        ("2021-04-03", "Australia/Sydney", "h"),
    ],
)
def test_the_repeated_hour_of_autumn_is_named(start: str, zone: str, freq: str) -> None:
    frame = zoned(start, zone, freq)
    with pytest.raises(
        DataError, match=r"column 'time', row \d+ below .*end of daylight-saving time repeats: write the"
    ):
        read_table(frame)
    with pytest.raises(DataError, match=r"column 'ds', row \d+ below .*end of daylight-saving time repeats: write the"):
        read_table(long(frame))
    stamps = pd.date_range(start, periods=96, freq=freq, tz=zone)
    for aware in (stamps, stamps.astype(str)):
        assert read_table(frame.assign(time=aware)).rows == 96


def test_the_hour_that_spring_leaves_out_is_unobserved() -> None:
    table = read_table(zoned("2021-03-27", "Europe/Berlin", "h"))
    assert table.rows == 97 and [count for _, count in table.gaps] == [1]


def test_mixed_frequencies_are_named_unless_one_is_asked_for() -> None:
    late = pd.DataFrame({"time": pd.date_range("2020-01-17 16:00", periods=40, freq="15min"), "a (°C)": 1.0, "b": 2.0})
    with pytest.raises(
        DataError, match=r"most rows are 1 hour apart, and from 2020-01-17 16:00:00 on \(.*row 401 below"
    ):
        read_table(pd.concat([BASE, late]))
    coarse = BASE.iloc[[*range(0, 288, 24), *range(288, ROWS)]]
    with pytest.raises(
        DataError, match=r"mixed frequencies: most rows are 1 hour .*row 1 below .* they are 1 day apart"
    ):
        read_table(coarse)
    daily = pd.DataFrame({"ds": pd.date_range("2020-01-01", periods=16, freq="D"), "unique_id": "c", "y": 1.0})
    mixed = pd.concat([long(BASE), daily])
    with pytest.raises(DataError, match=r"'a \(°C\)' are 1 hour apart, those of series 'c' \(.*row 801 below .* 1 day"):
        read_table(mixed)
    assert read_table(mixed, freq="h").observed[:, 2].sum() == 16
    late = long(BASE.drop(columns="a (°C)")).assign(unique_id="c", ds=lambda frame: frame["ds"] + pd.Timedelta("7min"))
    shifted = pd.concat([long(BASE), late])
    with pytest.raises(DataError, match=r"those of series 'c' \(column 'ds', row 801 .* lie between those of 'a"):
        read_table(shifted)


def test_gaps_are_no_frequency() -> None:
    """Nights and weekends without rows, and single rows that are missing here and there."""
    day = BASE.loc[BASE["time"].dt.hour.between(8, 17)]
    assert read_table(day).freq == "h"
    assert read_table(BASE.loc[np.random.default_rng(0).random(ROWS) > 0.4]).freq == "h"
    whole = long(BASE)
    assert read_table(whole.loc[np.random.default_rng(0).random(len(whole)) > 0.4]).freq == "h"


def test_missing_rows_are_inserted_as_unobserved() -> None:
    table = read_table(BASE.drop(index=[50, 51, 90]))
    assert table.rows == ROWS and table.rows_read == ROWS - 3
    assert np.flatnonzero(~table.observed.all(1)).tolist() == [50, 51, 90]
    assert np.isnan(table.values[[50, 51, 90]]).all()
    assert [count for _, count in table.gaps] == [2, 1]


def test_missing_values_stay_missing() -> None:
    frame = BASE.copy()
    frame.loc[3:5, "b"] = np.nan
    table = read_table(frame)
    assert np.flatnonzero(~table.observed[:, 1]).tolist() == [3, 4, 5]
    assert table.observed[:, 0].all()


def test_ragged_long_series_are_unobserved_where_they_are_absent() -> None:
    table = read_table(long(BASE).iloc[: ROWS + 100])
    assert table.observed.sum(0).tolist() == [ROWS, 100]


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        ("h", 24),
        ("15min", 96),
        ("10min", 144),
        ("D", 7),
        ("B", 5),
        ("W-MON", 52),
        ("MS", 12),
        ("ME", 12),
        ("QS-JAN", 4),
    ],
)
def test_frequency_is_inferred_despite_gaps(freq: str, season: int) -> None:
    whole, table = read_table(at(freq, "1900-01-01")), read_table(at(freq, "1900-01-01").drop(index=[7, 8, 100]))
    assert table.stamps.equals(whole.stamps)
    assert len(table.gaps) == 2
    assert season_of(whole.freq) == season_of(table.freq) == season


def test_months_from_a_day_within_the_month() -> None:
    frame = BASE.assign(time=pd.date_range("1990-01-15", periods=ROWS, freq=pd.DateOffset(months=1)))
    table = read_table(frame.drop(index=[7, 8]))
    assert table.freq == "1 month" and table.rows == ROWS and table.gaps[0][1] == 2
    assert season_of(table.freq) == 12 and read_table(frame, freq=table.freq).gaps == ()
    quarters = BASE.iloc[:99].assign(time=pd.date_range("1990-02-10", periods=99, freq=pd.DateOffset(months=3)))
    assert read_table(quarters).freq == "3 months" and season_of("3 months") == 4


@pytest.mark.parametrize(
    ("rows", "freq", "form", "noted"),
    [
        (120, "MS", "%d/%m/%Y", True),
        (24, "MS", "%d/%m/%Y %H:%M", True),
        (120, "MS", "%m/%d/%Y", False),
        (48, "h", "%d.%m.%Y %H:%M", True),
        (48, "h", "%m/%d/%Y %H:%M", False),
        (12, "MS", "%Y/%m/%d", False),
    ],
)
def test_day_first_is_taken_where_only_that_is_regular(rows: int, freq: str, form: str, noted: bool) -> None:
    table = read_table(written(rows, freq, form))
    assert (table.freq, table.rows) == (freq, rows)
    assert any("with the day first" in note for note in table.notes) == noted


def test_a_named_frequency_tells_month_first_from_day_first() -> None:
    frame = written(12, "MS", "%d/%m/%Y")
    assert str(read_table(frame, freq="MS").stamps[1]) == "2013-02-01 00:00:00"
    assert str(read_table(frame, freq="D").stamps[1]) == "2013-01-02 00:00:00"


def test_the_time_column_is_the_one_with_whole_dates() -> None:
    parts = pd.DataFrame({"year": 2020, "month": 1, "time": BASE["time"], "b": BASE["b"]})
    assert read_table(parts).time_name == "time"
    with pytest.raises(DataError, match="column 'day', row 1 below the header: 'Monday' is not a number"):
        read_table(pd.DataFrame({"day": "Monday", "date": BASE["time"].astype(str), "b": BASE["b"]}))
    other = pd.DataFrame({"year": 2020, "Zeitpunkt": BASE["time"], "b": BASE["b"]})
    assert read_table(other).time_name == "Zeitpunkt"
    split = BASE.assign(date=BASE["time"].astype(str), time=5.0)
    assert read_table(split).time_name == "date"


def test_a_nameless_count_of_rows_is_left_out(tmp_path: Path) -> None:
    BASE.to_csv(tmp_path / "t.csv")
    same(tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv").notes == ("column 'Unnamed: 0' only counts the rows and is left out",)
    kept = read_table(BASE.rename(columns={"b": "Unnamed: 0"}))
    assert kept.names == ("a (°C)", "Unnamed: 0")


def test_time_index_in_parquet_and_late_decimal_commas(tmp_path: Path) -> None:
    BASE.set_index("time").to_parquet(tmp_path / "t.parquet")
    same(tmp_path / "t.parquet")
    rows = ["time;a;b", *(f"{stamp};1;2" for stamp in BASE["time"][:5]), *(f"{s};1,5;2,5" for s in BASE["time"][5:])]
    (tmp_path / "late.csv").write_text("\n".join(rows))
    assert read_table(tmp_path / "late.csv").values[[0, 5]].tolist() == [[1, 2], [1.5, 2.5]]


def test_years_and_numbers_as_dates() -> None:
    years = pd.DataFrame({"year": range(1900, 2000), "a": np.arange(100.0)})
    assert read_table(years).freq.startswith("YS")
    days = BASE.assign(time=pd.date_range("2020-01-01", periods=ROWS).strftime("%Y%m%d").astype(int))
    assert read_table(days).freq == "D"


def test_a_lone_extreme_value_is_said_and_kept() -> None:
    table = read_table(changed("b", 8, -9999.0))
    assert table.values[8, 1] == -9999 and table.observed[8, 1]
    assert any(note.startswith("b: -9999 (once)") for note in table.notes)
    assert not read_table(BASE).notes


def test_stamps_in_order_ignore_damage() -> None:
    frame = pd.concat([BASE.iloc[:200], BASE.iloc[199:]])
    table = read_table(frame, stamps="order")
    assert table.rows == ROWS + 1 and table.freq == "h" and table.observed.all()


def test_target_may_leave_the_unit_out() -> None:
    table = read_table(BASE)
    assert table.index_of("a") == table.index_of("a (°C)") == 0
    with pytest.raises(DataError, match="no series 'bb'; did you mean 'b'"):
        table.index_of("bb")


BAD: list[tuple[str, Callable[[], object], str]] = [
    ("no time column", lambda: read_table(BASE.drop(columns="time")), r"no time column: none of a \(°C\), b"),
    ("named time column", lambda: read_table(BASE, time="tme"), "no column 'tme' for the time; did you mean 'time'"),
    ("date", lambda: read_table(changed("time", 5, "soon")), "'time', row 6 below the header: 'soon' is not a date"),
    ("no date", lambda: read_table(changed("time", 5, None)), "row 6 below the header: .* is not a date"),
    ("numbers", lambda: read_table(BASE.assign(time=np.arange(ROWS) + 10**9)), r"'time' holds numbers \(1000000000"),
    ("text", lambda: read_table(changed("b", 7, "n/a?")), "column 'b', row 8 below the header: 'n/a\\?' is not a numb"),
    ("dates", lambda: read_table(BASE.assign(t2=BASE["time"])), "column 't2' holds dates"),
    ("twice", lambda: read_table(pd.concat([BASE, BASE.iloc[[3, 4]]])), "2 rows repeat a time stamp: 2020-01-01 03:00"),
    ("twice", lambda: read_table(pd.concat([long(BASE), long(BASE).iloc[[3]]])), "first is 2020-01-01 03:00:00 of 'a"),
    ("all NaN", lambda: read_table(BASE.assign(c=np.nan)), "column 'c' has no value at all"),
    ("frequency", lambda: read_table(BASE, freq="hour"), "unknown frequency 'hour'.* Did you mean 'h'"),
    ("frequency", lambda: read_table(BASE, freq="2h"), "200 time stamps do not fit the named frequency '2h'"),
    ("frequency", lambda: read_table(BASE, freq="s"), "frequency 's' more than 20 of 21 rows would be missing"),
    ("irregular", lambda: read_table(changed("time", 9, pd.Timestamp("2020-01-01 09:07"))), "1 time stamps do not fit"),
    ("two rows", lambda: read_table(BASE.iloc[:2]), "too few to infer the frequency"),
    ("no rows", lambda: read_table(BASE.iloc[:0]), "no rows"),
    ("no numbers", lambda: read_table(BASE.drop(columns=["a (°C)", "b"])), "only the time column"),
    ("same name", lambda: read_table(pd.concat([BASE, BASE[["b"]]], axis=1)), "'b' occurs more than once"),
    ("former name", lambda: read_table(BASE, freq="H"), "unknown frequency 'H'.* Did you mean 'h'"),
    ("former name", lambda: read_table(BASE, freq="15T"), "Did you mean '15min'"),
    ("no year", lambda: read_table(BASE.assign(time=np.arange(ROWS) + 1000)), r"'time' holds numbers \(1000, "),
    ("two readings", lambda: read_table(written(12, "MS", "%d/%m/%Y")), "'01/02/2013' is 2013-01-02 with the month"),
    ("no id", lambda: read_table(long(BASE).replace({"unique_id": {"b": None}})), "'unique_id', row 401 .* is empty"),
    ("inf", lambda: read_table(changed("b", 7, np.inf)), "'b', row 8 below the header: inf is infinite or too large"),
    (
        "inf",
        lambda: read_table(changed("b", 7, "-1e999")),
        "'b', row 8 below the header: -inf is infinite .*Leave it e",
    ),
    ("huge", lambda: read_table(BASE.assign(b=1e200)), "'b', row 1 below the header: 1e.200 is .*400 such values"),
    ("complex", lambda: read_table(BASE.assign(b=1j)), "column 'b' holds complex numbers"),
    ("durations", lambda: read_table(BASE.assign(b=pd.Timedelta("1h"))), "column 'b' holds durations"),
    ("no y", lambda: read_table(long(BASE).rename(columns={"y": "yy"})), "no column 'y'; if it is 'yy', rename that"),
    ("no ds", lambda: read_table(long(BASE).drop(columns="ds")), "has the columns unique_id, ds, y; .* no column 'ds'"),
    ("no unique_id", lambda: read_table(long(BASE).drop(columns="unique_id")), "name these in a column 'unique_id'"),
    ("place", lambda: read_table(pd.concat([BASE, BASE.iloc[[3]]])), "'time', row 401 below the header, as row 4"),
    ("no frame", lambda: read_table([1, 2]), "expected a data frame .* got list"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_tables(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_bad_files(tmp_path: Path) -> None:
    cases = {
        "empty.csv": (b"", "is empty"),
        "header.csv": (b"time,a\n", "has a header and no rows"),
        "broken.csv.gz": (gzip.compress(BASE.to_csv().encode())[:500], "cannot be read"),
        "text.csv.gz": (b"time,a\n", "cannot be read"),
        "latin.csv": ("time,Köln\n2020-01-01,1\n".encode("latin-1"), "not text in UTF-8 .*save it as CSV in UTF-8"),
        "no.parquet": (b"time,a\n", "cannot be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / name)
    with pytest.raises(DataError, match=r"there is no file .*; did you mean 'empty.csv'"):
        read_table(tmp_path / "emtpy.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)
