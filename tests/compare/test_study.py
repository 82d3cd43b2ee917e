"""What a study refuses, what it does, and what a kill leaves of it."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.compare import prepare, room, worker
from selectra.compare.conduct import Wish, conduct, decide, open_study, stored_study
from selectra.compare.measure import measure
from selectra.compare.store import Store
from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.errors import ConfigError, DataError
from selectra.spec import Spec, override
from selectra.train.job import typed
from tests.compare.small import write_series
from tests.compare.studies import VARIANTS, finished, make_study, numbers, repeated

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("undisturbed"))


def refused(series: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_study(series, **changes).check()
    return str(caught.value)


def test_two_changes_at_once_are_refused(series: Path) -> None:
    longer = Variant(name="longer", model=Spec("dlinear"), changes=("train.steps=7",))
    text = refused(series, variants=(*VARIANTS, longer))
    assert "changes train.steps from 6 to 7, and only the model may differ beside optim.lr" in text
    assert "declare it with a reason" in text
    declared = {"optim.lr": "tuned", "train.steps": "it learns more slowly"}
    make_study(series, variants=(*VARIANTS, longer), declared=declared).check()


def test_too_few_seeds_are_refused(series: Path) -> None:
    assert "has 2 seeds, too few for a verdict" in refused(series, seeds=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"declared": {"optim.lr": " "}}, "without a reason"),
        ({"declared": {}}, "optim.lr is tuned, so it differs between variants"),
        ({"declared": {"optim.lr": "x", "model.d_model": "y"}}, "the model may differ anyway"),
        ({"subject": "mambo"}, "Did you mean 'mamba'?"),
        ({"subject": "linear", "variants": VARIANTS[1:]}, "every variant is 'linear'"),
        ({"variants": (*VARIANTS, VARIANTS[0])}, "two variants of the study 'small' have the name 'tsm2'"),
        ({"variants": (*VARIANTS, VARIANTS[0].model_copy(update={"name": "again"}))}, "are the same run"),
    ],
)
def test_what_is_no_fair_study_is_refused(series: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refused(series, **changes)


def test_a_tuning_says_one_thing() -> None:
    for content, words in (
        ({}, "either 'values' or 'ranges'"),
        ({"ranges": {"optim.lr": (0.1, 0.01)}, "trials": 3}, "0 < low < high"),
        ({"ranges": {"optim.lr": (0.01, 0.1)}}, "'ranges' need 'trials'"),
    ):
        with pytest.raises(ValueError, match=words):
            Tuning.model_validate(content)


def test_everything_is_done_once_and_trials_never_see_the_test(undisturbed: Path) -> None:
    store = Store(undisturbed)
    cells = store.cells()
    study = stored_study(store)
    store.close()
    assert all(state == "done" for _, state, _ in cells)
    trials = [record for cell, _, record in cells if cell.trial is not None]
    scored = [(cell, record) for cell, _, record in cells if cell.trial is None]
    # Two trials and three seeds of each that learns; the closed form once.
    assert (len(trials), len(scored)) == (4, 7)
    assert not any("test" in record for record in trials if record)
    assert all("test" in record for _, record in scored if record)
    # The same seed, the same order of the data.
    orders = {cell.label["seed"]: set() for cell, _ in scored}
    for cell, record in scored:
        if record and "data_order" in record:
            orders[cell.label["seed"]].add(record["data_order"])
    assert [len(found) for found in orders.values()] == [1, 1, 1]
    # Everything but the chosen rate is the base's.
    for cell, _ in scored:
        assert cell.run.train.steps == study.bases[0].train.steps


def test_the_best_trial_decides(undisturbed: Path) -> None:
    store = Store(undisturbed)
    cells = store.cells()
    store.close()
    for variant in ("tsm2", "dlinear"):
        mine = [(cell, record) for cell, _, record in cells if cell.label["variant"] == variant and record]
        scores = {record["score"]: cell.run.optim.lr for cell, record in mine if cell.trial is not None}
        assert {cell.run.optim.lr for cell, _ in mine if cell.trial is None} == {scores[min(scores)]}


def test_a_second_call_has_nothing_to_do_and_another_study_is_refused(undisturbed: Path, series: Path) -> None:
    before = numbers(undisturbed)
    store = Store(undisturbed)
    study = stored_study(store)
    store.close()
    conduct(study, Wish(undisturbed, device="cpu"), QUIET)
    assert numbers(undisturbed) == before
    with pytest.raises(ConfigError, match=r"another study, 'small': bases\.0\.data\.args.*seeds is 3 there and 4 now"):
        conduct(make_study(series, seeds=4), Wish(undisturbed, device="cpu"), QUIET)


def test_a_file_of_tables_or_of_something_else_is_refused(tmp_path: Path, series: Path) -> None:
    store = Store(tmp_path / "tables.sqlite")
    store.remember("budget", {"steps": 1})
    store.close()
    with pytest.raises(ConfigError, match="holds the tables of forecasters and no study"):
        conduct(make_study(series), Wish(tmp_path / "tables.sqlite", device="cpu"), QUIET)
    (tmp_path / "damaged.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 4000)
    with pytest.raises(DataError, match="cannot be read as a comparison's records"):
        conduct(make_study(series), Wish(tmp_path / "damaged.sqlite", device="cpu"), QUIET)


def test_a_file_of_another_version_is_refused(tmp_path: Path, undisturbed: Path, series: Path) -> None:
    import sqlite3

    path = tmp_path / "old.sqlite"
    shutil.copy(undisturbed, path)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE meta SET value = '99' WHERE name = 'version'")
    file.close()
    with pytest.raises(DataError, match="was written by version 99"):
        conduct(make_study(series), Wish(path, device="cpu"), QUIET)


def test_a_file_begun_before_a_setting_existed_is_gone_on_with(tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "before.sqlite"
    shutil.copy(undisturbed, path)
    store = Store(path)
    study, text = stored_study(store), store.recall("study")
    for base in text["bases"]:
        del base["optim"]["warmup_share"]
    store.remember("study", text)
    store.close()
    conduct(study, Wish(path, device="cpu"), QUIET)
    # And one of a later version, with a setting that nobody knows here, is told by it.
    store = Store(path)
    store.remember("study", {**text, "metric": "mae", "unheard": 1})
    store.close()
    with pytest.raises(ConfigError, match=r"holds another study, .*metric is 'mae' there and 'mse' now, unheard is 1"):
        conduct(study, Wish(path, device="cpu"), QUIET)


def prepared_file(path: Path, study: Study) -> Store:
    """A file of a study whose models are matched and measured, and none trained."""
    store = Store(path)
    open_study(store, study, torch.device("cpu"), QUIET)
    return store


def test_a_limit_of_time_holds_while_models_are_measured(
    tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    measured: list[Spec] = []

    def measuring(spec: Spec, *args: Any, **more: Any) -> Any:
        measured.append(spec)
        return measure(spec, *args, **more)

    monkeypatch.setattr(prepare, "measure", measuring)
    path, console = tmp_path / "a.sqlite", Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    counts = conduct(make_study(series), Wish(path, device="cpu", time_limit=0.0), console)
    assert (sum(counts.values()), measured) == (0, [])
    assert "while models were matched and measured, after 0 of 3, before the first training" in console.export_text()
    store = Store(path)
    assert store.recall("study") is None and store.recall("prepared") is None
    store.close()
    # A clock that goes on by a second whenever it is looked at: the limit comes between two sizes that are tried.
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    study = make_study(series, budget=Budget(quantity="params", amount=4850))
    with pytest.raises(prepare.TimeUpError, match="after 0 of 3"):
        prepare.prepare(study, torch.device("cpu"), console, until=5)
    assert measured == []
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    with pytest.raises(prepare.TimeUpError, match="after 1 of 3"):
        prepare.prepare(make_study(series), torch.device("cpu"), console, until=5)
    assert len(measured) == 1
    assert "1 of 3: waves, tsm2: " in console.export_text()


def test_what_cannot_be_met_or_held_is_refused_before_anything_is_built(
    tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Also when it is the last of the models."""

    def measuring(spec: Spec, *args: Any, **more: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(prepare, "measure", measuring)
    variants = (*VARIANTS, Variant(name="mixer", model=Spec("tsmixer"), kind="mlp"))
    study = make_study(series, budget=Budget(quantity="params", amount=1e8), variants=variants)
    with pytest.raises(ConfigError, match=r"no tsmixer.d_ff brings tsmixer within 2 % .* the most is d_ff=16431"):
        conduct(study, Wish(tmp_path / "a.sqlite", device="cpu"), QUIET)
    study = make_study(series, budget=Budget(quantity="params", amount=1e12))
    with pytest.raises(ConfigError, match=r"a model with 1,000,000,000,000 parameters is too large for this machine"):
        conduct(study, Wish(tmp_path / "a.sqlite", device="cpu"), QUIET)
    # Each process of several has a model of its own; in the sizes that a study states, too.
    monkeypatch.setattr(room, "memory_of", lambda device: 1e6)
    with pytest.raises(ConfigError, match=r"'tsm2' with [0-9,]+ parameters .* for 40 trainings side by side"):
        conduct(make_study(series), Wish(tmp_path / "a.sqlite", device="cpu", workers=40), QUIET)


def test_a_limit_of_time_begins_nothing_and_the_file_can_be_moved(tmp_path: Path, undisturbed: Path) -> None:
    series = next(undisturbed.parent.glob("*.csv"))
    wish = Wish(tmp_path / "a.sqlite", device="cpu", time_limit=0.0)
    prepared_file(wish.store, make_study(series)).close()
    assert conduct(make_study(series), wish, QUIET)["done"] == 0
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "b.sqlite"
    shutil.move(tmp_path / "a.sqlite", moved)
    conduct(make_study(series), Wish(moved, device="cpu"), QUIET)
    assert numbers(moved) == numbers(undisturbed)


def test_every_trial_failed_is_no_crash(tmp_path: Path, series: Path) -> None:
    # Rates at which every training diverges.
    tuning = Tuning(values={"optim.lr": (1e30, 1e31)})
    path = tmp_path / "a.sqlite"
    counts = conduct(make_study(series, tuning=tuning), Wish(path, device="cpu"), QUIET)
    assert counts["failed"] == 4
    from selectra.compare.results import results

    store = Store(path)
    content = results(store)
    store.close()
    assert content["verdict"]["text"].startswith("No verdict yet: 2 of 3 results are missing")
    assert any("every trial failed" in reason for row in content["rows"] for reason in row["reasons"])


def test_a_budget_brings_what_has_a_width_to_one_size(series: Path, tmp_path: Path) -> None:
    store = prepared_file(tmp_path / "a.sqlite", make_study(series, budget=Budget(quantity="params", amount=4850)))
    found = {each["variant"]: each for each in store.recall("prepared")["models"]}
    decide(store, stored_study(store))
    sizes = {cell.label["variant"]: cell.run.model for cell, _, _ in store.cells()}
    store.close()
    assert found["tsm2"]["cost"]["parameters"] == pytest.approx(4850, rel=0.02)
    assert "has no width" in found["dlinear"]["matched"]
    assert sizes["tsm2"].args["d_model"] != 8
    with pytest.raises(ConfigError, match="the nearest are d_model="):
        conduct(make_study(series, budget=Budget(quantity="params", amount=300)),
                Wish(tmp_path / "b.sqlite", device="cpu"), QUIET)  # fmt: skip


def start(series: Path, store: Path, workers: int, draws: int = 0) -> subprocess.Popen[bytes]:
    """The study in processes of its own, which one signal ends together."""
    words = [sys.executable, "-m", "tests.compare.studies", str(series), str(store), str(workers), "6", str(draws)]
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.dist
def test_kills_lose_nothing_but_the_cell_in_flight(tmp_path: Path, undisturbed: Path) -> None:
    series, path = next(undisturbed.parent.glob("*.csv")), tmp_path / "killed.sqlite"
    draw = random.Random(0)
    seen: dict[str, Any] = {}
    for kill in range(2):
        process = start(series, path, 1)
        until = time.monotonic() + 600
        wanted = len(seen) + 1
        while time.monotonic() < until and process.poll() is None and done(path) < wanted:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = {key: found for key, found in numbers(path).items() if found[0] == "done"}
        # What was finished stays as it was.
        assert {key: after[key] for key in seen} == seen, kill
        assert len(after) >= wanted
        seen = after
    process = start(series, path, 2)
    assert process.wait(600) == 0
    assert numbers(path) == numbers(undisturbed)


def done(path: Path) -> int:
    """Finished cells of a file that may not be there yet."""
    import sqlite3

    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5) as file:
            return file.execute("SELECT count(*) FROM cells WHERE state = 'done'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_commands_of_cells_repeat_their_runs(undisturbed: Path) -> None:
    store = Store(undisturbed)
    for cell, _, _ in store.cells():
        assert repeated(cell.run) == typed(cell.run).model_copy(update={"name": ""})
    store.close()


def test_data_is_read_once_for_all_cells(series: Path) -> None:
    spec = make_study(series).bases[0].data
    assert worker.load(spec) is worker.load(spec)
    assert json.dumps(worker.load(spec).facts)


def test_a_study_file_in_python(tmp_path: Path, series: Path) -> None:
    from selectra.compare.questions import Asked, find_study

    path = tmp_path / "mine.py"
    path.write_text(
        "from pathlib import Path\nfrom tests.compare.studies import make_study\n"
        f"study = make_study(Path({str(series)!r}))\n"
    )
    found = find_study(str(path), Asked(steps=3, seeds=4))
    assert (found.bases[0].train.steps, found.seeds) == (3, 4)
    assert isinstance(found, Study)
    path.write_text("study = 1\n")
    with pytest.raises(ConfigError, match="defines 0 studies"):
        find_study(str(path), Asked())
    with pytest.raises(ConfigError, match=r"there is no study 'selektion'.*Did you mean 'selection'"):
        find_study("selektion", Asked())
    with pytest.raises(ConfigError, match="quick is for"):
        find_study("selection", Asked(quick=True))


def test_override_is_what_a_variant_changes(series: Path) -> None:
    study = make_study(series)
    run = study.run(study.bases[0], VARIANTS[1], 2, {"optim.lr": 0.5})
    assert (run.optim.lr, run.train.seed, run.model) == (0.5, 2, VARIANTS[1].model)
    assert override(run, ["optim.lr=0.01"]).optim.lr == 0.01


def test_a_model_of_language_trains_on_the_data_that_the_command_names() -> None:
    from selectra.runs import find_run

    run = typed(find_run("gpt", ["data=recall", "data.keys=32", "task=language"]))
    assert (run.data, run.task.name, run.model.name) == (Spec("recall", keys=32), "language", "gpt")
    with pytest.raises(ConfigError, match="data=NAME"):
        find_run("gpt", ["task=language"])


def test_a_metric_that_the_task_does_not_measure_is_refused_before_the_first_training(
    tmp_path: Path, series: Path
) -> None:  # fmt: skip
    path = tmp_path / "a.sqlite"
    with pytest.raises(ConfigError, match=r"decided by 'msee', and the task 'forecasting' measures .*mean 'mse'"):
        conduct(make_study(series, metric="msee"), Wish(path, device="cpu"), QUIET)
    store = Store(path)
    assert not any(store.counts().values())
    store.close()
