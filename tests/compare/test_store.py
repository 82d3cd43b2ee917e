"""Cells are done once, stored at once, and survive whatever happens to a worker."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from selectra.compare.store import SURELY, Store
from selectra.errors import DataError
from tests.compare.small import make_cells, work, write_series


def lines(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def start(file: Path, log: Path, pause: float) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "tests.compare.small", str(file), str(log), str(pause)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=root)


def results(file: Path) -> dict[str, float]:
    store = Store(file)
    found = {cell.key: record["test"]["mse"] for cell, state, record in store.cells() if state == "done" and record}
    store.close()
    return found


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    store = Store(tmp_path / "cells.sqlite")
    store.add(make_cells(write_series(tmp_path)))
    store.close()
    return tmp_path / "cells.sqlite"


def test_a_cell_is_taken_once(filled: Path) -> None:
    first, second = Store(filled), Store(filled)
    taken = [store.take() for store in (first, second) * 4]
    assert len({cell.key for cell in taken if cell is not None}) == 8
    assert first.take() is None
    assert [cell.place for cell in taken if cell is not None] == list(range(8))
    first.close()
    # What the first had taken is open again.
    assert second.counts() == {"open": 4, "taken": 4, "done": 0, "failed": 0}
    second.close()


def test_only_the_owner_finishes(filled: Path) -> None:
    first, second = Store(filled), Store(filled)
    cell = first.take()
    assert cell is not None
    assert not second.finish(cell, {"test": {}})
    assert first.finish(cell, {"test": {}})
    assert not first.finish(cell, {"test": {}})


def test_what_is_there_stays(filled: Path, tmp_path: Path) -> None:
    store = Store(filled)
    cell = store.take()
    assert cell is not None
    store.finish(cell, {"test": {"mse": 1.0}})
    store.add(make_cells(tmp_path / "series.csv"))
    assert store.counts()["done"] == 1
    stored, state, record = store.cells()[0]
    assert (stored.key, state, record) == (cell.key, "done", {"test": {"mse": 1.0}})
    assert stored.run == cell.run


def test_a_cell_of_a_silent_worker_is_free(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker elsewhere whose beat is old, and one here whose process is gone."""
    monkeypatch.setattr("selectra.compare.store.socket.gethostname", lambda: "elsewhere")
    silent = Store(filled)
    taken = silent.take()
    monkeypatch.undo()
    store = Store(filled)
    assert taken is not None
    second = store.take()
    assert second is not None
    assert second.key != taken.key
    with sqlite3.connect(filled) as file:
        file.execute("UPDATE workers SET beat = ? WHERE id = ?", (time.time() - 2 * SURELY, silent.worker))
    again = store.take()
    assert again is not None
    assert again.key == taken.key


@pytest.mark.slow
def test_killed_workers_lose_only_the_cell_in_flight(filled: Path, tmp_path: Path) -> None:
    quiet = tmp_path / "quiet.sqlite"
    shutil.copy(filled, quiet)
    work(quiet, tmp_path / "quiet.log", 0.0)
    log = tmp_path / "log"
    for wanted in (1, 3, 6):
        worker = start(filled, log, 0.3)
        while sum(count for line, count in lines(log).items() if line.startswith("done")) < wanted:
            assert worker.poll() is None
            time.sleep(0.05)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    # The last one ends by itself, and the file works in another place.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(filled, moved / "moved.sqlite")
    assert start(moved / "moved.sqlite", log, 0.0).wait() == 0
    begun = {line: count for line, count in lines(log).items() if line.startswith("begun")}
    assert sum(begun.values()) <= 8 + 3
    assert all(count == 1 for line, count in lines(log).items() if line.startswith("done"))
    assert results(moved / "moved.sqlite") == results(quiet)
    assert len(results(quiet)) == 8


@pytest.mark.slow
def test_two_workers_never_do_the_same(filled: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [start(filled, log, 0.2) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert all(count == 1 for count in lines(log).values())
    assert len(results(filled)) == 8


def test_another_version_is_refused(filled: Path) -> None:
    with sqlite3.connect(filled) as file:
        file.execute("UPDATE meta SET value = '0' WHERE name = 'version'")
    with pytest.raises(DataError, match="version 0"):
        Store(filled)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database at all, but long enough to look like something " * 20)
    with pytest.raises(DataError, match="cannot be read"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other.sqlite") as file:
        file.execute("CREATE TABLE cells (a)")
    with pytest.raises(DataError, match="holds no comparison"):
        Store(tmp_path / "other.sqlite")
    with pytest.raises(DataError, match="is not a file"):
        Store(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        Store(tmp_path / "nowhere" / "cells.sqlite")


def test_a_damaged_file_is_refused(filled: Path) -> None:
    content = bytearray(filled.read_bytes())
    content[:200] = bytes(200)
    filled.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        Store(filled)


def test_facts_are_remembered(filled: Path) -> None:
    store = Store(filled)
    assert store.recall("budget") is None
    store.remember("budget", {"steps": 3})
    store.close()
    assert Store(filled).recall("budget") == {"steps": 3}
    assert json.dumps(Store(filled).recall("budget")) == '{"steps": 3}'


def test_a_file_that_another_holds_is_named_in_time(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selectra.compare.store.PATIENCE", 0.3)
    store, other = Store(filled), sqlite3.connect(filled, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    for call in (store.take, lambda: Store(filled)):
        with pytest.raises(DataError, match=r"has been held by another process for 0\.3 s; end that one"):
            call()
    assert time.monotonic() - began < 0.6 + 5
    other.execute("ROLLBACK")
    assert store.take() is not None
