"""A forecast job that is interrupted, repeated in a used folder, or given something that does not fit."""

import json
from pathlib import Path
from typing import Any

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
