"""Several processes on one study, by torchrun or by the same command given twice: every cell is run once."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from selectra.compare.crew import Crew, dismiss
from selectra.compare.store import LEASE, SILENCE, Store
from tests.compare.small import make_cells, write_series

STUDY = """
import os, time
from pathlib import Path
import selectra.compare.worker as worker
from selectra.compare.study import Study, Variant
from tests.compare.small import make_run
from selectra.spec import Spec

plain = worker._plain

def noted(cell, device, judge):
    log = Path({log!r})
    with log.open("a") as file:
        file.write(f"{{os.getpid()}} {{cell.key}}\\n")
    # With a cell in hand each waits for the other, however much later that one has begun.
    until = time.monotonic() + 300
    while len({{line.split()[0] for line in log.read_text().splitlines()}}) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return plain(cell, device, judge)

worker._plain = noted
base = make_run(Path({data!r}), Spec("naive"), steps=3).model_copy(update={{"name": "waves"}})
kernels = (3, 5, 7)
study = Study(
    name="crew", question="Who does what?", bases=(base,), subject="3", seeds=4,
    variants=tuple(Variant(name=str(k), model=Spec("dlinear", kernel=k)) for k in kernels),
)
"""
CELLS = 12


def start(words: list[str]) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *words], env=environment, cwd=root)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "twice"])
def test_two_processes_never_run_the_same_cell(how: str, tmp_path: Path) -> None:
    log, file, store = tmp_path / "log", tmp_path / "study.py", tmp_path / "crew.sqlite"
    file.write_text(STUDY.format(log=str(log), data=str(write_series(tmp_path))))
    words = ["compare", str(file), "--store", str(store), "--device", "cpu"]
    if how == "torchrun":
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "selectra", *words]
        processes = [start(run)]
    else:
        processes = [start(["-m", "selectra", *words, "--workers", "1"]) for _ in range(2)]
    assert [process.wait(600) for process in processes] == [0] * len(processes)
    begun = [line.split() for line in log.read_text().splitlines()]
    assert set(Counter(key for _, key in begun).values()) == {1}
    assert len(begun) == CELLS
    assert len({process for process, _ in begun}) == 2
    assert Store(store).counts() == {"open": 0, "taken": 0, "done": CELLS, "failed": 0}
    assert store.with_suffix(".html").is_file()


def test_a_crew_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Crew.found() == Crew(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Crew.found() == Crew(5, 8, 1)
    assert Crew.found().device("cpu") == torch.device("cpu")
    monkeypatch.setattr("selectra.compare.crew.pick_device", lambda *_: torch.device("cuda"))
    assert Crew.found().device("cuda") == torch.device("cuda", 1)


def test_a_worker_whose_clock_is_wrong_keeps_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beats are old by our clock, but they come."""
    path = tmp_path / "cells.sqlite"
    store = Store(path)
    store.add(make_cells(write_series(tmp_path), 6))
    monkeypatch.setattr("selectra.compare.store.socket.gethostname", lambda: "elsewhere")
    other = Store(path)
    taken = other.take()
    monkeypatch.undo()
    assert taken is not None
    now = [100.0]
    monkeypatch.setattr("selectra.compare.store.time.monotonic", lambda: now[0])

    def beat(age: float) -> None:
        with sqlite3.connect(path) as file:
            file.execute("UPDATE workers SET beat = ? WHERE id = ?", (time.time() - age, other.worker))

    for turn in range(3):
        beat(3 * LEASE - turn)
        now[0] += SILENCE
        mine = store.take()
        assert mine is not None and mine.key != taken.key
    now[0] += SILENCE + 1
    again = store.take()
    assert again is not None and again.key == taken.key


def _stubborn(ready: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()  # type: ignore[attr-defined]
    time.sleep(60)


def test_a_helper_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selectra.compare.crew.FAREWELL", 0.5)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    helper = context.Process(target=_stubborn, args=(ready,))
    helper.start()
    assert ready.wait(60)
    began = time.monotonic()
    dismiss([helper])
    assert not helper.is_alive() and time.monotonic() - began < 30
