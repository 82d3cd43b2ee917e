"""The benchmark of the scan: its gate, its record, its clock."""

import time
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.bench import scan
from selectra.bench.timing import interleaved
from selectra.errors import BackendError

CPU = torch.device("cpu")
SMALL = (scan.Shape(1, 4, 9, 2), scan.Shape(2, 3, 5, 4))


def quiet() -> Console:
    return Console(quiet=True)


def test_the_record_holds_every_contender_and_is_saved_after_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_peers", lambda device: {})
    saved: list[int] = []
    record = scan.bench_scan(CPU, 0.0, quiet(), lambda r: saved.append(len(r["rows"])), SMALL)
    contenders = {row["name"] for row in record["rows"]}
    assert {"portable", "reference"} <= contenders
    assert saved == [len(contenders), 2 * len(contenders)]
    for row in record["rows"]:
        assert row["forward"]["median"] > 0 and row["training"]["median"] >= row["training"]["fastest"] > 0
    assert {"versions", "hardware", "commit"} <= record["environment"].keys()


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_peers", lambda device: {})
    monkeypatch.setattr(scan.check, "AT_MOST_OUTPUT", 0.0)
    with pytest.raises(BackendError, match=r"is wrong, nothing is timed: .*off by"):
        scan.bench_scan(CPU, 0.0, quiet(), lambda r: None, SMALL)


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(**a: Any) -> torch.Tensor:
        return 0.5 * scan._ours("portable")(**a)

    monkeypatch.setattr(scan, "_peers", lambda device: {"half": scan.Contender(half)})
    with pytest.raises(BackendError, match="half computes something else"):
        scan.bench_scan(CPU, 0.0, quiet(), lambda r: None, SMALL)


def test_a_long_shape_leaves_slow_peers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = scan.Contender(scan._ours("reference"), longest=6)
    monkeypatch.setattr(scan, "_peers", lambda device: {"peer": peer})
    record = scan.bench_scan(CPU, 0.0, quiet(), lambda r: None, SMALL)
    assert [row["shape"]["l"] for row in record["rows"] if row["name"] == "peer"] == [5]


def test_contenders_take_turns_and_a_slow_one_runs_once() -> None:
    ran: list[str] = []

    def slow() -> None:
        ran.append("slow")
        time.sleep(0.05)

    timings = interleaved({"slow": slow, "fast": lambda: ran.append("fast")}, 0.01, CPU)
    assert ran.count("slow") == 2 and timings["slow"].rounds == 1
    assert timings["fast"].rounds >= 3
    assert timings["slow"].median >= 0.05
    assert interleaved({"slow": slow}, 0.01, CPU)["slow"].rounds == 1


def test_a_slow_first_call_as_a_compilers_does_not_make_a_contender_slow() -> None:
    pauses = [0.05]

    def compiled() -> None:
        time.sleep(pauses.pop() if pauses else 0.0)

    found = interleaved({"compiled": compiled}, 0.01, CPU)["compiled"]
    assert found.rounds >= 3 and found.median < 0.05
