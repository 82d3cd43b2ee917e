"""`selectra compare` from an empty file to the page, on a CPU."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from selectra.cli import main
from selectra.compare import forecasting
from selectra.compare.command import Wish, compare_forecasting
from selectra.compare.forecasting import TABLES, Budget, Table
from selectra.compare.store import Store
from selectra.errors import ConfigError
from tests.compare.small import write_series

BUDGET = Budget(4, 32, 2)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_series(tmp_path)
    monkeypatch.setattr(forecasting, "DATA", {"small": {"path": str(path), "split": "ratio"}})
    table = Table("a", ("small",), ("dlinear", "naive"), seeds=2, lookbacks=(12,), horizons=(4,))
    monkeypatch.setitem(TABLES, "a", table)


def run(store: Path, **changes: object) -> str:
    console = Console(record=True, width=200, file=(store.parent / "log").open("w"))
    wish = Wish(store, **{"tables": ("a",), "device": "cpu", "budget": BUDGET, **changes})  # pyright: ignore[reportArgumentType]
    compare_forecasting(wish, console)
    return console.export_text()


def test_trials_then_cells_then_nothing(tmp_path: Path) -> None:
    text = run(tmp_path / "cells.sqlite")
    # Three rates, of which one is the first seed's cell; the second seed; the naive forecast.
    assert "5 cells done, 0 failed, 0 left" in text
    store = Store(tmp_path / "cells.sqlite")
    chosen = forecasting.chosen_rate(store, "small", "dlinear")
    found = [(cell.run.train.seed, cell.run.optim.lr) for cell, state, _ in store.cells() if cell.by_gradient]
    assert (1, chosen) in found
    assert len(found) == 4
    store.close()
    assert "5 cells are done, 0 are open" in run(tmp_path / "cells.sqlite")


def test_a_limit_of_time_begins_nothing(tmp_path: Path) -> None:
    assert "0 cells done, 0 failed, 4 left" in run(tmp_path / "cells.sqlite", time_limit=0.0)


def test_another_budget_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "cells.sqlite", time_limit=0.0)
    with pytest.raises(ConfigError, match="holds trainings with the budget"):
        run(tmp_path / "cells.sqlite", budget=Budget(5, 32, 2))


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no table 'z'"):
        run(tmp_path / "cells.sqlite", tables=("z",))


def test_command_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "cells.sqlite"
    options = ["--store", str(store), "--tables", "a", "--device", "cpu", "--steps", "4"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", "forecasting", *options])
    assert ended.value.code == 0
    monkey = {"small": "small"}
    forecasting_page = tmp_path / "page.md"
    from selectra.report import forecasting as page

    page.DATA.update(monkey)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(store), "--out", str(forecasting_page)])
    page.DATA.pop("small")
    assert ended.value.code == 0
    assert "No verdict" in forecasting_page.read_text()
    content = json.loads(store.with_suffix(".json").read_text())
    assert {cell["model"] for cell in content["cells"]} == {"dlinear", "naive"}
    assert content["budget"] == {"steps": 4, "batch_size": 32, "evaluations": 10}
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "absent.sqlite")])
    assert ended.value.code == 2
    assert "there is no" in capsys.readouterr().err
