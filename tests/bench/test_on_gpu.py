"""The benchmarks on a CUDA device: `pytest -m gpu tests/bench`."""

import pytest
import torch
from rich.console import Console

from selectra.bench import block, lengths, scan_gpu
from selectra.bench.events import Stopwatch, host_microseconds, time_in_turn
from selectra.bench.floor import measure_machine
from selectra.bench.shapes import TINY_CASES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")


def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(autouse=True)
def _times_without_poison() -> None:
    torch.use_deterministic_algorithms(False)


def test_the_machine_is_measured_within_reason() -> None:
    machine = measure_machine(Stopwatch(DEVICE))
    assert 1e11 < machine.bandwidth < 2e13
    assert 3e8 < machine.clock < 4e9


def test_events_leave_the_hosts_time_out() -> None:
    watch = Stopwatch(DEVICE)
    small = torch.zeros(1024, device=DEVICE)
    spread = time_in_turn({"add": lambda _: small.add_(1)}, 0.1, watch)["add"]
    assert 5e-4 < spread.median < 0.02
    assert host_microseconds(lambda: small.add_(1), watch) < 100
    # A copy of the known size takes the time that its bandwidth says.
    copies = time_in_turn({"copy": lambda _: watch.copy()}, 0.1, watch)["copy"]
    assert copies.median == pytest.approx(1e3 * watch.copy_seconds, rel=0.2)


def test_scan_lengths_and_block_run_on_tiny_shapes() -> None:
    cases = (*TINY_CASES, Case("larger", 2, 128, 300))
    record = scan_gpu.bench_scan_gpu(DEVICE, 0.0, quiet(), lambda r: None, cases)
    assert [row["tag"] for row in record["rows"]] == [case.tag for case in cases]
    assert all(row["memory"]["ours"]["peak_bytes"] > 0 for row in record["rows"])
    assert all(row["input sets"] > 1 for row in record["rows"])
    found = lengths.bench_lengths(DEVICE, 0.0, quiet(), lambda r: None, lengths.Study(64, 1, (64, 65)))
    assert found["rows"][0]["fwd_ms"].keys() >= {"ours", "attention"}
    study = block.BlockStudy(64, 16, 1, (64,))
    assert block.bench_block(DEVICE, 0.0, quiet(), lambda r: None, study)["rows"][0]["peak_bytes"]["training"] > 0
