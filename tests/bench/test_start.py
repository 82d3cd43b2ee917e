"""What first use costs: the record and its table."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.bench import start, targets
from selectra.errors import BackendError
from selectra.ops.cuda import cache


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As measured on the CPU, where nothing is compiled, in this process."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, "restored after the test")
    folders: list[str] = []

    def first_call(name: str, device: str, folder: str) -> tuple[float, int]:
        assert not any(Path(folder).iterdir())
        folders.append(folder)
        return start.first_call(name, device, folder)

    monkeypatch.setattr(start, "in_fresh_process", first_call)
    found = start.bench_start(torch.device("cpu"), Console(quiet=True), lambda r: None, rounds=2)
    # Two uses of one folder, and a new folder for each round.
    assert len(folders) == 4 * len(start.PREPARE) == 2 * len(set(folders))
    assert os.environ[cache.FOLDER_VARIABLE] == folders[-1]
    return found


def test_every_kind_of_call_has_its_seconds(record: dict[str, Any]) -> None:
    assert [row["call"] for row in record["rows"]] == list(start.PREPARE)
    for row in record["rows"]:
        assert row["kernels"] == 0
        assert len(row["first_seconds"]) == len(row["later_seconds"]) == 2
        assert min(*row["first_seconds"], *row["later_seconds"]) > 0


def test_the_table_and_the_targets_take_medians() -> None:
    rows = [
        {"call": "a", "kernels": 1, "first_seconds": [9.0, 1.0, 2.0], "later_seconds": [0.5, 0.1, 0.15]},
        {"call": "b", "kernels": 5, "first_seconds": [6.0, 6.0, 6.0], "later_seconds": [0.05, 0.1, 0.1]},
    ]
    lines = start.start_table({"rows": rows}).splitlines()
    assert lines[2:] == ["| a | 1 | 2.000 | 0.150 |", "| b | 5 | 6.000 | 0.100 |"]
    first, later = targets._of_start({"rows": rows})
    assert (first.found, first.met) == ("6.00 s (b)", False)
    assert (later.found, later.met) == ("0.15 s (a)", True)


def hang(*_: str) -> tuple[float, int]:
    time.sleep(60)
    return 0.0, 0


def test_a_first_call_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "LIMIT", 0.5)
    monkeypatch.setattr(start, "first_call", hang)
    monkeypatch.setattr(start, "METHOD", "fork")
    with pytest.raises(BackendError, match=r"did not end within 0\.5 s"):
        start.in_fresh_process(next(iter(start.PREPARE)), "cpu", "unused")
