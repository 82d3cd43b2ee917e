"""Time against length: the record, what it says, its picture."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.bench import length_table, lengths
from selectra.bench.events import Stopwatch
from selectra.bench.length_plot import length_figure
from selectra.errors import BackendError

CPU = torch.device("cpu")
STUDY = lengths.Study(64, 1, (4, 5, 9, 12), longest_peer=9)
Record = dict[str, Any]


def made(times: dict[int, dict[str, float]]) -> Record:
    """A record with the same times forward and in training."""
    rows = [{"L": length, "fwd_ms": found, "train_ms": found} for length, found in times.items()]
    facts = {"hardware": {"gpus": ["A GPU"]}}
    study = {"d_model": 64, "batch": 1, "dtype": "bf16"}
    return {"benchmark": "lengths", "rows": rows, "device": "cuda", "environment": facts, "study": study}


def square_and_line(scan: float, lengths: tuple[int, ...]) -> Record:
    """Attention takes L^2, a scan `scan` L."""
    return made({n: {"attention": float(n * n), "ours": scan * n, "mamba_ssm": 2 * scan * n} for n in lengths})


def measured(monkeypatch: pytest.MonkeyPatch, backend: str = "portable") -> Record:
    watch = Stopwatch(CPU, copy_bytes=1 << 16)
    return lengths.bench_lengths(CPU, 0.0, Console(quiet=True), lambda r: None, STUDY, backend, watch)


def test_the_record_has_scans_at_every_length_and_attention_up_to_its_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(monkeypatch)
    assert [row["L"] for row in record["rows"]] == [4, 5, 9, 12]
    for row in record["rows"]:
        assert row["fwd_ms"]["ours"] > 0 and row["train_ms"]["ours"] > 0
        assert ("attention" in row["fwd_ms"]) == (row["L"] <= 9)
        assert row["spread"]["train"]["ours"]["rounds"] >= 7
    assert "attention, cuDNN" in record["absent"]
    assert json.loads(json.dumps(record["rows"])) == record["rows"]
    assert record["findings"]["words"]


def test_a_wrong_scan_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lengths.gate.AT_MOST, "bf16", {"y": 0.0, "gradient": 0.0, "parameter": 0.0})
    with pytest.raises(BackendError, match="nothing is timed"):
        measured(monkeypatch)


def test_the_crossover_lies_where_the_lines_meet() -> None:
    record = square_and_line(3000, (512, 1000, 2048, 4096, 8192))
    assert length_table.crossover(record, "fwd") == pytest.approx(3000)
    assert length_table.crossover(record, "train", "mamba_ssm") == pytest.approx(6000)
    assert length_table.crossover(square_and_line(10_000, (512, 4096)), "fwd") is None
    assert length_table.crossover(square_and_line(100, (512, 4096)), "fwd") == 512
    assert length_table.crossover(made({512: {"ours": 1.0}}), "fwd") is None


def test_an_odd_length_that_is_slow_again_moves_the_crossover() -> None:
    record = square_and_line(3000, (1000, 2048, 4096, 8192))
    record["rows"].append({"L": 4097, "fwd_ms": {"attention": 1.0, "ours": 1.5}, "train_ms": {}})
    found = length_table.crossover(record, "fwd")
    assert found is not None and 4097 < found < 8192


def test_neighbours_and_time_per_token() -> None:
    record = made({n: {"ours": float(t)} for n, t in ((1000, 10), (1001, 11), (4096, 40), (4097, 39), (65536, 704))})
    assert length_table.neighbours(record, "fwd") == {1000: 1.1, 4096: 0.975}
    assert length_table.farthest(length_table.neighbours(record, "fwd")) == (1000, 1.1)
    assert length_table.per_token(record, "fwd") == pytest.approx(1.1)
    assert length_table.per_token(made({4096: {"ours": 1.0}}), "fwd") is None


def test_every_length_of_the_study_that_stands_for_a_pair_has_its_partner() -> None:
    pairs = [(a, b) for a in lengths.Study().lengths for b in lengths.Study().lengths if b == a + 1]
    assert len(pairs) >= 10
    assert {(2047, 2048), (2048, 2049), (4095, 4096), (4096, 4097), (3000, 3001)} <= set(pairs)
    assert {length_table.SHORT, length_table.LONG} <= set(lengths.Study().lengths)


def test_the_picture_shows_every_line_and_marks_the_crossovers(tmp_path: Path) -> None:
    figure = length_figure(square_and_line(3000, (512, 1000, 2048, 4096, 8192)))
    assert len(figure.axes) == 2
    for ax in figure.axes:
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert {text.get_text().strip() for text in ax.texts} == {"3,000", "6,000"}
        assert sum(len(line.get_xydata()) == 5 for line in ax.lines) == 3  # pyright: ignore[reportArgumentType]
    figure.savefig(tmp_path / "picture.png")


def test_the_table_has_a_dash_where_nothing_was_measured() -> None:
    table = length_table.length_table(made({512: {"ours": 1.0, "attention": 2.0}, 65536: {"ours": 128.0}}))
    assert table.splitlines()[2:] == ["| 512 | 1.000 / 1.000 | 2.000 / 2.000 |", "| 65,536 | 128.00 / 128.00 | - |"]
    assert not math.isnan(length_table.farthest({1: 1.0})[1])
