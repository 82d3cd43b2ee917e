"""Studies of image models as a GPU does them: the loop's results, stored cell by cell, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.cli import main
from selectra.compare import conduct as conducting
from selectra.compare.cells import Cell
from selectra.compare.conduct import Wish, conduct
from selectra.compare.image_worker import packs_images, result_of, work_on_images
from selectra.compare.packed_images import Job, Library, Training
from selectra.compare.results import results
from selectra.compare.store import Store
from selectra.compare.study import Tuning
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.job import typed
from tests.compare.images_small import CPU, make_study, work
from tests.compare.studies import numbers
from tests.compare.test_study import done
from tests.data.pictures import names, write_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "study.sqlite"
    work(path, make_study(), 3)
    return path


def test_packed_trainings_are_those_of_the_loop(packed: Path, tmp_path: Path) -> None:
    """Where passes are of whole batches, all of a cell is alike: scores of trials, choice, best step, test part."""
    path = tmp_path / "loop.sqlite"
    conduct(make_study(), Wish(path, device="cpu"), Console(quiet=True))
    loop, here = numbers(path), numbers(packed)
    assert loop.keys() == here.keys() and len(here) == 10
    for key, (state, record) in here.items():
        assert state == loop[key][0] == "done"
        expected = loop[key][1]
        assert record.keys() == expected.keys()
        for name in ("best_step", "steps", "data_order"):
            assert record.get(name) == expected.get(name), name
        assert record["history"] == pytest.approx(expected["history"], rel=1e-3)
        for part in ("val", "test"):
            if part in record:
                # As far as a history: rounding differs by processor. Other weights or statistics differ by per cents.
                assert record[part]["loss"] == pytest.approx(expected[part]["loss"], rel=1e-3)
                # A score may lie so near to another that rounding turns one image.
                assert record[part]["top1"] == pytest.approx(expected[part]["top1"], abs=1.1 / 32)


def test_a_study_is_stored_whole_and_is_reported(packed: Path) -> None:
    store = Store(packed)
    content = results(store)
    for cell, _, record in store.cells():
        assert record is not None
        assert ("test" in record) is (cell.trial is None)
        assert record["packed"] == 3 and record["steps"] == 7 and record["parameters"] > 0
    store.close()
    assert content["metric"] == "top1" and not any(row["missing"] for row in content["rows"])
    assert "beats" in content["verdict"]["text"] or "No" in content["verdict"]["text"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_kill_loses_nothing_but_the_cells_in_flight(packed: Path, tmp_path: Path) -> None:
    path, seen = tmp_path / "killed.sqlite", {}
    words = [sys.executable, "-m", "tests.compare.images_small", str(path)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*words, "0.3"], cwd=ROOT, start_new_session=True, **quiet)
    until = time.monotonic() + 600
    while time.monotonic() < until and process.poll() is None and done(path) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    seen = {key: found for key, found in numbers(path).items() if found[0] == "done"}
    assert 3 <= len(seen) < 10
    subprocess.run([*words, "0"], cwd=ROOT, check=True, timeout=600, **quiet)
    after = numbers(path)
    assert {key: after[key] for key in seen} == seen
    assert after == numbers(packed)


def test_a_limit_of_time_gives_back_what_is_in_flight(tmp_path: Path) -> None:
    store, study = Store(tmp_path / "cells.sqlite"), make_study()
    store.add(study.scored(study.bases[0], study.variants[0], by_gradient=True))
    begun = time.monotonic()
    work_on_images(store, CPU, 2, begun + 0.05, lambda *_: None)
    counts = store.counts()
    assert counts["taken"] + counts["open"] >= 1
    store.close()
    store = Store(tmp_path / "cells.sqlite")
    assert store.counts()["taken"] == 0
    store.close()


def cell_of(**train: Any) -> Cell:
    study = make_study()
    run = study.run(study.bases[0], study.variants[0], 0)
    changed = run.model_copy(update={"train": run.train.model_copy(update=train)})
    return Cell(changed, 0, {"base": "shapes", "variant": "vmamba", "seed": 0})


def trained(cell: Cell, ends: Any = None, **optim: Any) -> Training:
    run = typed(cell.run)
    run = run.model_copy(update={"optim": run.optim.model_copy(update=optim)})
    training = Training(Job(cell, run, ends), Library(CPU))
    training.begin()
    while training.more:
        training.advance()
    training.finish()
    return training


def test_a_trial_is_ended_early_where_it_is_judged_so() -> None:
    training = trained(cell_of(), ends=lambda history: len(history) == 2)
    state, record = result_of(training, 1)
    assert state == "done" and record["pruned"]
    assert len(record["history"]) == 2 and "test" not in record and training.on_device.done == 6


def test_one_step_is_a_training_too() -> None:
    state, record = result_of(trained(cell_of(steps=1)), 1)
    assert state == "done" and record["steps"] == 1 and record["seconds"] > 0


def test_what_diverges_has_failed() -> None:
    state, record = result_of(trained(cell_of(), lr=1e30, clip=None, warmup_steps=0), 1)
    assert state == "failed"
    assert "diverged" in record["reason"]


def test_weights_to_start_from_and_what_is_frozen(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first = trained(cell_of())
    state = {name: value.contiguous() for name, value in first.on_device.final.state_dict().items()}
    save_file(state, tmp_path / "first.safetensors")
    cell = cell_of(pretrained=str(tmp_path / "first.safetensors"), freeze="all", ema=None, seed=5)
    second = trained(cell)
    after = second.on_device.final.state_dict()
    kept = load_file(tmp_path / "first.safetensors")
    for name, value in kept.items():
        assert torch.equal(value, after[name]) is not name.startswith("head."), name
    assert sum(p.numel() for p in second.on_device.trained) == 16 * 4 + 4


def test_what_cannot_be_packed_is_done_by_the_loop() -> None:
    assert packs_images(make_study())
    base = make_study().bases[0]
    on_disk = base.model_copy(update={"data": Spec("images", keep="disk")})
    stepwise = base.model_copy(update={"train": base.train.model_copy(update={"accumulate": 2})})
    assert not packs_images(make_study(bases=(on_disk,)))
    assert not packs_images(make_study(bases=(stepwise,)))


def test_a_study_on_a_gpu_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which worker is called; what it does on a GPU is for the tests there."""
    called = []
    monkeypatch.setattr(conducting, "work_on_images", lambda *args: called.append(args[1:3]))
    monkeypatch.setattr(conducting, "_start_helpers", lambda *_: [])
    wish = Wish(tmp_path / "s.sqlite", packed=5)
    store, study = Store(wish.store), make_study(tuning=None, declared={})

    class Quiet:
        def watch(self, *_: Any) -> None: ...

    conducting._work(study, store, wish, torch.device("cuda"), time.monotonic() + 5, Quiet())  # pyright: ignore[reportArgumentType]
    store.close()
    assert called == [(torch.device("cuda"), 5)]


def test_a_folder_of_images_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pictures", names(each=12))
    words = ["compare", "vision", "pictures", "--models", "vmamba_smoke,vit_smoke", "--steps", "2", "--trials", "0",
             "--batch-size", "8", "--device", "cpu", "--workers", "1", "--img-size", "16"]  # fmt: skip
    if "vit_smoke" not in models.names("image"):
        pytest.skip("vit needs timm")
    for expected in ("6 cells done", "6 cells are done, 0 are left"):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out
    content = json.loads((tmp_path / "vision_pictures.json").read_text())
    assert [row["missing"] for row in content["rows"]] == [[], []]
    assert "top1" in (tmp_path / "vision_pictures.md").read_text()
    assert "Where Mamba loses" in (tmp_path / "vision_pictures.html").read_text()


def test_trials_by_optuna_are_packed_too(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    study = make_study(tuning=Tuning(ranges={"optim.lr": (1e-3, 1e-2)}, trials=2), seeds=3)
    work(tmp_path / "s.sqlite", study, 2)
    store = Store(tmp_path / "s.sqlite")
    assert store.counts() == {"open": 0, "taken": 0, "done": 10, "failed": 0}
    store.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_side_by_side_come_to_what_the_cpu_does(packed: Path, tmp_path: Path) -> None:
    work(tmp_path / "gpu.sqlite", make_study(), 3, device=torch.device("cuda"))
    here, there = numbers(tmp_path / "gpu.sqlite"), numbers(packed)
    assert here.keys() == there.keys()
    for key, (state, record) in here.items():
        assert state == "done"
        assert record["history"] == pytest.approx(there[key][1]["history"], rel=0.02)
