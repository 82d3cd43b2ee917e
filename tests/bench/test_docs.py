"""Tables and pictures made from records: the documents hold what the records give."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selectra.bench import docs, targets
from selectra.cli import main
from selectra.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
]
Record = dict[str, Any]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_the_documents_are_those_of_the_records(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert docs.filled(text, path.parent) == text, f"run: selectra bench tables {path.relative_to(ROOT)}"


def scan_record(date: str = "2026-01-02", ours: float = 1.0) -> Record:
    row = {
        "tag": "lm", "B": 8, "D": 2048, "L": 2048, "N": 16, "groups": 1, "dtype": "bf16", "gate": True, "extra": False,
        "ours_fwd_ms": ours, "ours_bwd_ms": ours, "peer": "mamba_ssm", "peer_fwd_ms": 4.0, "peer_bwd_ms": 2.0,
        "floor_fwd_ms": 0.8, "floor_bwd_ms": 0.4, "others": {},
        "memory": {"ours": {"kept_over_inputs": 0.3, "peak_bytes": 10}, "mamba_ssm": {"peak_bytes": 9}},
    }  # fmt: skip
    facts = {"hardware": {"gpus": ["A GPU"]}, "versions": {"torch": "2"}}
    errors = {"y": {name: {"largest": 1e-3, "rms": 1e-3} for name in ("ours", "mamba_ssm")}}
    errors["du"] = {"ours": {"largest": 1e-3, "rms": 2e-3}, "mamba_ssm": {"largest": 1e-3, "rms": 1e-3}}
    host = {"forward without gradient": 30.0, "forward with gradient": 70.0}
    return {
        "benchmark": "scan_gpu", "command": "selectra bench scan", "date": date, "device": "cuda", "rows": [row],
        "environment": facts, "precision": [{"dtype": "bf16", "errors": errors}], "host_microseconds": host,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for date, ours in (("2026-01-02", 1.0), ("2026-01-03", 2.0)):
        (tmp_path / f"scan_{date}.json").write_text(json.dumps(scan_record(date, ours)))
    yield tmp_path


def test_a_table_is_made_from_the_newest_record_and_only_there(folder: Path) -> None:
    text = "before\n<!-- table scan from scan_*.json -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    made = docs.filled(text, folder)
    assert made.startswith("before\n<!-- table scan from scan_*.json -->\n\n| shape |")
    assert made.endswith("<!-- end -->\nafter <!-- end -->\n")
    assert "old" not in made and "| 2.000 | 0.800 | 40% |" in made
    assert docs.filled(made, folder) == made
    assert "forward: 2.00 times the peer over 1 shapes" in made


def test_without_a_record_the_table_says_so(folder: Path) -> None:
    assert docs.NO_RECORD in docs.filled("<!-- table scan from none_*.json -->\n<!-- end -->", folder)


def test_what_cannot_be_filled_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no table 'scam'"):
        docs.filled("<!-- table scam from scan_*.json -->\n<!-- end -->", folder)
    (folder / "broken.json").write_text("{")
    (folder / "other.json").write_text("{}")
    for name in ("broken.json", "other.json", "absent.json"):
        with pytest.raises(DataError, match="is no record"):
            docs.read_record(folder / name)


def test_targets_are_judged_by_the_record() -> None:
    lengths = {
        "rows": [
            {
                "L": n,
                "fwd_ms": {"ours": n, "attention": n * n / 3600},
                "train_ms": {"ours": n, "attention": n * n / 4000},
            }
            for n in (1000, 1001, 4000, 8000)
        ]
    }
    lines = targets.target_table(scan_record(), lengths).splitlines()[2:]
    found = {cells[0]: (cells[2], cells[3]) for cells in (line.strip("| ").split(" | ") for line in lines)}
    assert found["forward against the peer, geometric mean"] == ("4.00", "yes")
    assert found["backward against the peer, every shape"] == ("2.00 (lm)", "no")
    assert found["forward share of the floor, bf16 from 4 M elements on"] == ("80% (lm)", "yes")
    assert found["backward share of its own floor, lm"] == ("40% (lm)", "no")
    assert found["bf16 gradients' error over mamba_ssm's, root mean square"] == ("2.000 times (du)", "no")
    assert found["kept for the backward over the inputs, N = 16 and 64"] == ("0.300 (lm)", "yes")
    assert found["peak of a training step with gate over mamba_ssm's"] == ("1.11 times (lm)", "no")
    assert found["host time, forward without gradient"] == ("30.0", "yes")
    assert found["host time, forward with gradient"] == ("70.0", "no")
    assert found["faster than FlashAttention, forward"] == ("3,600 tokens", "no")
    assert found["faster than FlashAttention, training step"] == ("4,000 tokens", "yes")
    assert found["L + 1 against L, forward"] == ("+0.1% (L = 1,000)", "yes")
    assert "float32 gradients against float64" not in found


def test_float32_targets_look_at_the_benchmarked_sizes_too() -> None:
    error = {"ours": {"largest": 1e-7, "rms": 1e-7}}
    record = scan_record() | {"precision": [{"dtype": "fp32", "errors": {"y": error, "du": error}}]}
    record["rows"] = [row | {"dtype": "fp32", "errors at size": {"y": 2e-6, "du": 3e-6}} for row in record["rows"]]
    table = targets.target_table(record, None)
    assert "| float32 output against float64 | at most 1e-6 | 2.0e-06 | no |" in table
    assert "| float32 gradients against float64 | at most 5e-6 | 3.0e-06 | yes |" in table


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


def test_bench_tables_fills_a_file(folder: Path) -> None:
    path = folder / "page.md"
    path.write_text("<!-- table scan from scan_*.json -->\n<!-- end -->\n")
    assert run("bench", "tables", path) == 0
    assert "| lm | 8, 2048, 2048, 16 | bf16 z |" in path.read_text()
    assert run("bench", "tables", folder / "absent.md") == 2


def test_bench_plot_takes_a_record_of_lengths(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"ours": 1.0, "attention": 2.0}
    record = scan_record() | {
        "benchmark": "lengths",
        "rows": [{"L": n, "fwd_ms": times, "train_ms": times} for n in (8, 16)],
        "study": {"d_model": 64, "batch": 1, "dtype": "bf16"},
    }
    (folder / "lengths.json").write_text(json.dumps(record))
    assert run("bench", "plot", folder / "lengths.json", "--out", folder / "picture.png") == 0
    assert (folder / "picture.png").read_bytes()[1:4] == b"PNG"
    for words, said in (
        ((folder / "lengths.json",), "give both files"),
        ((folder / "scan_2026-01-02.json", "--out", folder / "x.png"), "pictures are made from `bench lengths`"),
    ):
        assert run("bench", "plot", *words) == 2
        assert said in capsys.readouterr().err
    assert not (folder / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scan", "--device", "cpu", "--tags", "lm"), "--tags chooses among the shapes of a GPU"),
        (("block", "--tags", "lm"), "--tags has nothing to choose from"),
        (("stack", "--tags", "lm"), "--tags has nothing to choose from"),
        (("stream", "--tags", "lm"), "--tags has nothing to choose from"),
        (("lengths", "--device", "cpu"), "needs a CUDA device"),
        (("scan", "record.json"), "takes no file"),
        (("scan", "--out", "a", "--record", "b.json"), "give one of them"),
        (("model", "--tags", "tsm3", "--device", "cpu"), "there is no model 'tsm3'"),
    ],
)
def test_settings_without_effect_are_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bench", *words) == 2
    assert said in capsys.readouterr().err


def test_a_record_says_its_command_and_its_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["selectra", "bench", "model"])
    path = tmp_path / "new" / "model.json"
    words = ("bench", "model", "--device", "cpu", "--seconds", 0, "--tags", "dlinear_smoke", "--record", path)
    assert run(*words) == 0
    record = json.loads(path.read_text())
    assert (record["command"], record["benchmark"], record["device"]) == ("selectra bench model", "model", "cpu")
    assert docs.newest(tmp_path, "new/*.json") == record
