"""A forecast job that is interrupted, repeated in a used folder, or given something that does not fit."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from rich.console import Console

from selectra.cli import main
from selectra.errors import ConfigError
from selectra.forecaster import ForecastJob, files, forecast_job, job, training
from selectra.train.stop import StoppedError
from tests.data.frames import hourly


@pytest.fixture
def file(tmp_path: Path) -> Path:
    hourly(400).to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


def done(file: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {"models": ("linear", "naive"), "lookback": 24, "horizon": 6, "file": file}
    settings |= {"out": file.parent / "out", **changes}
    forecast_job(ForecastJob(**settings), Console(quiet=True))
    return settings["out"]


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["build_model", "training.score", "write_page"])
def test_ctrl_c_anywhere_prints_the_command_that_goes_on(file, monkeypatch, place):
    room = training if place.startswith("training.") else job
    monkeypatch.setattr(room, place.removeprefix("training."), interrupted)
    with pytest.raises(StoppedError, match=r"saved before is kept; go on with: selectra forecast .*table.csv"):
        done(file)


def test_results_of_another_job_go_when_a_new_one_starts(file, monkeypatch):
    out = done(file)
    with monkeypatch.context() as patch:
        patch.setattr(job, "train_or_load", interrupted)
        with pytest.raises(StoppedError):
            done(file)
        assert all((out / name).is_file() for name in files.RESULTS if name != files.CV)
        with pytest.raises(StoppedError):
            done(file, seed=1)
    assert not any((out / name).exists() for name in files.RESULTS)
    assert (out / "linear" / "model.safetensors").is_file()


def test_weights_of_another_job_go_before_training(file, monkeypatch):
    out = done(file)
    monkeypatch.setattr(training, "fit", interrupted)
    with pytest.raises(StoppedError):
        done(file, seed=1)
    assert not (out / "linear" / "model.safetensors").exists()


@pytest.mark.parametrize("content", ["[]", '"text"', "{", '{"row": 3}', ""])
def test_a_damaged_result_is_made_again(file, content):
    out = done(file)
    before = json.loads((out / "metrics.json").read_text())
    (out / "linear" / "result.json").write_text(content)
    done(file)
    assert json.loads((out / "metrics.json").read_text())[0]["mse"] == before[0]["mse"]


def test_what_stands_in_the_way_is_found_before_training(file, monkeypatch):
    monkeypatch.setattr(training, "fit", interrupted)
    out = file.parent / "out"
    out.mkdir()
    (out / "linear").write_text("")
    with pytest.raises(ConfigError, match=r"out/linear' is a file, and a folder is needed"):
        done(file)
    (out / "linear").unlink()
    (out / "metrics.json").mkdir()
    with pytest.raises(ConfigError, match=r"out/metrics.json' is a folder, and a file is written there"):
        done(file)
    (out / "metrics.json").rmdir()
    data = file.rename(out / "forecast.csv")
    with pytest.raises(ConfigError, match=r"out/forecast.csv' is the data"):
        done(data, out=out)


@pytest.mark.parametrize("epochs", [0, -1, float("nan"), float("inf")])
def test_epochs_are_finite_and_positive(file, capsys, epochs):
    with pytest.raises(ValidationError):
        ForecastJob(epochs=epochs)
    with pytest.raises(SystemExit) as ended:
        main(["forecast", str(file), "--epochs", str(epochs), "--out", str(file.parent / "out")])
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert text.startswith("error: epochs is ") and text.count("\n") == 1
    assert not (file.parent / "out").exists()


def test_messages_name_the_option(file, capsys):
    frame = hourly(400)
    frame.iloc[5, 0] = frame.iloc[4, 0]
    frame.to_csv(file, index=False)
    with pytest.raises(SystemExit):
        main(["forecast", str(file), "--out", str(file.parent / "out")])
    text = capsys.readouterr().err
    assert "--stamps order" in text and "stamps=" not in text


def test_eval_of_the_whole_job_names_its_models(file, capsys):
    out = done(file)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(out)])
    assert ended.value.code == 2
    assert str(out / "linear") in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(out / "linear")])
    assert ended.value.code == 0


def table_with_price(folder: Path, rows: int = 400) -> tuple[Path, Path]:
    """A wide table whose series follow a price that is known ahead, and the next six prices."""
    frame = hourly(rows + 6)
    price = np.random.default_rng(3).normal(size=len(frame))
    frame = frame.assign(price=price, a=frame["a (°C)"] + 5 * price, b=frame["b"] + 5 * price).drop(columns="a (°C)")
    frame.iloc[:rows].to_csv(folder / "priced.csv", index=False)
    frame.iloc[rows:][["time", "price"]].to_csv(folder / "next.csv", index=False)
    return folder / "priced.csv", folder / "next.csv"


def test_covariates_known_ahead_from_a_file(tmp_path):
    file, futr = table_with_price(tmp_path)
    found = {}
    for name, given in (("with", futr), ("without", None)):
        settings = {"models": ("dlinear",), "futr": given, "lr": 1e-2, "epochs": 20, "target": "a"}
        out = done(file, out=tmp_path / name, **settings)
        found[name] = json.loads((out / "metrics.json").read_text())[0]["mse"]
    run = json.loads((tmp_path / "with" / "run.json").read_text())
    assert run["data"]["series"] == ["b", "a"] and "note: covariates known ahead: price" in run["data"]["summary"]
    assert found["with"] < 0.3 * found["without"]
    note = "dlinear takes no future covariates itself: an encoder and a residual head add them."
    assert run["notes"] == [note] and note in (tmp_path / "with" / "report.html").read_text()
    forecast = pd.read_csv(tmp_path / "with" / "forecast.csv")
    assert set(forecast["unique_id"]) == {"a"} and np.isfinite(forecast["dlinear"]).all()
    # Another price, another forecast; nothing is taken from before.
    later = pd.read_csv(futr)
    later.assign(price=later["price"] + 10).to_csv(futr, index=False)
    settings = {"models": ("dlinear",), "futr": futr, "lr": 1e-2, "epochs": 20, "target": "a"}
    other = pd.read_csv(done(file, out=tmp_path / "with", **settings) / "forecast.csv")
    assert np.abs(other["dlinear"].to_numpy() - forecast["dlinear"].to_numpy()).min() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.iloc[:5], r"no value of 'price' at 2020-01-17 21:00"),
        (lambda f: f.rename(columns={"price": "prise"}), "shares no column with the data beside the time"),
        (lambda f: f.assign(price="x"), "'x' is not a number"),
    ],
)
def test_a_future_file_that_does_not_fit_is_refused(tmp_path, capsys, change, message):
    file, futr = table_with_price(tmp_path)
    change(pd.read_csv(futr)).to_csv(futr, index=False)
    words = ["forecast", str(file), "--futr", str(futr), "--horizon", "6", "--lookback", "24"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_cutoffs_are_forecast_once_more(file):
    out = done(file, cv=3, level=(50,))
    frame = pd.read_csv(out / "cross_validation.csv", parse_dates=["ds", "cutoff"])
    names = ["linear", "linear-lo-50", "linear-hi-50", "naive", "naive-lo-50", "naive-hi-50"]
    assert list(frame.columns) == ["unique_id", "ds", "cutoff", "y", *names]
    stamps = hourly(400)["time"]
    assert frame["cutoff"].drop_duplicates().tolist() == [stamps.iloc[i] for i in (381, 387, 393)]
    naive = frame[(frame["unique_id"] == "b") & (frame["cutoff"] == stamps.iloc[387])]
    np.testing.assert_allclose(naive["naive"], hourly(400)["b"].iloc[387], rtol=1e-6)
    np.testing.assert_allclose(naive["y"], hourly(400)["b"].iloc[388:394], rtol=1e-6)
    row = json.loads((out / "metrics.json").read_text())[0]
    assert len(row["cv"]["mse_by_cutoff"]) == 3 and 0 <= row["cv"]["coverage-50"] <= 1
    assert np.mean(row["cv"]["mse_by_cutoff"]) == pytest.approx(row["cv"]["mse"])
    page = (out / "report.html").read_text()
    assert "From 3 cutoffs" in page and page.count("<th>50 %</th>") == 2
    with pytest.raises(
        ConfigError, match=r"--cv 20 needs 120 rows after the validation part, there are 80; at most 13"
    ):
        done(file, cv=20)


def test_the_look_back_is_chosen_on_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "LOOKBACKS", (24, 48, 400))
    hourly(500).to_csv(tmp_path / "table.csv", index=False)
    console = Console(width=200, record=True)
    settings = {"models": ("linear", "seasonal_naive"), "lookback": "auto", "horizon": 6, "out": tmp_path / "out"}
    rows = forecast_job(ForecastJob(file=tmp_path / "table.csv", **settings), console)
    text = console.export_text()
    assert "linear: look-back " in text and "look-back" in text and "400:" not in text
    for row in rows:
        tried = {}
        for lookback in (24, 48):
            folder = tmp_path / "out" / row["model"] / f"lookback-{lookback}"
            tried[lookback] = json.loads((folder / "result.json").read_text())["val"]
        assert row["lookback"] == min(tried, key=lambda each: tried[each])
    # The same as without a choice, at that look-back.
    alone = ForecastJob(
        file=tmp_path / "table.csv", **{**settings, "lookback": rows[0]["lookback"], "out": tmp_path / "b"}
    )
    assert forecast_job(alone, Console(quiet=True))[0]["mse"] == pytest.approx(rows[0]["mse"], rel=1e-6)
    monkeypatch.setattr(training, "fit", interrupted)
    again = forecast_job(ForecastJob(file=tmp_path / "table.csv", **settings), console)
    assert again == rows and "finished before" in console.export_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--level", "80;95"], "--level '80;95': numbers between 0 and 100, as 80,95, or none"),
        (["--level", "100"], "--level '100': numbers between 0 and 100"),
        (["--lookback", "long"], "--lookback 'long': a whole number of at least 1, or auto"),
        (["--lookback", "0"], "--lookback '0'"),
        (["--horizon", "0"], "horizon"),
        (["--cv", "-1"], "cv"),
    ],
)
def test_wrong_words_are_explained(file, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["forecast", str(file), *words, "--out", str(file.parent / "out")])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (file.parent / "out").exists()


def test_without_levels_there_are_no_intervals(file):
    out = done(file, level=())
    assert list(pd.read_csv(out / "forecast.csv").columns) == ["unique_id", "ds", "linear", "naive"]
    assert "CRPS" not in (out / "report.html").read_text()
    job_ = ForecastJob(level=(), futr=Path("next.csv"), cv=2, lookback="auto")
    assert "--level none --futr next.csv --cv 2" in job_.command() and "--lookback auto" in job_.command()


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    job = ForecastJob(models=("naive",), out=tmp_path / "out", device="cuda:99")
    with pytest.raises(ConfigError, match="cuda"):
        forecast_job(job, Console(file=StringIO()))
    assert not (tmp_path / "out").exists()
    assert "--device cuda:99" in job.command() and "--device" not in ForecastJob().command()
