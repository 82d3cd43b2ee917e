"""Splits, scaling and windows against the benchmark's arithmetic, and the bundled data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from selectra.data.series import SeriesData, SeriesFile
from selectra.data.splits import Borders, borders_of, rows_needed
from selectra.data.table import read_table
from selectra.data.windows import Scaler, SeriesBatch
from selectra.errors import DataError
from tests.data.frames import hourly


def data_of(frame: pd.DataFrame, seq_len: int = 48, horizon: int = 12, split: str = "ratio") -> SeriesData:
    return SeriesData(read_table(frame), seq_len=seq_len, horizon=horizon, split=split)


def test_ett_borders() -> None:
    hours, quarters = borders_of("ett", 17_420, "h", 96, 96), borders_of("ett", 69_680, "15min", 96, 96)
    assert hours == Borders(8640, 11_520, 14_400)
    assert quarters == Borders(34_560, 46_080, 57_600)
    assert [hours.windows(part, 96, 96) for part in ("train", "val", "test")] == [8449, 2785, 2785]
    # The number of test windows does not depend on the look-back.
    assert hours.windows("test", 512, 96) == 2880 - 96 + 1
    assert hours.inputs("val", 96) == (8544, 11_520)


def test_the_last_split_tests_on_the_last_horizon() -> None:
    borders = borders_of("last", 1008, "h", 96, 48)
    assert borders == Borders(912, 960, 1008)
    assert [borders.windows(part, 96, 48) for part in ("train", "val", "test")] == [769, 1, 1]


@pytest.mark.parametrize("rows", [7588, 52_696, 966, 1001])
def test_ratio_borders(rows: int) -> None:
    borders = borders_of("ratio", rows, "D", 36, 24)
    assert borders.train == int(0.7 * rows)
    assert borders.test - borders.val == int(0.2 * rows)
    assert borders.test == rows
    assert borders.windows("test", 36, 24) == int(0.2 * rows) - 24 + 1


@pytest.mark.parametrize("split", ["ratio", "fit", "last"])
def test_rows_needed_is_the_least_that_works(split: str) -> None:
    least = rows_needed(split, 48, 12)
    borders_of(split, least, "h", 48, 12)
    with pytest.raises(DataError, match=f"{least:,} rows are needed, there are {least - 1}"):
        borders_of(split, least - 1, "h", 48, 12)


@pytest.mark.parametrize("split", ["ratio", "fit", "last"])
@pytest.mark.parametrize(("seq_len", "horizon"), [(12, 4), (1, 1), (7, 3), (96, 24), (5, 30)])
def test_from_rows_needed_on_every_number_works(split: str, seq_len: int, horizon: int) -> None:
    least = rows_needed(split, seq_len, horizon)
    for rows in range(least, least + 200):
        borders_of(split, rows, "h", seq_len, horizon)
    with pytest.raises(DataError, match="rows are needed"):
        borders_of(split, least - 1, "h", seq_len, horizon)


@pytest.mark.parametrize(
    ("split", "rows", "freq", "seq_len", "horizon", "message"),
    [
        ("ratio", 400, "h", 96, 0, "horizon must be at least 1, got 0"),
        ("ratio", 400, "h", 96, -3, "horizon must be at least 1, got -3"),
        ("ratio", 400, "h", 0, 3, "look-back must be at least 1, got 0"),
        ("ratio", 400, "h", 96, 96, "look-back 96 .* horizon 96 leave no window in the val part"),
        ("ratio", 400, "h", 300, 3, "no window in the train part"),
        ("ett", 400, "h", 96, 96, "split 'ett' needs 14,400 rows at 'h', there are 400"),
        ("ett", 20_000, "D", 96, 96, "split 'ett' is for hourly and 15-minute rows"),
        ("ett", 20_000, "h", 8640, 96, "no window in the train part .*the borders of 'ett' are fixed"),
        ("half", 400, "h", 96, 96, "unknown split 'half'; there are: ratio, ett"),
        ("last", 40, "h", 30, 6, "too few rows: .* no window in the train part .*; 48 rows are needed, there are 40"),
    ],
)
def test_bad_splits(split: str, rows: int, freq: str, seq_len: int, horizon: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        borders_of(split, rows, freq, seq_len, horizon)


def test_scaler_sees_observed_training_values_only() -> None:
    frame = hourly()
    frame.loc[10:20, "b"] = np.nan
    data = data_of(frame)
    train = frame["b"].iloc[:280]
    assert data.scaler.mean[1] == pytest.approx(train.mean(), rel=1e-12)
    assert data.scaler.std[1] == pytest.approx(train.std(ddof=0), rel=1e-12)
    frame.loc[280:, "b"] += 1e6
    assert data_of(frame).scaler.mean[1] == data.scaler.mean[1]


def test_scaler_of_a_constant_and_back() -> None:
    values = np.stack([np.full(50, 0.1), np.linspace(-3, 5, 50)], 1)
    scaler = Scaler.fit(values, np.ones_like(values, dtype=bool))
    assert scaler.std[0] == 1.0
    np.testing.assert_allclose(scaler.inverse(scaler.transform(values)), values, atol=1e-12)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_windows_are_all_there_and_in_place(part: str) -> None:
    data = data_of(hourly())
    windows = data.windows(part)  # type: ignore[arg-type]
    first, end = data.borders.targets(part)  # type: ignore[arg-type]
    scaled = data.scaler.transform(data.table.values).astype(np.float32)
    begin = 0 if part == "train" else first - 48
    assert len(windows) == end - begin - 48 - 12 + 1
    batch = windows[list(range(len(windows)))]
    assert batch.x.shape == (len(windows), 48, 2) and batch.y is not None and batch.y.shape == (len(windows), 12, 2)
    for i in (0, 5, len(windows) - 1):
        np.testing.assert_array_equal(batch.x[i].numpy(), scaled[begin + i : begin + i + 48])
        np.testing.assert_array_equal(batch.y[i].numpy(), scaled[begin + i + 48 : begin + i + 60])
    # The last target is the last row of the part.
    np.testing.assert_array_equal(batch.y[-1, -1].numpy(), scaled[end - 1])
    assert len(windows[3]) == 1
    assert torch.equal(windows[[7, 2]].x, batch.x[[7, 2]])
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_unobserved_is_zero_and_marked() -> None:
    frame = hourly().drop(index=[60])
    frame.loc[61, "b"] = np.nan
    batch = data_of(frame).windows("train")[[0, 20]]
    assert batch.y is not None and batch.y_observed is not None
    # Row 60 and 61 are steps 12 and 13 after row 48.
    later = data_of(frame).windows("train")[[13]]
    assert not later.observed[0, 47].any() and later.observed[0, 46].all()
    assert (later.x[0, 47] == 0).all()
    assert later.y_observed is not None and later.y_observed[0, 0].tolist() == [True, False]
    assert later.y is not None and later.y[0, 0, 1] == 0
    assert torch.isfinite(batch.x).all() and torch.isfinite(batch.y).all()


def test_batches_move_whole() -> None:
    batch = data_of(hourly()).windows("train")[[0, 1]]
    moved = batch.to("cpu")
    assert isinstance(moved, SeriesBatch) and torch.equal(moved.x, batch.x) and moved.past is None


def test_facts_future_and_mase() -> None:
    frame = hourly()
    data = data_of(frame)
    assert data.facts == {"seq_len": 48, "horizon": 12, "n_series": 2, "season": 24}
    assert data.future_stamps()[0] == frame["time"].iloc[-1] + pd.Timedelta("1h") and len(data.future_stamps()) == 12
    scaled = data.scaler.transform(data.table.values[-48:]).astype(np.float32)
    np.testing.assert_array_equal(data.future_window().x[0].numpy(), scaled)
    train = frame["b"].to_numpy()[:280]
    assert data.seasonal_errors[1] == pytest.approx(np.abs(train[24:] - train[:-24]).mean())
    frame["b"] = 3.0
    assert np.isnan(SeriesData(read_table(frame), seq_len=48, horizon=12, constant="keep").seasonal_errors[1])


def test_a_constant_series_is_refused_unless_kept(tmp_path: Path) -> None:
    frame = hourly()
    frame.loc[:279, "b"] = 3.0
    frame.loc[:3, "b"] = np.nan
    message = r"series 'b' has the value 3 in every row of the training part \(2020-01-01 04:00 to .*\(1 such series\)"
    with pytest.raises(DataError, match=message):
        data_of(frame)
    frame.to_csv(tmp_path / "t.csv", index=False)
    kept = SeriesFile(str(tmp_path / "t.csv"), seq_len=48, horizon=12, constant="keep")
    assert kept.scaler.std[1] == 1.0 and kept.scaler.mean[1] == 3.0
    frame.loc[5, "b"] = 3.001
    data_of(frame)


def test_a_series_without_training_values_is_refused() -> None:
    frame = hourly()
    frame.loc[:300, "b"] = np.nan
    with pytest.raises(DataError, match="series 'b' has no value in the training part"):
        data_of(frame)


@pytest.mark.parametrize(("part", "gap"), [("train", (48, 280)), ("val", (280, 320)), ("test", (320, 400))])
def test_a_part_without_targets_is_refused(part: str, gap: tuple[int, int], tmp_path: Path) -> None:
    frame = hourly()
    frame.loc[gap[0] : gap[1] - 1, "b"] = np.nan
    data_of(frame)
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=f"the {part} part .* has no value of 'b' to forecast; cut the file"):
        SeriesFile(str(tmp_path / "t.csv"), seq_len=48, horizon=12, target="b")
    frame.loc[gap[0] : gap[1] - 1, "a (°C)"] = np.nan
    with pytest.raises(DataError, match=f"the {part} part .* has no value to forecast"):
        data_of(frame)


def test_unknown_target_is_refused(tmp_path: Path) -> None:
    hourly().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="no series 'bb'; did you mean 'b'"):
        SeriesFile(str(tmp_path / "t.csv"), seq_len=24, horizon=4, target="bb")


def test_bundled_weather() -> None:
    data = SeriesFile(seq_len=96, horizon=24)
    assert data.freq == "h" and data.facts["n_series"] == 12
    assert data.table.rows_read == 8714 and data.table.rows == 8730
    assert sum(count for _, count in data.table.gaps) == 16
    assert not data.table.notes
    assert any("masked, not filled" in line for line in data.summary())


def test_real_benchmark_files(data_folder: Path) -> None:
    data = SeriesFile(str(data_folder / "ett-small" / "ETTh1.csv.gz"), seq_len=96, horizon=96, split="ett")
    assert [len(data.windows(part)) for part in ("train", "val", "test")] == [8449, 2785, 2785]
    assert data.names[-1] == "OT" and data.freq == "h" and data.table.observed.all()
    path = str(data_folder / "ltsf-extra" / "weather.csv.gz")
    with pytest.raises(DataError, match="1 rows repeat a time stamp: 2020"):
        SeriesFile(path)
    weather = SeriesFile(path, stamps="order")
    assert len(weather.windows("test")) == int(0.2 * 52_696) - 96 + 1
    assert sum("-9999" in note for note in weather.table.notes) == 3
