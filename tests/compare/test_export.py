"""What is exported from a store, and the page made from it."""

import csv
import json
import zlib
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from selectra.compare.cells import Cell, differences, require_fair
from selectra.compare.command import BUDGET
from selectra.compare.export import export, read_published, verdict, write
from selectra.compare.forecasting import (
    DATA,
    HORIZONS,
    MAMBAS,
    RATES,
    TABLES,
    WITHOUT_GRADIENT,
    Budget,
    add_best_other,
    add_decided,
    base_run,
    cell,
    chosen_rate,
    first_cells,
)  # fmt: skip
from selectra.compare.stats import paired
from selectra.compare.store import Store
from selectra.errors import ConfigError, DataError
from selectra.report.forecasting import DATA as SHOWN
from selectra.report.forecasting import NAMES, page, read_records, write_page

BUDGET_OF_TESTS = Budget(20, 4)
WHERE = {"versions": {"torch": "2"}, "hardware": {"gpus": []}, "commit": None, "backends": {}}


def level(name: str, better: str = "tsm2") -> float:
    """A made-up error: lowest for `better`."""
    return 0.3 if name == better else 0.4 + (zlib.crc32(name.encode()) % 100) / 500


def made_up(cell: Cell, better: str) -> dict[str, Any]:
    label = cell.label
    noise = (zlib.crc32(cell.key.encode()) % 1000) / 1e5
    # The middle rate is the best one.
    off = 0.0 if cell.run.optim.lr == RATES[1] else 0.05
    mse = level(label["model"], better) + label["horizon"] / 4000 + noise + off
    errors = {"mse": mse, "mae": mse * 0.9}
    return {
        **label, "val": {"mse": mse - 0.1, "mae": 0.1}, "test": errors, "best_step": 10, "steps": 20, "seconds": 1.5,
        "packed": 8, "parameters": 1234, "device": "cpu", "size": cell.run.model.name, "test_windows": 100, **WHERE,
    }  # fmt: skip


def filled(path: Path, tables: tuple[str, ...] = ("a", "b", "orders"), better: str = "tsm2", leave: int = 0) -> Store:
    store = Store(path)
    store.remember(BUDGET, {"steps": 20, "batch_size": 4, "evaluations": 20})
    store.add(first_cells(tables, BUDGET_OF_TESTS))
    while True:
        taken = []
        while (one := store.take()) is not None:
            taken.append(one)
        if not taken:
            return store
        for one in taken[: len(taken) - leave]:
            store.finish(one, made_up(one, better))
        for one in taken[len(taken) - leave :]:
            store.finish(one, {**one.label, "reason": "it was too large"}, "failed")
        before = store.counts()
        add_decided(store, tables, BUDGET_OF_TESTS)
        leave = leave if store.counts() != before else 0


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = filled(tmp_path_factory.mktemp("store") / "cells.sqlite")
    content = export(store)
    store.close()
    return content


def test_every_required_cell_is_asked_for(complete: dict[str, Any]) -> None:
    for name in ("a", "b"):
        table, found = TABLES[name], complete["tables"][name]
        assert found["missing"] == []
        assert len(found["rows"]) == len(table.data) * len(HORIZONS) * len(table.models)
        for row in found["rows"]:
            assert len(row["seeds"]) == (1 if row["model"] in WITHOUT_GRADIENT else table.seeds)
    assert {"tsm2", "timemachine", "simba_series", "s_mamba"} == set(MAMBAS)
    assert len(TABLES["a"].models) == 14
    assert len(TABLES["b"].models) == 8


def test_the_rate_is_chosen_on_validation(tmp_path: Path) -> None:
    store = filled(tmp_path / "cells.sqlite", ("b",))
    assert chosen_rate(store, "weather", "s_mamba") == RATES[1]
    assert len(store.cells("rates weather s_mamba")) == len(RATES)
    rates = {each.run.optim.lr for each, _, _ in store.cells() if each.by_gradient and not each.group}
    assert rates == {RATES[1]}


def test_rows_are_means_of_cells(complete: dict[str, Any]) -> None:
    row = next(
        r for r in complete["tables"]["a"]["rows"] if (r["data"], r["horizon"], r["model"]) == ("etth2", 336, "gru")
    )
    mine = [
        each["test"]["mse"] for each in complete["cells"]
        if (each["data"], each["horizon"], each["model"], each["order"]) == ("etth2", 336, "gru", 0)
    ]  # fmt: skip
    assert len(mine) == 3
    assert row["mse"] == pytest.approx(fmean(mine))


def test_only_the_model_and_what_is_declared_may_differ() -> None:
    base = base_run("etth1", 96, 96, 0, BUDGET_OF_TESTS)
    one = cell("etth1", 96, "tsm2", budget=BUDGET_OF_TESTS, place=0, rate=2e-4).run
    assert set(differences(base, one)) == {"optim.lr"}
    longer = one.model_copy(update={"train": one.train.model_copy(update={"steps": 21})})
    with pytest.raises(ConfigError, match=r"train\.steps from 20 to 21"):
        require_fair(base, longer, {"optim.lr": "tuned"})


def test_page_and_records_agree(complete: dict[str, Any]) -> None:
    text = page(complete, "records.json")
    lines = text.splitlines()
    assert lines[2].startswith("**Yes: the Mamba model chosen on validation, TSM2")
    every = lines[lines.index("## Every cell") + 4 :]
    shown = {tuple(x.strip() for x in line.strip("|").split("|"))[:3]: line for line in every if line.startswith("|")}
    rows = [row for name in ("a", "b") for row in complete["tables"][name]["rows"]]
    assert len(shown) == len(rows)
    for row in rows:
        line = next(
            line for (place, back, model), line in shown.items()
            if place.lower() == f"{row['data']} {row['horizon']}" and model == NAMES[row["model"]]
        )  # fmt: skip
        values = [part.strip() for part in line.strip("|").split("|")]
        assert values[3] == f"{row['mse']:.3f}"
        assert values[5] == f"{row['mae']:.3f}"
    grid = next(line for line in lines if line.startswith("| TSM2 | **"))
    mine = [row for row in complete["tables"]["a"]["rows"] if row["data"] == "etth1" and row["model"] == "tsm2"]
    assert [f"{row['mse']:.3f}" in grid for row in mine] == [True] * 4
    for rival, each in complete["verdict"]["pairs"]["one"].items():
        assert f"| {NAMES[rival]} | {each['mean']:.4f} | {each['rival']:.4f} | {each['difference']:+.4f} |" in text
    assert "Every cell of this table was run." in text
    assert "memory, verify" not in text


def test_a_loss_is_said_first(tmp_path: Path) -> None:
    store = filled(tmp_path / "cells.sqlite", better="dlinear")
    first = page(export(store), "records.json").splitlines()[2]
    assert first.startswith("**No: the Mamba model chosen on validation")
    assert "DLinear" in first


def test_a_model_that_was_not_run_is_left_out_of_the_verdict(tmp_path: Path) -> None:
    store = filled(tmp_path / "cells.sqlite", ("a", "b"))
    rows = [row for table in export(store)["tables"].values() for row in table["rows"]]
    found = verdict([row for row in rows if row["model"] != "timemachine" or row["horizon"] == 96])
    assert (found["left_out"], found["mamba"], found["cells"]) == (["timemachine"], "tsm2", 24)
    found = verdict([row for row in rows if row["model"] != "dlinear"])
    assert found["mamba"] is None


def test_missing_cells_are_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "cells.sqlite", ("a", "b"), leave=1)
    content = export(store)
    missing = content["tables"]["a"]["missing"] + content["tables"]["b"]["missing"]
    assert missing
    text = page(content, "records.json")
    for each in missing:
        assert f"- {NAMES[each['model']]} on {SHOWN[each['data']]}" in text
        assert f"{each['horizon']}" in text
    assert "it was too large" in text


def test_an_empty_store_gives_a_page(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells.sqlite")
    store.remember(BUDGET, {"steps": 20, "batch_size": 4, "evaluations": 20})
    content = export(store)
    assert page(content, "records.json").splitlines()[2].startswith("**No verdict: only 0 cells")
    assert len(content["tables"]["b"]["missing"]) == 3 * 4 * 8


def test_files_are_written(tmp_path: Path) -> None:
    store = filled(tmp_path / "cells.sqlite", ("b",))
    write(store, tmp_path / "records.json")
    write_page(tmp_path / "records.json", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().startswith("# Forecasting")
    with (tmp_path / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    content = json.loads((tmp_path / "records.json").read_text())
    assert len(rows) == len(content["cells"]) + len(content["trials"])
    assert sorted(float(row["test_mse"]) for row in rows if row["table"] == "cells") == sorted(
        each["test"]["mse"] for each in content["cells"]
    )


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="holds no comparison"):
        read_records(tmp_path / "other.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "absent.json")


def test_published_numbers_are_whole() -> None:
    published = read_published()
    keys = {(each["model"], each["data"], each["horizon"], each["lookback"]) for each in published}
    assert len(keys) == len(published)
    assert {each["data"] for each in published} == set(DATA)
    # Columns that no source confirms are left out.
    assert not any(each["model"] == "timemachine" and each["horizon"] in (192, 336) for each in published)


def test_the_other_mamba_of_the_last_table_is_chosen_on_validation(tmp_path: Path) -> None:
    store = filled(tmp_path / "cells.sqlite", better="simba_series")
    assert add_best_other(store, BUDGET_OF_TESTS) == "simba_series"
    added = [each for each, state, _ in store.cells() if state == "open"]
    assert {each.label["model"] for each in added} == {"simba_series"}
    assert {each.label["lookback"] for each in added} >= {336, 512}


def test_a_paired_difference_and_its_interval() -> None:
    rivals = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    found = paired([value - 0.1 - 0.01 * value for value in rivals], rivals)
    assert found["low"] < found["difference"] < found["high"] < 0
    assert found["wins"] == 6
    same = paired(rivals, rivals)
    assert (same["low"], same["difference"], same["high"], same["wins"]) == (0.0, 0.0, 0.0, 0)
    with pytest.raises(ConfigError, match="needs 3 pairs"):
        paired([1.0], [2.0])


def test_the_model_is_chosen_on_validation_and_judged_by_the_test(complete: dict[str, Any]) -> None:
    rows = [dict(row) for name in ("a", "b") for row in complete["tables"][name]["rows"]]
    assert verdict(rows)["mamba"] == "tsm2"
    # Best on validation, and worse in the test than the one before.
    for row in rows:
        if row["model"] == "s_mamba":
            row["val_mse"] = 0.0
    found = verdict(rows)
    assert found["mamba"] == "s_mamba" and set(found["by_data"].values()) == {"s_mamba"}
    theirs = [row["mse"] for row in rows if row["model"] == "s_mamba"]
    assert found["pairs"]["one"]["linear"]["mean"] == pytest.approx(fmean(theirs))
    assert found["means"]["tsm2"] < found["means"]["s_mamba"]
