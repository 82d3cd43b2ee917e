"""The scan's limit on a CPU: what is counted, what is measured, and that record and tables carry both."""

from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.bench import cpu_limit, cpu_targets, docs, scan
from selectra.bench.shapes import Case
from selectra.bench.timing import Timing
from selectra.ops import native
from selectra.ops.native.library import library
from selectra.ops.selective_scan import cpu

pytestmark = pytest.mark.skipif(not native.status().available, reason=f"{native.status().problem}")

CASE = Case("case", 2, 16, 20, 4, dtype="fp32")
ELEMENTS = 2 * 16 * 20
# One a second of all, so that a time is a count.
ONES = dict.fromkeys(cpu_limit.WORK, 1.0)


def made_row(rates: dict[str, float], copied: float) -> dict[str, Any]:
    timings = {way: Timing(2.0, 1.0, 3) for way in cpu_limit.WAYS}
    return cpu_limit.row_of(CASE, timings, rates, dict.fromkeys(cpu_limit.WAYS, copied))


@pytest.mark.parametrize(("way", "at_state", "at_entry"), [("plain_fwd", 3, 1), ("fwd", 3, 7), ("bwd", 11, 18)])
def test_the_arithmetic_is_counted_at_every_state_and_entry(way: str, at_state: int, at_entry: int) -> None:
    floor = made_row(ONES, 1e9)[f"floor_{way}"]
    assert floor["arithmetic_ms"] == pytest.approx(1e3 * ELEMENTS * (4 * (1 + at_state) + at_entry))


def test_the_bytes_are_those_of_every_tensor_once() -> None:
    arguments = CASE.arguments(torch.device("cpu"))
    u, z, B = (arguments[name] for name in ("u", "z", "B"))
    assert u is not None and z is not None and B is not None
    kept = 4 * 2 * 2 * CASE.d * CASE.n
    assert kept == 4 * cpu.checkpoint_shape(u, torch.empty(CASE.d, CASE.n), 1, None)[0]
    assert cpu_limit.moved_bytes(CASE, cpu_limit.COUNTS["plain_fwd"]) == 3 * u.nbytes + 2 * B.nbytes
    assert cpu_limit.moved_bytes(CASE, cpu_limit.COUNTS["fwd"]) == 3 * u.nbytes + z.nbytes + 2 * B.nbytes
    assert cpu_limit.moved_bytes(CASE, cpu_limit.COUNTS["bwd"]) == 5 * u.nbytes + 2 * z.nbytes + 4 * B.nbytes + kept


def test_the_limit_is_the_longer_of_both_times() -> None:
    by_bytes, by_work = made_row(dict.fromkeys(ONES, 1e12), 1.0), made_row(ONES, 1e12)
    for way in cpu_limit.WAYS:
        assert by_bytes[f"floor_{way}_ms"] == by_bytes[f"floor_{way}"]["bytes_ms"]
        assert by_work[f"floor_{way}_ms"] == by_work[f"floor_{way}"]["arithmetic_ms"]
        assert by_work[f"share_{way}"] == pytest.approx(by_work[f"floor_{way}_ms"] / 2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_copy_that_is_timed_is_one(dtype: torch.dtype, threads: int) -> None:
    source, target = torch.randn(4099), torch.zeros(4099)
    native_library = library()
    built = native_library.build
    size = source.nbytes // 64 * 64
    try:
        for build, runs in enumerate(native_library.runs):
            if runs:
                native_library.build = build
                words = [cpu_limit.COPY, 2, threads, source.data_ptr(), target.zero_().data_ptr(), source.nbytes]
                native_library.call("rate", dtype, words)
                assert torch.equal(target[: size // 4], source[: size // 4])
    finally:
        native_library.build = built


def test_record_and_tables_carry_rates_limits_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_peers", lambda device: {})
    shapes = (scan.Shape(1, 16, 33, 16), scan.Shape(1, 4, 9, 2))
    record = scan.bench_scan(torch.device("cpu"), 0.0, Console(quiet=True), lambda r: None, shapes)
    assert [row["L"] for row in record["limits"]] == [33, 9]
    for row in record["limits"]:
        assert row["work a second"].keys() == cpu_limit.WORK.keys()
        assert all(rate > 0 for rate in (*row["work a second"].values(), *row["bytes a second"].values()))
        for way in cpu_limit.WAYS:
            assert row[f"share_{way}"] == pytest.approx(row[f"floor_{way}_ms"] / row[f"ours_{way}_ms"])
            assert row[f"share_{way}"] > 0
    lines = docs.TABLES["cpu_limits"](record).splitlines()
    assert lines[0].startswith("| shape (b, d, l, n) | forward, plain, ms | limit | share |")
    assert lines[2].startswith("| (1, 16, 33, 16) |") and lines[2].count("%") == 3
    assert "a nanosecond: " in lines[-1]
    assert "no limits" in docs.TABLES["cpu_limits"]({"rows": []})


def test_targets_take_the_worst_share_at_sixteen_states() -> None:
    def row(n: int, share: float) -> dict[str, Any]:
        return {"B": 1, "D": 2, "L": 3, "N": n} | {f"share_{way}": share for way in cpu_limit.WAYS}

    table = cpu_targets.cpu_target_table({"rows": [], "limits": [row(16, 0.65), row(16, 0.72), row(1, 0.1)]})
    assert "| forward, plain, share of the limit, N = 16 | at least 70% | 65% (1, 2, 3, 16) | no |" in table
    assert "| forward, share of the limit, N = 16 | at least 60% | 65% (1, 2, 3, 16) | yes |" in table
    assert "| backward, share of the limit, N = 16 | at least 45% | 65% (1, 2, 3, 16) | yes |" in table
