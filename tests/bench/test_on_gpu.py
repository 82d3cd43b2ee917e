"""The benchmarks on a CUDA device: `pytest -m gpu tests/bench`."""

import pytest
import torch
from rich.console import Console

from selectra.bench import block, block_parts, lengths, model, scan_gpu
from selectra.bench.events import Stopwatch, host_microseconds, time_in_turn
from selectra.bench.floor import measure_machine
from selectra.bench.norms import NormSize
from selectra.bench.parts import BlockSize
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
    study = block.BlockStudy(64, 16, 1, (64,), other_ways=(64,))
    rows = block.bench_block(DEVICE, 0.0, quiet(), lambda r: None, study)["rows"]
    assert rows[0]["peak_bytes"]["training"] > 0
    assert rows[0]["ways"]["forward"].keys() == {"compiled", "graph"}


def test_the_parts_of_a_block_are_all_there_is() -> None:
    sizes = (BlockSize("tiny", 2, 300, 256),)
    norm_sizes = (NormSize(64, 96, "layer", torch.float32),)
    record = block_parts.bench_block_parts(DEVICE, 0.0, quiet(), lambda r: None, sizes, norm_sizes)
    assert [row["backward"] for row in record["rows"]] == ["joined", "in place"]
    for row in record["rows"]:
        for kind in ("forward", "training"):
            found = row[kind]["parts_ms"]
            assert sum(found.values()) == pytest.approx(2 * found["all"])
            assert all(found[part] > 0 for part in ("norm", "in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj"))
            assert found["elementwise and sums"] > 0
    assert record["rows"][1]["training"]["parts_ms"]["copies"] < record["rows"][0]["training"]["parts_ms"]["copies"]
    assert record["norms"][0]["training"].keys() == {"eager", "compiled", "ours"}


def test_models_run() -> None:
    record = model.bench_model(DEVICE, 0.0, quiet(), lambda r: None, "tsm2_smoke,dlinear", batch=2)
    assert record["rows"][0]["backends"]["selective_scan"] == "cuda"
