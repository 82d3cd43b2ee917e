"""The page and the pictures from stored files alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from selectra.errors import DataError
from selectra.report.page import write_page
from selectra.report.plots import (
    MAX_PANELS,
    chosen_series,
    forecast_figure,
    series_figure,
    step_figure,
    write_forecast_picture,
)
from selectra.report.read import read_result, split_unit
from selectra.report.tables import losses, ranges, shown_row, verdict

ROWS = [
    {"model": "tsm2", "mse": 0.5, "mae": 0.4, "mase": None, "params": 12_345, "seconds": 3.21},
    {"model": "naive", "mse": 0.4, "mae": 0.5, "mase": 1.0, "params": 0, "seconds": 0.0},
]


def folder(out: Path, series: list[str], horizon: int = 4) -> Path:
    """The files of a finished job."""
    rng = np.random.default_rng(0)
    models = [row["model"] for row in ROWS]
    errors = {
        name: {f"{kind}_by_step": rng.random(horizon).tolist() for kind in ("mse", "mae")}
        | {f"{kind}_by_series": rng.random(len(series)).tolist() for kind in ("mse", "mae")}
        for name in models
    }
    stamps = pd.date_range("2020-01-01", periods=40 + 2 * horizon, freq="h")
    recent, future = [], []
    for name in series:
        part = pd.DataFrame({"unique_id": name, "ds": stamps[:-horizon], "y": rng.random(40 + horizon)})
        part.insert(2, "part", ["history"] * 40 + ["truth"] * horizon)
        recent.append(part.assign(**{model: np.where(part["part"] == "truth", 0.5, np.nan) for model in models}))
        future.append(pd.DataFrame({"unique_id": name, "ds": stamps[-horizon:], "tsm2": 0.1, "naive": 0.2}))
    pd.concat(recent).to_csv(out / "last_window.csv", index=False)
    pd.concat(future).to_csv(out / "forecast.csv", index=False)
    run = {
        "command": "selectra forecast 'a & b.csv'",
        "finished": "2026-01-01T00:00:00+00:00",
        "commit": None,
        "job": {"quick": False, "lookback": 8, "horizon": horizon, "target": None, "split": "ratio", "seed": 3}
        | {"epochs": 10.0, "patience": 3, "batch_size": 32, "lr": 1e-3},
        "data": {"source": "a & b.csv", "summary": ["12 rows"], "freq": "h", "season": 24, "windows": {"test": 1234}}
        | {"test_ends_with_file": True},
        "versions": {"python": "3.11", "selectra": None},
        "hardware": {"processor": "a processor", "cores": 2, "threads": 2, "gpus": [], "system": "Linux"},
    }
    for name, content in (("metrics", ROWS), ("errors", {"series": series, "models": errors}), ("run", run)):
        (out / f"{name}.json").write_text(json.dumps(content))
    return out


def test_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    out = folder(tmp_path, ["a (°C)", "b"])
    write_forecast_picture(out)
    write_page(out)
    text = (out / "report.html").read_text("utf-8")
    assert text.count("data:image/png;base64,") == 3
    assert "http" not in text.replace("http-equiv", "")
    for word in (
        "a &amp; b.csv",
        "1,234 test windows",
        "12,345",
        "a processor",
        "Where tsm2 loses",
        "does not win here",
    ):
        assert word in text
    assert [p.name for p in out.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize(("n_series", "horizon"), [(1, 1), (2, 4), (12, 4), (60, 2)])
def test_pictures_of_any_size(tmp_path: Path, n_series: int, horizon: int) -> None:
    result = read_result(folder(tmp_path, [f"series {i} (kW)" for i in range(n_series)], horizon))
    panels = [ax for ax in forecast_figure(result).axes if ax.get_visible()]
    assert len(panels) == min(n_series, MAX_PANELS)
    assert panels[0].get_title(loc="left") == "series 0" and panels[0].get_ylabel() == "kW"
    for figure in (step_figure(result), series_figure(result)):
        figure.canvas.draw()


def test_chosen_series_keep_the_ends() -> None:
    names = [str(i) for i in range(50)]
    chosen = chosen_series(names)
    assert len(set(chosen)) == MAX_PANELS and chosen[0] == "0" and chosen[-1] == "49"
    assert chosen_series(names[:5]) == names[:5]


def test_figure_says_when_series_are_left_out(tmp_path: Path) -> None:
    figure = forecast_figure(read_result(folder(tmp_path, [str(i) for i in range(20)])))
    assert "12 of 20 series" in figure.get_supxlabel()


def test_words() -> None:
    assert verdict(ROWS) == "tsm2 does not win here: its MSE is 25.0% above that of naive, the best of these."
    assert verdict(ROWS[::-1]) == "naive has the lowest MSE, 20.0% below tsm2."
    assert "not compared" in verdict(ROWS[:1])
    assert shown_row(ROWS[0]) == ["tsm2", "0.5000", "0.4000", "-", "12,345", "3.2"]
    assert ranges([1, 2, 3, 7, 9, 10]) == "1 to 3, 7, 9 to 10"
    assert split_unit("T (degC)") == ("T", "degC") and split_unit("T") == ("T", "")


def test_losses_name_series_and_steps() -> None:
    errors = {
        "series": ["a", "b", "c"],
        "models": {
            "tsm2": {"mse_by_series": [1.0, 1.0, None], "mse_by_step": [1.0, 3.0]},
            "linear": {"mse_by_series": [2.0, 0.5, 1.0], "mse_by_step": [2.0, 2.0]},
            "naive": {"mse_by_series": [0.9, 0.7, 1.0], "mse_by_step": [2.0, 2.5]},
        },
    }
    found = losses(errors, "tsm2")
    assert found["series"] == [("b", "linear", 1.0, 0.5), ("a", "naive", 1.0, 0.9)]
    assert found["steps"] == [2] and found["n_series"] == 3


def test_missing_or_damaged_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold a finished forecast"):
        read_result(tmp_path)
    (folder(tmp_path, ["a"]) / "run.json").write_text("{")
    with pytest.raises(DataError, match="does not hold a finished forecast"):
        read_result(tmp_path)


def test_report_needs_no_torch() -> None:
    code = "import sys, selectra.report.page; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((0.0, 0.0), "tsm2 and naive have the same MSE"),
        ((0.3, 0.0), "tsm2 does not win here: naive, the best of these, makes no error at all"),
        ((0.0, 0.3), "tsm2 has the lowest MSE, 100.0% below naive"),
        ((0.5, 0.4, 0.4), "25.0% above that of naive"),
        ((0.4, 0.5, 0.4), "tsm2 and linear have the same MSE"),
    ],
)
def test_verdict_on_ties_and_on_data_that_never_changes(errors, words):
    names = ("tsm2", "naive", "linear")
    assert words in verdict([{"model": name, "mse": mse} for name, mse in zip(names, errors, strict=False)])
