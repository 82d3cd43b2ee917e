"""The main job and the scikit-learn style forecaster on small tables."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from selectra.errors import ConfigError, DataError
from selectra.forecaster import Forecaster, ForecastJob, forecast_job, training
from selectra.train.stop import StoppedError
from tests.data.frames import hourly, long

FILES = ["errors.json", "forecast.csv", "forecast.png", "last_window.csv", "metrics.json", "report.html", "run.json"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    frame = hourly(600).drop(index=[100, 101, 590])
    frame.loc[300:320, "b"] = np.nan
    frame.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


def done(file: Path, **changes: Any) -> tuple[list[dict[str, Any]], Path, str]:
    settings: dict[str, Any] = {"models": ("dlinear", "linear", "naive"), "lookback": 48, "horizon": 12, "epochs": 2}
    settings |= {"file": file, "out": file.parent / "out", **changes}
    console = Console(width=200, record=True, quiet=False)
    rows = forecast_job(ForecastJob(**settings), console)
    return rows, settings["out"], console.export_text()


def test_job_writes_everything_and_says_who_wins(file: Path) -> None:
    rows, out, text = done(file)
    assert [row["model"] for row in rows] == ["dlinear", "linear", "naive"]
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == FILES
    assert json.loads((out / "metrics.json").read_text()) == rows
    intervals = {"crps", "coverage-80", "coverage-95", "width-80", "width-95"}
    assert set(rows[0]) == {"model", "mse", "mae", "mase", "params", "seconds"} | intervals
    for name in ("dlinear", "linear", "naive"):
        assert (out / name / "model.safetensors").is_file()
    best = min(rows, key=lambda row: row["mse"])["model"]
    assert best == "linear" and "linear  ← best" in text
    assert "dlinear does not win here" in text
    assert "3 rows inserted as unobserved" in text and "masked, not filled" in text


def test_forecast_csv_is_the_future_in_units(file: Path) -> None:
    _, out, _ = done(file)
    forecast = pd.read_csv(out / "forecast.csv", parse_dates=["ds"])
    bounds = ["-lo-95", "-lo-80", "-hi-80", "-hi-95"]
    names = ("dlinear", "linear", "naive")
    assert list(forecast.columns) == ["unique_id", "ds", *(n + b for n in names for b in ("", *bounds))]
    for name in names:
        ordered = forecast[[f"{name}-lo-95", f"{name}-lo-80", name, f"{name}-hi-80", f"{name}-hi-95"]].to_numpy()
        assert (np.diff(ordered, axis=1) >= 0).all()
    assert len(forecast) == 24 and forecast["ds"].min() == hourly(601)["time"].iloc[-1]
    of_b = forecast[forecast["unique_id"] == "b"]
    # A daily wave of height 2 around 10.
    expected = 10 + 2 * np.sin(np.arange(600, 612) * 2 * np.pi / 24)
    np.testing.assert_allclose(of_b["linear"], expected, atol=0.3)
    np.testing.assert_allclose(of_b["naive"], hourly(600)["b"].iloc[-1], rtol=1e-6)


def test_same_seed_same_figures_and_batch_size_does_not_matter(file: Path) -> None:
    first, _, _ = done(file, models=("dlinear", "naive"), out=file.parent / "first")
    second, _, _ = done(file, models=("dlinear", "naive"), out=file.parent / "second", eval_batch_size=7)
    other, _, _ = done(file, models=("dlinear", "naive"), out=file.parent / "other", seed=1)
    for a, b in zip(first, second, strict=True):
        assert [a[key] for key in ("mse", "mae", "mase")] == pytest.approx(
            [b[k] for k in ("mse", "mae", "mase")], abs=1e-6
        )
    assert first[0]["mse"] != other[0]["mse"]


def test_finished_models_are_not_trained_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    fit = training.fit

    def watched(model: Any, task: Any, train: Any, val: Any, run: Any, *rest: Any, **more: Any) -> Any:
        if run.name == "naive" and not trained.count("naive"):
            trained.append("naive")
            raise StoppedError(0, "train it")
        trained.append(run.name)
        return fit(model, task, train, val, run, *rest, **more)

    monkeypatch.setattr(training, "fit", watched)
    with pytest.raises(StoppedError, match=r"selectra forecast .*table.csv --model linear,naive"):
        done(file, models=("linear", "naive"))
    assert not (file.parent / "out" / "metrics.json").exists()
    rows, out, text = done(file, models=("linear", "naive"))
    assert trained == ["linear", "naive", "naive"] and "linear: finished before" in text
    # Other settings or other data: everything again.
    before = (out / "forecast.csv").read_text()
    done(file, models=("linear", "naive"), lookback=36)
    assert trained[3:] == ["linear", "naive"]
    frame = pd.read_csv(file)
    frame.loc[200, "b"] += 1
    frame.to_csv(file, index=False)
    done(file, models=("linear", "naive"), lookback=36)
    assert trained[5:] == ["linear", "naive"] and (out / "forecast.csv").read_text() != before
    assert len(rows) == 2


def test_target_alone_is_scored_and_forecast(file: Path) -> None:
    rows, out, _ = done(file, models=("linear",), target="a")
    assert set(pd.read_csv(out / "forecast.csv")["unique_id"]) == {"a (°C)"}
    every, _, _ = done(file, models=("linear",), out=file.parent / "all")
    errors = json.loads((file.parent / "all" / "errors.json").read_text())
    assert rows[0]["mse"] == pytest.approx(errors["models"]["linear"]["mse_by_series"][0], rel=1e-9)
    assert every[0]["mse"] != rows[0]["mse"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"models": ("linaer",)}, ConfigError, "no model 'linaer'.*'linear"),
        ({"models": ()}, ConfigError, "name at least one model"),
        ({"models": ("seasonal_naive",), "lookback": 12}, ConfigError, "season between 1 and the look-back of 12"),
        ({"horizon": 0}, DataError, "horizon must be at least 1, got 0"),
        ({"lookback": 500}, DataError, "rows are needed, there are 600"),
        ({"target": "c"}, DataError, "no series 'c'"),
    ],
)
def test_bad_jobs_fail_before_training(
    file: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        done(file, **changes)
    assert not (file.parent / "out").exists()


def test_output_that_is_a_file_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"table.csv' is a file"):
        done(file, out=file)


def test_a_season_that_does_not_fit_leaves_that_model_out(file: Path) -> None:
    rows, _, text = done(file, models=("naive", "seasonal_naive"), lookback=12)
    assert [row["model"] for row in rows] == ["naive"] and "seasonal_naive is left out" in text


def test_command_repeats_the_job(tmp_path: Path) -> None:
    words = ForecastJob(file=Path("a b.csv"), models=("linear", "naive"), target="T (°C)", out=tmp_path).command()
    assert words.startswith("selectra forecast 'a b.csv' --model linear,naive --lookback 96 --horizon 24")
    assert "--target 'T (°C)'" in words and words.endswith(f"--out {tmp_path}")


def test_forecaster_on_long_and_wide_frames() -> None:
    wide = hourly(600)
    predicted = Forecaster("linear", h=12, input_size=48).fit(wide).predict()
    assert list(predicted.columns) == ["unique_id", "ds", "linear"]
    assert predicted.equals(Forecaster("linear", h=12, input_size=48).fit(long(wide)).predict())
    expected = 10 + 2 * np.sin(np.arange(600, 612) * 2 * np.pi / 24)
    np.testing.assert_allclose(predicted.loc[predicted["unique_id"] == "b", "linear"], expected, atol=0.3)


def test_forecaster_predicts_from_other_rows() -> None:
    wide = hourly(600)
    forecaster = Forecaster("naive", h=3, input_size=24).fit(wide)
    predicted = forecaster.predict(wide.iloc[:100])
    assert predicted["ds"].iloc[0] == wide["time"].iloc[100]
    assert predicted["naive"].iloc[0] == pytest.approx(wide["a (°C)"].iloc[99], rel=1e-6)
    with pytest.raises(DataError, match="the model sees 24 rows, the frame has 10"):
        forecaster.predict(wide.iloc[:10])
    with pytest.raises(DataError, match="fit saw the series"):
        forecaster.predict(wide[["time", "b"]])


def test_cross_validation_has_cutoffs_and_sees_nothing_after_them() -> None:
    # The rows after the first cutoff are more than the tenth that is validated on: with them, training would change.
    wide = hourly(400)
    found = Forecaster("linear", h=6, input_size=24).cross_validation(wide, n_windows=12, step_size=8)
    assert list(found.columns) == ["unique_id", "ds", "cutoff", "y", "linear"]
    assert found["cutoff"].unique().tolist() == [wide["time"].iloc[i] for i in range(305, 394, 8)]
    first = found[found["cutoff"] == wide["time"].iloc[305]]
    changed = wide.copy()
    changed.loc[306:, ["a (°C)", "b"]] = 1e3
    again = Forecaster("linear", h=6, input_size=24).cross_validation(changed, n_windows=12, step_size=8)
    np.testing.assert_array_equal(first["linear"], again.loc[first.index, "linear"])
    np.testing.assert_allclose(first.loc[first["unique_id"] == "b", "y"], wide["b"].iloc[306:312])


def test_series_in_another_order_get_the_same_forecast() -> None:
    wide = hourly(300)
    forecaster = Forecaster("naive", h=3, input_size=24).fit(wide)
    assert forecaster.predict(wide[["b", "time", "a (°C)"]]).equals(forecaster.predict(wide))
    backwards = long(wide).sort_values(["unique_id", "ds"], ascending=False)
    assert forecaster.predict(backwards).equals(forecaster.predict())


def test_identifiers_and_zones_come_back_as_they_were() -> None:
    frame = long(hourly(300)).replace({"unique_id": {"a (°C)": 7, "b": 2}}).astype({"unique_id": "int32"})
    frame["ds"] = frame["ds"].dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    forecaster = Forecaster("naive", h=3, input_size=24)
    for found in (forecaster.fit(frame).predict(), forecaster.predict(frame), forecaster.cross_validation(frame)):
        assert found["unique_id"].dtype == "int32" and found["unique_id"].unique().tolist() == [7, 2]
        assert str(found["ds"].dt.tz) == "Asia/Tokyo"
    assert forecaster.fit(frame).predict()["ds"].iloc[0] == frame["ds"].iloc[299] + pd.Timedelta("1h")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": 4.0}, "h must be a whole number of at least 1, got 4.0"),
        ({"h": "4"}, "h must be a whole number of at least 1, got '4'"),
        ({"h": 0}, "h must be a whole number of at least 1, got 0"),
        ({"input_size": -1}, "input_size must be a whole number of at least 1 or None, got -1"),
        ({"train_args": {"max_steps": 0}}, "max_steps must be"),
        ({"train_args": {"batch_size": True}}, "batch_size must be"),
        ({"train_args": {"early_stop_patience": -1}}, "early_stop_patience must be"),
        ({"train_args": {"learning_rate": 0}}, "learning_rate must be a number above 0, got 0"),
        ({"train_args": {"learning_rate": "fast"}}, "learning_rate must be a number above 0, got 'fast'"),
        ({"train_args": {"device": 0}}, "device is 0"),
        ({"train_args": {"batchsize": 8}}, "train_args takes no 'batchsize'.*Did you mean 'batch_size'"),
        ({"train_args": {"max_steps": 8, "epochs": 2}}, "both 'max_steps' and 'epochs'"),
        ({"train_args": 3}, "train_args must be a dictionary"),
        ({"train_args": {"loss": "pinball"}}, "'pinball' needs quantiles"),
        ({"model_args": [1]}, "model_args must be a dictionary"),
        ({"model_args": {"quantiles": (0.9, 0.1)}}, "they must rise"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"level": [120]}, r"level=\[120\]: levels are numbers between 0 and 100"),
        ({"level": ["80"]}, "levels are numbers"),
        ({"futr_exog_list": "price"}, "must be a list of columns, got 'price'"),
        ({"model": 3}, "model must be a name or a Spec, got 3"),
        ({"freq": 60}, "freq must be"),
    ],
)
def test_wrong_arguments_are_refused_at_fit(changes: dict[str, Any], message: str) -> None:
    forecaster = Forecaster(**{"model": "naive", "h": 3, "input_size": 24, **changes})
    for use in (forecaster.fit, forecaster.cross_validation):
        with pytest.raises(ConfigError, match=message):
            use(hourly(100))


def test_validation_rows_without_values_are_refused() -> None:
    frame = hourly(200)
    frame.loc[180:, ["a (°C)", "b"]] = np.nan
    with pytest.raises(DataError, match=r"the val part .* has no value to forecast"):
        Forecaster("naive", h=3, input_size=24).fit(frame)


def test_forecaster_is_an_estimator() -> None:
    forecaster = Forecaster("dlinear", h=6)
    assert Forecaster(**forecaster.get_params()).get_params() == forecaster.get_params()
    assert forecaster.set_params(h=7).h == 7
    with pytest.raises(ConfigError, match="no argument 'horizon'"):
        forecaster.set_params(horizon=3)
    with pytest.raises(ConfigError, match=r"'max_steps' in train_args: train_args=\{'max_steps': 5\}"):
        Forecaster("dlinear", max_steps=5)
    with pytest.raises(ConfigError, match=r"no argument 'hh'.*Did you mean 'h'"):
        Forecaster("dlinear", hh=5)
    with pytest.raises(ConfigError, match="not fitted"):
        forecaster.predict()
    fitted = forecaster.set_params(train_args={"max_steps": 5}, input_size=24).fit(hourly(200))
    assert fitted is forecaster and "dlinear" in fitted.predict().columns
