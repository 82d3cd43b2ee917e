"""A deep stack against a Transformer on a CPU: checked, timed in turn, and told in tables."""

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from selectra.bench import cpu_parts, cpu_targets, docs, stack, stack_table, stream, timing
from selectra.errors import BackendError
from selectra.mixers import S6

CPU = torch.device("cpu")
STUDY = stack.StackStudy(32, 16, 4, 2, (5, 8), (3, 6))


def quiet() -> Console:
    return Console(quiet=True)


def test_the_stacks_have_equal_parameters() -> None:
    study = stack.StackStudy()
    with torch.device("meta"):
        count = sum(p.numel() for p in stack.MambaStack(study.d_model, study.depth).parameters())
        transformer = stack.TransformerStack(study.d_model, study.head_size, study.layers, count)
    assert 2.9e6 < count < 3.1e6
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(count, rel=0.02)


def test_bench_stack_records_every_length() -> None:
    record = stack.bench_stack(CPU, 0.0, quiet(), lambda r: None, STUDY)
    assert [row["L"] for row in record["rows"]] == [5, 8]
    assert set(record["gate"]) == {"mamba", "transformer"}
    assert len({line.count("|") for line in stack_table.stack_table(record).splitlines()[:4]}) == 1


def test_bench_stream_records_every_position() -> None:
    record = stream.bench_stream(CPU, 0.0, quiet(), lambda r: None, STUDY)
    assert [row["position"] for row in record["rows"]] == [3, 6]
    assert all(row["mamba"]["rounds"] == 2 * stream.TIMED for row in record["rows"])
    assert len({line.count("|") for line in stack_table.stream_table(record).splitlines()}) == 1


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = stack.MambaStack.step
    monkeypatch.setattr(stack.MambaStack, "step", lambda self, x, states: 1.001 * step(self, x, states))
    with pytest.raises(BackendError, match="mamba is wrong step by step"):
        stream.bench_stream(CPU, 0.0, quiet(), lambda r: None, STUDY)


def test_the_table_of_stacks_says_from_where_on() -> None:
    def row(length: int, ratio: float) -> dict[str, Any]:
        times = {"mamba": {"median": 0.001}, "transformer": {"median": 0.001 * ratio}, "ratio": ratio}
        return {"L": length, "forward": times, "training": times | {"ratio": 0.5}}

    rows = [row(196, 1.1), row(512, 0.9), row(1024, 1.25), row(2048, 2.0)]
    text = stack_table.stack_table({"rows": rows, "parameters": {"mamba": 3_000_000, "transformer": 3_010_000}})
    assert "| 1,024 | 1.0 | 1.2 | 1.25 | 1.0 | 1.2 | 0.50 |" in text
    assert "Forward, Mamba is faster from 1,024 tokens on; training, Mamba is faster at no length." in text


def test_pairs_are_timed_in_turn() -> None:
    order: list[str] = []
    found = timing.paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0)
    assert found["a"]["rounds"] == found["b"]["rounds"] >= 2 and found["ratio"] > 0
    assert order[:2] == ["a", "b"]


def test_the_parts_of_a_block_add_up() -> None:
    mixer, x = S6(32), torch.randn(1, 40, 32)

    def run() -> Tensor:
        y = mixer(x)
        return torch.autograd.grad(y.sum(), list(mixer.parameters()))[0]

    parts = cpu_parts.cpu_parts(mixer, run, calls=3)
    assert sum(time for part, time in parts.items() if part != "all") == pytest.approx(parts["all"])
    assert all(parts[part] > 0 for part in ("in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj"))


def test_bench_cpu_parts_records_every_size() -> None:
    sizes = (cpu_parts.Size(16, 5), cpu_parts.Size(16, 9))
    record = cpu_parts.bench_cpu_parts(CPU, 0.0, quiet(), lambda r: None, sizes)
    assert [row["length"] for row in record["rows"]] == [5, 9]
    assert "| part | d 16, L 5 | d 16, L 9 |" in docs.TABLES["cpu_parts"](record)


def test_the_table_of_scans_compares_with_the_best_other() -> None:
    def row(name: str, n: int, milliseconds: float) -> dict[str, Any]:
        times = {"median": milliseconds / 1e3}
        return {"shape": {"b": 1, "d": 2, "l": 3, "n": n}, "name": name, "forward": times, "training": times}

    rows = [row("cpu", 4, 2), row("mambapy pscan", 4, 60), row("transformers loop", 4, 20), row("cpu", 8, 1)]
    rows.append(row("mambapy pscan", 8, 30))
    lines = stack_table.cpu_scan_table({"rows": rows}).splitlines()
    assert lines[0] == "| forward / training step, ms | (1, 2, 3, 4) | (1, 2, 3, 8) |"
    assert lines[4] == "| transformers loop | 20.0 / 20.0 | not run |"
    assert lines[5] == "| best other / `cpu` | 10 / 10 | 30 / 30 |"


def test_the_tables_of_convolution_and_threads_have_a_line_a_shape() -> None:
    times = {"ours": 2.0, "channels last": 9.0, "channels first": 7.0}
    row = {"shape (b, l, d)": [1, 2, 3]} | {f"{kind}, ms": times for kind in ("forward", "training")}
    record = {"rows": [row | {"forward, ratio": 3.5, "training, ratio": 3.4}]}
    assert docs.TABLES["cpu_conv"](record).splitlines()[2] == "| (1, 2, 3) | 2.00 | 7.00 | 3.50 | 2.00 | 7.00 | 3.40 |"
    found = {"one thread, ms": 4.0, "4 threads, ms": 2.0, "ratio": 1.9, "ratio of the fastest": 2.0}
    lines = docs.TABLES["cpu_threads"](
        {"rows": [{"shape (b, d, l, n)": [1, 2, 3, 4], "forward": found, "backward": found}]}
    ).splitlines()
    assert lines[0] == "| shape (b, d, l, n) | forward, ms | 4 threads | ratio | backward, ms | 4 threads | ratio |"
    assert lines[2] == "| (1, 2, 3, 4) | 4.00 | 2.00 | 1.90 | 4.00 | 2.00 | 1.90 |"


def test_cpu_targets_are_judged_by_the_records() -> None:
    def scan(n: int, other: float) -> list[dict[str, Any]]:
        shape = {"b": 1, "d": 2, "l": 3, "n": n}
        return [
            {"shape": shape, "name": name, **{kind: {"median": time} for kind in ("forward", "training")}}
            for name, time in (("cpu", 1.0), ("mambapy pscan", other))
        ]

    times = {"parts_ms": {"in_proj": 3.0, "x_proj": 1.0, "dt_proj": 1.0, "out_proj": 1.0, "scan": 2.0, "all": 8.0}}
    parts = {"rows": [{"d_model": 192, "length": 196, "forward": times, "training": times}]}
    rows = [{"L": n, "forward": {"ratio": 1}, "training": {"ratio": ratio}} for n, ratio in ((512, 0.8), (1024, 1.2))]
    tokens = [{"position": n, "mamba": {"median": t, "fastest": t}} for n, t in ((10, 9e-4), (1000, 1.2e-3))]
    table = cpu_targets.cpu_target_table(
        {"rows": scan(16, 61) + scan(1, 10)}, {"rows": scan(16, 30)}, parts, {"rows": rows}, {"rows": tokens}
    )
    found = {cells[0]: cells[2:] for cells in (line.strip("| ").split(" | ") for line in table.splitlines()[2:])}
    assert found["forward against the best other package, N = 16"] == ["61 (1, 2, 3, 16)", "yes"]
    assert found["forward against the best other package, N = 1"][1] == "no"
    assert found["training against the best other package, N = 1"][1] == "yes"
    assert found["training against the best other package, N = 16, forced to AVX2"][1] == "no"
    assert found["products' share of an S6 block, forward"] == ["75% (d 192, L 196)", "yes"]
    assert found["training step, Mamba faster than the Transformer"] == ["from 1,024 tokens on", "yes"]
    assert found["one token, any position, median"] == ["1.20 ms (fastest round 1.20)", "no"]
    assert found["the last position over the first"] == ["1.33", "no"]
