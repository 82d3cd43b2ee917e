"""Frames with covariates, gaps and unequal series; updates; saved Forecasters; other kinds of frames."""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from selectra.errors import ConfigError, DataError
from selectra.forecaster import Forecaster
from selectra.registry import models
from tests.data.frames import hourly, long

SMOKE = [name for name in models.names("series") if name.endswith("_smoke")]
FEW: dict[str, Any] = {"h": 4, "input_size": 24, "train_args": {"max_steps": 2}}


def panel(rows: int = 200, late: int = 0) -> pd.DataFrame:
    """Three series with a price of their own, a holiday common to all and a temperature; the last one ends earlier."""
    rng = np.random.default_rng(1)
    stamps = pd.date_range("2020-01-01", periods=rows, freq="h")
    holiday, warm = (np.arange(rows) % 5 == 0).astype(float), rng.normal(size=rows)
    parts = []
    for i, name in enumerate(("a", "b", "c")):
        price = rng.normal(size=rows)
        y = 10 * i + np.sin(np.arange(rows) / 4) + 3 * price + 5 * holiday
        part = pd.DataFrame({"unique_id": name, "ds": stamps, "y": y, "holiday": holiday, "price": price, "warm": warm})
        parts.append(part if name != "c" else part.iloc[: rows - late])
    return pd.concat(parts, ignore_index=True)


STATIC = pd.DataFrame({"unique_id": ["b", "a", "c"], "size": [2.0, 1.0, 5.0], "north": [True, False, False]})
AHEAD = ["holiday", "price"]


def split(frame: pd.DataFrame, rows: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The first rows, and the covariates known ahead of the others."""
    border = frame["ds"].min() + pd.Timedelta(hours=rows)
    return frame[frame["ds"] < border], frame.loc[frame["ds"] >= border, ["unique_id", "ds", *AHEAD]]


@pytest.mark.parametrize("model", SMOKE)
def test_every_model_takes_every_covariate(model: str) -> None:
    frame, ahead = split(panel(), 190)
    forecaster = Forecaster(model, **FEW, futr_exog_list=AHEAD, level=[80]).fit(frame, static_df=STATIC)
    assert forecaster.facts_ | {"n_future": 4, "n_past": 1, "n_static": 2} == forecaster.facts_
    found = forecaster.predict(futr_df=ahead)
    assert list(found.columns) == ["unique_id", "ds", model, f"{model}-lo-80", f"{model}-hi-80"]
    assert found[model].notna().all() and len(found) == 12
    # After two steps already, the future speaks.
    other = forecaster.predict(futr_df=ahead.assign(price=ahead["price"] + 50))
    assert not np.allclose(other[model], found[model], atol=1e-6)


@pytest.mark.parametrize("model", ["dlinear", "timemachine_smoke", "naive", "linear"])
def test_covariates_known_ahead_help(model: str) -> None:
    frame = panel(400)
    settings: dict[str, Any] = {"h": 4, "input_size": 12, "train_args": {"max_steps": 200, "learning_rate": 1e-2}}
    errors = []
    for names in ([], AHEAD):
        columns = ["unique_id", "ds", "y", *names]
        found = Forecaster(model, **settings, futr_exog_list=names).cross_validation(frame[columns], n_windows=8)
        errors.append((found["y"] - found[model]).abs().mean())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("model", SMOKE)
@pytest.mark.parametrize("layout", ["wide", "long", "covariates"])
def test_an_update_is_a_prediction_of_the_longer_frame(model: str, layout: str) -> None:
    more: dict[str, Any] = {}
    if layout == "covariates":
        frame, ahead = split(panel(late=3), 190)
        # Known before the new rows, and not in them.
        frame["warm"] = frame["warm"].where(frame["ds"] < frame["ds"].max() - pd.Timedelta(hours=8))
        border, settings = frame["ds"].max() - pd.Timedelta(hours=6), {**FEW, "futr_exog_list": AHEAD}
        early, late, more = frame[frame["ds"] <= border], frame[frame["ds"] > border], {"futr_df": ahead}
    else:
        wide = hourly(150)
        wide.loc[140:143, "b"] = np.nan
        wide.loc[148:, "b"] = np.nan
        frame = wide if layout == "wide" else long(wide)
        early = frame[frame["ds" if layout == "long" else "time"] < wide["time"].iloc[139]]
        late, settings = frame.drop(index=early.index), FEW
    forecaster = Forecaster(model, **settings, level=[90]).fit(early)
    whole = forecaster.predict(frame, **more)
    time = "time" if layout == "wide" else "ds"
    steps = [late] if layout == "covariates" else [late[late[time] == stamp] for stamp in sorted(late[time].unique())]
    updated = pd.DataFrame()
    for rows in steps:
        updated = forecaster.update(rows, **more)
    assert list(updated.columns) == list(whole.columns)
    assert (updated["ds"].to_numpy() == whole["ds"].to_numpy()).all()
    for name in whole.columns[2:]:
        np.testing.assert_allclose(updated[name], whole[name], rtol=1e-6, atol=1e-6)
    again = forecaster.predict(**more)
    pd.testing.assert_frame_equal(again, updated)


def test_series_are_forecast_from_their_own_ends() -> None:
    frame = panel(late=30)[["unique_id", "ds", "y"]]
    forecaster = Forecaster("naive", **FEW).fit(frame)
    found = forecaster.predict()
    for name, part in frame.groupby("unique_id"):
        own = found[found["unique_id"] == name]
        assert own["ds"].tolist() == list(pd.date_range(part["ds"].max() + pd.Timedelta("1h"), periods=4, freq="h"))
        np.testing.assert_allclose(own["naive"], part["y"].iloc[-1], rtol=1e-6)
    alone = Forecaster("naive", **FEW).fit(frame[frame["unique_id"] == "c"]).predict()
    np.testing.assert_allclose(alone["naive"], found.loc[found["unique_id"] == "c", "naive"], rtol=1e-6)
    crossed = forecaster.cross_validation(frame, n_windows=3)
    assert set(crossed["unique_id"]) == {"a", "b"}


def test_rows_before_the_first_one_are_not_observed() -> None:
    frame = panel(late=190)[["unique_id", "ds", "y"]]
    forecaster = Forecaster("naive", **FEW).fit(frame)
    window = forecaster.predictor_.window(forecaster.panel_, forecaster.panel_.ends)
    assert forecaster.panel_.ends.tolist() == [200, 200, 10]
    assert not window.observed[2, :14].any() and window.observed[2, 14:].all() and window.observed[0, :, :2].all()
    assert not window.x[2, :14].any()


def test_an_update_refuses_what_is_not_new() -> None:
    wide = hourly(150)
    forecaster = Forecaster("naive", **FEW).fit(wide.iloc[:140])
    before = forecaster.predict()
    cases = [
        (wide.iloc[139:142], r"'a \(°C\)' has a new row at .*known up to"),
        (wide.iloc[100:101], "only rows after that"),
        (wide.iloc[140:143].assign(time=lambda f: f["time"] + pd.Timedelta("20min")), "does not go on every h"),
        (wide.iloc[140:143].drop(columns="b"), "'b' is missing"),
        (wide.iloc[140:143].assign(c=1.0), "'c' is new"),
    ]
    for rows, message in cases:
        with pytest.raises(DataError, match=message):
            forecaster.update(rows)
        assert forecaster.predict().equals(before)
    # A gap is a gap.
    later = forecaster.update(wide.iloc[145:147])
    assert later["ds"].iloc[0] == wide["time"].iloc[147]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="price"), r"futr_df has no column 'price'"),
        (
            lambda f: f.drop(columns="unique_id"),
            "'price' differs between series, so futr_df needs the column 'unique_id'",
        ),
        (lambda f: f[f["ds"] < f["ds"].min() + pd.Timedelta("3h")], r"no value of 'holiday' at 2020-01-08 21:00"),
        (
            lambda f: f.assign(price=f["price"].where(f["unique_id"] != "b")),
            r"no value of 'price\[b\]' at 2020-01-08 18",
        ),
        (lambda f: f.assign(price="dear"), "row 1: 'dear' is not a number"),
        (lambda f: f.assign(holiday=f["price"]), "'holiday' was the same for all series at fit"),
        (lambda f: None, r"the covariates 'holiday', 'price' are known ahead, so their next 4 rows are needed"),
    ],
)
def test_what_the_future_frame_lacks_is_named(change: Any, message: str) -> None:
    frame, ahead = split(panel(), 186)
    forecaster = Forecaster("naive", **FEW, futr_exog_list=AHEAD).fit(frame)
    with pytest.raises(DataError, match=message):
        forecaster.predict(futr_df=change(ahead))


def test_frames_of_another_schema_are_refused() -> None:
    frame, ahead = split(panel(), 186)
    forecaster = Forecaster("naive", **FEW, futr_exog_list=AHEAD).fit(frame, static_df=STATIC)
    cases = [
        (frame.drop(columns="warm"), "no column 'warm', a covariate that was there at fit"),
        (frame.assign(more=1.0), "column 'more' was not there at fit"),
        (frame[frame["unique_id"] != "b"], "fit saw the series .*'b' is missing"),
        (frame.rename(columns={"y": "value"}), "no column 'y'|fit saw the series|not a number"),
    ]
    for changed, message in cases:
        with pytest.raises(DataError, match=message):
            forecaster.predict(changed, futr_df=ahead)
    with pytest.raises(DataError, match="no covariates known ahead"):
        Forecaster("naive", **FEW).fit(frame[["unique_id", "ds", "y"]]).predict(futr_df=ahead)
    for static, message in (
        (STATIC.drop(columns="unique_id"), "needs the column 'unique_id'"),
        (STATIC.iloc[:2], "no row of the series 'c'"),
        (pd.concat([STATIC, STATIC]), "more than one row of the series 'b'"),
        (STATIC.assign(size="big"), "'big' is not a number"),
        (STATIC.assign(size=[1.0, np.nan, 2.0]), "no value of 'size' for the series 'a'"),
    ):
        with pytest.raises(DataError, match=message):
            Forecaster("naive", **FEW).fit(frame[["unique_id", "ds", "y"]], static_df=static)
    with pytest.raises(DataError, match=r"no column 'prise'.*did you mean 'price'"):
        Forecaster("naive", **FEW, futr_exog_list=["prise"]).fit(frame)
    with pytest.raises(DataError, match="column 'place' of the frame, row 1: 'here' is not a number"):
        Forecaster("naive", **FEW).fit(frame.assign(place="here"))


def test_val_size_and_its_limits() -> None:
    wide = hourly(200)
    forecaster = Forecaster("naive", **FEW, level=[50]).fit(wide, val_size=23)
    assert forecaster.predictor_.calibration is not None and forecaster.predictor_.calibration.windows == 20
    for size in (3, 190):
        with pytest.raises(DataError, match=f"val_size={size} leaves no window"):
            forecaster.fit(wide, val_size=size)


@pytest.mark.parametrize("model", ["tsm2_smoke", "linear", "naive", "patchtst_smoke", "quantiles"])
def test_a_saved_forecaster_goes_on_where_it_was(model: str, tmp_path: Path) -> None:
    frame, ahead = split(panel(late=3), 186)
    arguments: dict[str, Any] = {"model_args": {"quantiles": (0.1, 0.5, 0.9)}} if model == "quantiles" else {}
    name = "dlinear" if model == "quantiles" else model
    forecaster = Forecaster(name, **FEW, level=[80], futr_exog_list=AHEAD, **arguments).fit(frame, static_df=STATIC)
    before = forecaster.predict(futr_df=ahead)
    for _ in range(2):
        forecaster.save(tmp_path / "kept")
    assert sorted(p.suffix for p in (tmp_path / "kept").iterdir()) == [".json", ".safetensors"]
    other = Forecaster.load(tmp_path / "kept")
    assert other.get_params() == forecaster.get_params()
    pd.testing.assert_frame_equal(other.predict(futr_df=ahead), before)
    pd.testing.assert_frame_equal(other.predict(frame, futr_df=ahead), forecaster.predict(frame, futr_df=ahead))
    late = panel(late=3)
    late = late[late["ds"] >= ahead["ds"].min()].query("ds < '2020-01-08 20:00'")
    pd.testing.assert_frame_equal(other.update(late, futr_df=ahead), forecaster.update(late, futr_df=ahead))


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    forecaster = Forecaster("dlinear", **FEW).fit(hourly(150))
    with pytest.raises(ConfigError, match="not fitted"):
        Forecaster("dlinear").save(tmp_path / "kept")
    kept = tmp_path / "kept"
    forecaster.save(kept)
    index, arrays = kept / "forecaster.json", next(kept.glob("*.safetensors"))
    text, data = index.read_text(), arrays.read_bytes()
    content = json.loads(text)
    cases = [
        (text[:-40], data, "damaged: it is no JSON object"),
        ("[]", data, "no JSON object"),
        (json.dumps({"format": "pt"}), data, "was not written by Forecaster.save: its format is 'pt'"),
        (json.dumps({**content, "version": 2}), data, "of another version of Selectra: version"),
        (json.dumps({k: v for k, v in content.items() if k != "freq"}), data, "freq: Field required"),
        (json.dumps({**content, "facts": {}}), data, "damaged, or of another version"),
        (json.dumps({**content, "arrays": "../kept/" + content["arrays"]}), data, "lacks the file"),
        (text, data[:-8], "its checksum is not the one"),
        (text, data[:200] + bytes([data[200] ^ 1]) + data[201:], "its checksum is not the one"),
    ]
    for changed, raw, message in cases:
        index.write_text(changed)
        arrays.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            Forecaster.load(kept)
    arrays.unlink()
    index.write_text(text)
    with pytest.raises(DataError, match="lacks the file"):
        Forecaster.load(kept)
    with pytest.raises(DataError, match="holds no saved Forecaster"):
        Forecaster.load(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="holds something else"):
        forecaster.save(tmp_path / "mine")
    with pytest.raises(ConfigError, match="cannot write in the folder"):
        forecaster.save(tmp_path / "mine" / "letter.txt" / "x")
    forecaster.save(kept)
    assert Forecaster.load(kept).predict().equals(forecaster.predict())


def test_nothing_is_half_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from selectra.forecaster import storage

    first, second = (Forecaster(name, **FEW).fit(hourly(150)) for name in ("dlinear", "nlinear"))
    first.save(tmp_path)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            second.save(tmp_path)
    assert Forecaster.load(tmp_path).predict().equals(first.predict())
    second.save(tmp_path)
    assert Forecaster.load(tmp_path).predict().equals(second.predict()) and len(list(tmp_path.iterdir())) == 2


def test_arrow_frames_come_back_as_arrow() -> None:
    frame, ahead = split(panel(), 190)
    forecaster = Forecaster("naive", **FEW, level=[80], futr_exog_list=AHEAD)
    expected = forecaster.fit(frame, static_df=STATIC).predict(futr_df=ahead)
    tables = [pa.Table.from_pandas(f, preserve_index=False) for f in (frame, STATIC, ahead)]
    found = forecaster.fit(tables[0], static_df=tables[1]).predict(futr_df=tables[2])
    assert isinstance(found, pa.Table) and found.schema.field("ds").type == tables[0].schema.field("ds").type
    np.testing.assert_array_equal(found["naive-hi-80"].to_numpy(), expected["naive-hi-80"])


@pytest.mark.parametrize("dates", [False, True])
def test_polars_frames_come_back_as_polars(dates: bool, tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame, ahead = split(panel(), 190)
    if dates:
        start = frame["ds"].min()
        for part in (frame, ahead):
            part["ds"] = start + (part["ds"] - start) * 24
    forecaster = Forecaster("naive", **FEW, level=[80], futr_exog_list=AHEAD)
    expected = forecaster.fit(frame).predict(futr_df=ahead)
    own, later = (polars.from_pandas(part) for part in (frame, ahead))
    if dates:
        own, later = (part.with_columns(polars.col("ds").cast(polars.Date)) for part in (own, later))
    found = forecaster.fit(own).predict(futr_df=later)
    assert isinstance(found, polars.DataFrame) and found.schema["ds"] == own.schema["ds"]
    np.testing.assert_array_equal(found["naive"].to_numpy(), expected["naive"])
    crossed = forecaster.cross_validation(own, n_windows=2)
    assert crossed.schema["cutoff"] == own.schema["ds"]
    forecaster.fit(own).save(tmp_path / "kept")
    assert Forecaster.load(tmp_path / "kept").predict(futr_df=later).equals(found)


def test_scikit_learn_clones_it() -> None:
    base = pytest.importorskip("sklearn.base")
    forecaster = Forecaster("dlinear", h=3, level=[80], model_args={"kernel": 5}, train_args={"max_steps": 2})
    copy = base.clone(forecaster)
    assert copy is not forecaster and copy.get_params() == forecaster.get_params()
    assert copy.fit(hourly(150)).predict().shape == (6, 5)


def days(zone: str, start: str, rows: int, freq: str = "D") -> pd.DataFrame:
    stamps = pd.date_range(start, periods=rows, freq=freq, tz=zone)
    return pd.DataFrame({"unique_id": "a", "ds": stamps, "y": np.sin(np.arange(rows) / 3)})


@pytest.mark.parametrize(("zone", "freq"), [("Europe/Berlin", "D"), ("America/New_York", "MS")])
def test_days_and_months_of_a_zone_are_its_own(zone: str, freq: str) -> None:
    frame = days(zone, "2019-11-01", 150, freq)
    seen, later = frame.iloc[:140], frame.iloc[140:]
    forecaster = Forecaster("naive", h=4, input_size=24).fit(seen)
    found = forecaster.predict()
    # Over the change of the clocks too: midnights there.
    assert found["ds"].tolist() == later["ds"].tolist()[:4]
    assert str(found["ds"].dt.tz) == zone
    pd.testing.assert_frame_equal(forecaster.update(later.iloc[:1]), forecaster.predict())
    assert forecaster.predict()["ds"].tolist() == later["ds"].tolist()[1:5]


def test_stamps_with_and_without_a_zone_do_not_meet() -> None:
    frame = days("Europe/Berlin", "2024-01-01 07:00", 100, "h")
    forecaster = Forecaster("naive", h=4, input_size=24).fit(frame.iloc[:90])
    naive = frame.iloc[90:92].assign(ds=frame["ds"].iloc[90:92].dt.tz_localize(None))
    with pytest.raises(DataError, match=r"new_rows: stamps have the zone none, and those of fit Europe/Berlin"):
        forecaster.update(naive)
    with pytest.raises(DataError, match="df: stamps have the zone none"):
        forecaster.predict(frame.assign(ds=frame["ds"].dt.tz_localize(None)))
    assert forecaster.update(frame.iloc[90:92])["ds"].iloc[0] == frame["ds"].iloc[92]


def test_what_is_set_after_the_fit_is_for_the_next_one(tmp_path: Path) -> None:
    frame, ahead = split(panel(), 190)
    forecaster = Forecaster("naive", h=4, input_size=24, futr_exog_list=AHEAD).fit(frame)
    want = forecaster.predict(futr_df=ahead)
    forecaster.set_params(h=3, model="tsm2", level=[80])
    pd.testing.assert_frame_equal(forecaster.predict(futr_df=ahead), want)
    forecaster.save(tmp_path / "saved")
    loaded = Forecaster.load(tmp_path / "saved")
    assert (loaded.h, loaded.model) == (4, "naive")
    pd.testing.assert_frame_equal(loaded.predict(futr_df=ahead), want)
