"""The GPU benchmark of the scan, tried on the CPU at tiny shapes: its gate, its record, its floors, its tables."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.bench import gate, scan_gpu, scan_table
from selectra.bench.calls import NAMES, Arguments, Ours, kept_bytes, public, results
from selectra.bench.events import Spread, Stopwatch, time_in_turn
from selectra.bench.floor import Machine, backward_floor, forward_floor
from selectra.bench.shapes import CASES, TINY_CASES, Case, chosen_cases
from selectra.errors import BackendError, ConfigError
from selectra.ops import selective_scan

CPU = torch.device("cpu")
TINY = Case("precision", 1, 6, 7, 2)
KEYS = {
    "tag", "B", "D", "L", "N", "groups", "dtype", "gate", "ours_fwd_ms", "ours_bwd_ms",
    "peer", "peer_fwd_ms", "peer_bwd_ms", "floor_fwd_ms", "floor_bwd_ms",
}  # fmt: skip
Record = dict[str, Any]


@pytest.fixture
def watch() -> Stopwatch:
    return Stopwatch(CPU, copy_bytes=1 << 16)


@pytest.fixture
def record(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> Record:
    """With a peer that is our own portable backend under another name."""
    peers = {"mamba_ssm": portable}
    monkeypatch.setattr(scan_gpu, "find_peers", lambda: (peers, {"VMamba": "not installed"}))
    monkeypatch.setattr(scan_gpu, "PRECISION_CASES", (TINY, TINY._replace(dtype="fp32")))
    return scan_gpu.bench_scan_gpu(CPU, 0.0, quiet(), lambda r: None, TINY_CASES, "portable", watch)


def quiet() -> Console:
    return Console(quiet=True)


def portable(arguments: Arguments) -> Ours:
    return Ours(arguments, "portable")


def wrong(name: str, by: float = 0.5) -> Callable[[Arguments], Ours]:
    """A kernel whose y or one gradient is off."""

    class Wrong(Ours):
        def y(self, outputs: Any) -> torch.Tensor:
            return super().y(outputs) * (by if name == "y" else 1)

        def gradients(self, grads: Any) -> dict[str, torch.Tensor]:
            return {k: v * (by if name == f"d{k}" else 1) for k, v in super().gradients(grads).items()}

    return lambda arguments: Wrong(arguments, "portable")


def test_a_row_has_the_keys_that_others_read_and_the_record_is_json(record: Record) -> None:
    assert [row["tag"] for row in record["rows"]] == [case.tag for case in TINY_CASES]
    for row, case in zip(record["rows"], TINY_CASES, strict=True):
        assert row.keys() >= KEYS
        assert (row["B"], row["D"], row["L"], row["N"]) == (case.b, case.d, case.l, case.n)
        assert row["peer"] == "mamba_ssm" and row["backend"] == "portable"
        for name in ("ours", "peer", "floor"):
            assert row[f"{name}_fwd_ms"] > 0 and row[f"{name}_bwd_ms"] > 0
        assert row["ratio_bwd"] == row["peer_bwd_ms"] / row["ours_bwd_ms"]
        spread = row["spread"]["fwd"]["ours"]
        assert spread["fastest"] <= spread["lower"] <= spread["median"] <= spread["upper"]
        assert 0 < row["memory"]["ours"]["kept_over_inputs"] < 1
        assert {"y", "du", "dA"} <= row["errors at size"].keys()
    assert json.loads(json.dumps(record)) == record
    assert record["absent"] == {"VMamba": "not installed"}
    assert {"environment", "machine", "seeds", "gate", "precision", "host_microseconds"} <= record.keys()


def test_the_record_is_saved_after_every_shape(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_gpu, "find_peers", lambda: ({}, {}))
    monkeypatch.setattr(scan_gpu, "PRECISION_CASES", ())
    saved: list[int] = []
    scan_gpu.bench_scan_gpu(
        CPU, 0.0, quiet(), lambda r: saved.append(len(r["rows"])), TINY_CASES[:2], "portable", watch
    )
    assert saved == [1, 2]


@pytest.mark.parametrize("name", ["y", *(f"d{name}" for name in NAMES)])
def test_a_wrong_kernel_is_not_timed(name: str, watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TINY_CASES[0]
    with monkeypatch.context() as patched:
        patched.setattr(gate, "Ours", lambda arguments, backend: wrong(name)(arguments))
        with pytest.raises(BackendError, match=rf"is wrong at .*nothing is timed: {name} is off by"):
            gate.check_ours((case,), CPU, lambda _: "portable")
        if name not in ("dB", "dC"):
            with pytest.raises(BackendError, match=rf"is wrong at tiny: {name} is off by"):
                gate.check_at_size(case, case.arguments(CPU), "portable")
    with pytest.raises(BackendError, match=rf"computes something else \({name} is off by"):
        gate.check_peer("another", wrong(name), case, CPU)


def test_an_output_that_is_not_written_is_found() -> None:
    # The tests' own poison is off: the gate has its own.
    torch.use_deterministic_algorithms(False)

    class Lazy(Ours):
        def forward(self) -> Any:
            y, *others = super().forward()
            lazy = torch.empty_like(y)
            lazy[:, :-1] = y[:, :-1]
            return (lazy, *others)

    found = gate.errors(lambda arguments: Lazy(arguments, "portable"), TINY, CPU, gate.reference_on_cpu)
    assert math.isnan(found["y"])
    assert gate.problems(found, "bf16")
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_in_16_bits_are_those_of_rounding() -> None:
    for dtype in ("bf16", "fp16"):
        case = TINY._replace(dtype=dtype)
        found = gate.errors(portable, case, CPU, gate.reference_on_cpu)
        assert gate.problems(found, dtype) == []
        assert gate.problems(found, "fp32") != []
    assert gate.worse(1.0, float("nan"), 2.0) != gate.worse(1.0, 2.0)


def test_the_lowest_level_is_the_operator() -> None:
    for case in TINY_CASES:
        arguments = case.arguments(CPU)
        dy = gate.cotangent(arguments)
        got = results(portable(arguments), dy)
        leaves = {k: v.clone().requires_grad_() for k, v in arguments.items() if v is not None}
        with selective_scan.using("portable"):
            y = selective_scan(**public({**arguments, **leaves}))
        torch.testing.assert_close(got["y"], y.detach())
        assert got.keys() == {"y", *(f"d{name}" for name in leaves)}
        for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True):
            torch.testing.assert_close(got[f"d{name}"], grad)


def test_kept_bytes_are_those_of_the_checkpoints() -> None:
    arguments = TINY.arguments(CPU)
    assert kept_bytes(portable(arguments), arguments) == portable(arguments).forward()[2].nbytes
    assert kept_bytes(Ours(arguments, "portable", save=False), arguments) == 0


def test_floors_are_those_of_the_issue() -> None:
    # 3,004 GB/s and 132 multiprocessors at 1.75 GHz, 16 special functions a clock each.
    machine = Machine(3.004e12, 16 * 132 * 1.75e9)
    floors = {case.tag: forward_floor(case, machine) for case in CASES}
    byte_floors = {
        "lm": 0.090, "lm-3000": 0.131, "lm-4096": 0.179, "lm-500": 0.022, "lm-long": 0.359, "vim-t": 0.026,
        "vim-s-1248": 0.101, "ss2d-n16": 0.162, "vmamba-s1": 0.309, "vmamba-s2": 0.154, "vmamba-s3": 0.077,
        "series": 0.017, "series-720": 0.227, "lm-fp32": 0.179, "lm-n64": 0.091,
    }  # fmt: skip
    assert {tag: floors[tag].bytes_ms for tag in byte_floors} == pytest.approx(byte_floors, rel=0.03)
    assert floors["lm"].ms == floors["lm"].special_ms == pytest.approx(0.18, rel=0.02)
    assert floors["vmamba-s1"].ms == floors["vmamba-s1"].bytes_ms
    # 39 % of 0.936 ms was the share of a backward that forms the exponentials twice.
    assert backward_floor(CASES[0], machine, 0).ms == pytest.approx(0.39 * 0.936, rel=0.02)
    u, projections = 64 * 768 * 3136, 64 * 3136 * 4
    moved = 2 * (5 * u + 4 * projections) + 10**9
    assert backward_floor(CASES[12], machine, 10**9).bytes_ms == pytest.approx(1e3 * moved / 3.004e12)
    assert backward_floor(CASES[0], machine, 0).bytes_ms == pytest.approx(7 / 4 * floors["lm"].bytes_ms, rel=0.01)


def test_shapes_are_chosen_by_tag() -> None:
    assert [case.tag for case in chosen_cases("vim-t, lm")] == ["vim-t", "lm"]
    assert chosen_cases(None) == CASES
    with pytest.raises(ConfigError, match="Did you mean 'vim-t'"):
        chosen_cases("vim_t")
    assert len({case.tag for case in CASES}) == len(CASES)
    assert sum(not case.extra for case in CASES) == 19


def test_contenders_take_turns_and_their_inputs_in_turn(watch: Stopwatch) -> None:
    ran: list[tuple[str, int]] = []
    times = time_in_turn({name: lambda i, name=name: ran.append((name, i)) for name in "ab"}, 0.0, watch)
    assert times["a"].rounds == times["b"].rounds == 7
    for name in "ab":
        numbers = [i for each, i in ran if each == name]
        assert numbers == list(range(len(numbers)))
    assert Spread.of([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]) == Spread(3.0, 2.0, 4.0, 1.0, 5)
    assert Spread.of([1e-3]).median == 1.0


def test_the_summary_counts_the_shapes_that_count() -> None:
    rows = [
        {"tag": tag, "extra": extra, "ours_fwd_ms": 1.0, "peer_fwd_ms": fwd, "ours_bwd_ms": 2.0, "peer_bwd_ms": None}
        for tag, extra, fwd in (("a", False, 2.0), ("b", False, 8.0), ("c", True, 100.0))
    ]
    assert scan_table.summary(rows) == "forward: 4.00 times the peer over 2 shapes, least 2.00 (a)"
    assert scan_table.summary([]) == "no peer to compare with"


def test_tables_show_what_the_record_holds(record: Record) -> None:
    lines = scan_table.table(record["rows"]).splitlines()
    assert len(lines) == 2 + len(TINY_CASES)
    assert len({line.count("|") for line in lines}) == 1
    assert "| tiny-groups | 2, 8, 9, 1 (4) | bf16 |" in lines[3]
    assert lines[2:] == scan_table.table(record["rows"], header=False).splitlines()
    precision = scan_table.precision_table(record)
    assert [line.split(" | ")[:2] for line in precision.splitlines()[2:]] == [
        ["| bf16", "ours"], ["| bf16", "mamba_ssm"], ["| fp32", "ours"], ["| fp32", "mamba_ssm"],
    ]  # fmt: skip
    assert "ddelta_bias" in precision
    assert scan_table.memory_table(record).count("\n") == 1 + 2 * len(TINY_CASES)
    assert "forward with gradient" in scan_table.host_table(record)
