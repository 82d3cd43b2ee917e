"""The page on language models: made from records alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from selectra.errors import DataError
from selectra.report.decoding import size
from selectra.report.language import NO_RECORD, SECTIONS, page, write_page
from selectra.report.language_study import _targets

ROOT = Path(__file__).parents[2]
MADE_BY = {"command": "python results/x.py", "date": "2026-01-02", "device": "a GPU", "torch": "2.0"}


def row(context: int, **more: Any) -> dict[str, Any]:
    return {
        "context": context, "ms_per_token": 1.0, "over_floor": 1.25, "state_bytes": 2048, "allocated_bytes": 4096,
        "prefill_seconds": 0.5, "prefill_peak_bytes": 3 * 2**30, **more,
    }  # fmt: skip


def decode(over_floor: float = 1.25, allocated: int = 4096) -> dict[str, Any]:
    rows = [row(1024), row(4096, over_floor=over_floor, allocated_bytes=allocated)]
    models = {
        "mamba_lm_1b4": {"weight_bytes": 2**30, "floor_ms": 0.8, "rows": rows},
        "gpt_1b3": {"weight_bytes": 2**30, "floor_ms": 0.8, "rows": rows[:1]},
    }
    theirs = {"version": "5.0", "ways": {"generate": 40.0}}
    return {**MADE_BY, "copy_bytes_per_second": 3e12, "models": models, "ways": {"eager": 9.0}, "transformers": theirs}


def put(folder: Path, name: str, record: object) -> None:
    (folder / name).write_text(json.dumps(record))


def test_a_page_without_records_says_so(tmp_path: Path) -> None:
    assert page(tmp_path).count(NO_RECORD) == len(SECTIONS)


def test_targets_are_met_or_missed_by_the_record(tmp_path: Path) -> None:
    put(tmp_path, "decode_a.json", decode())
    text = page(tmp_path)
    assert "Target met: a token takes 1.25 times" in text and "constant." in text and "not constant" not in text
    assert "| Mamba, 1.4 B | 4,096 | 1.000 | 1,000 | 1.25 | 2 KiB | 4 KiB | 8,192 | 3 GiB |" in text
    assert "| `transformers` 5.0: generate | 40.000 | 25 | 50.00 |" in text
    put(tmp_path, "decode_b.json", decode(over_floor=1.31, allocated=5000) | {"date": "2026-01-03"})
    text = page(tmp_path)
    assert "Target missed: a token takes 1.31 times" in text and "not constant" in text


def test_the_cache_is_held_to_its_arithmetic(tmp_path: Path) -> None:
    rows = [
        row(n, room=n + 64, attention_bytes=(n + 64) * 4096, other_state_bytes=7, decode_peak_bytes=(n + 64) * 4096 + 9)
        for n in (4096, 262144)
    ]
    model = {"parameters": 12.8e9, "active_parameters": 3e9, "rows": rows}
    record = {**MADE_BY, "chunk": 2048, "cache_bytes_per_token": 4096, "models": {"jamba": model}}
    put(tmp_path, "jamba_a.json", record)
    text = page(tmp_path)
    assert "cache is 4 KiB for each position" in text and "differs by 0 B" in text and "**not**" not in text
    rows[0]["attention_bytes"] += 1
    put(tmp_path, "jamba_a.json", record)
    assert "cache is **not** 4 KiB" in page(tmp_path)


def test_accuracies_by_length_say_how_long_was_trained(tmp_path: Path) -> None:
    rows = [
        {
            "variant": variant, "base": base, "mean": mean, "interval": mean and [mean, mean],
            "values": {"0": mean, "1": mean} if mean else {}, "cost": {"parameters": 4100}, "missing": missing,
        }
        for variant, base, mean, missing in (
            ("gpt", "8 pairs", 0.99, []), ("gpt", "16 pairs", 0.5, [2]), ("mamba", "8 pairs", 0.25, []),
            ("mamba", "16 pairs", None, [0, 1, 2]),
        )
    ]  # fmt: skip
    bases = [{"train": {"batch_size": 64}, "optim": {"lr": 0.004}}] * 2
    study: dict[str, Any] = {"bases": bases, "tuning": None}
    cells = [{"steps": 1500, "test": {}}, {"steps": 9}]
    record = {**MADE_BY, "verdict": {"text": "Lost."}, "rows": rows, "study": study, "cells": cells,
              "higher_is_better": True}  # fmt: skip
    put(tmp_path, "language_recall_a.json", record)
    text = page(tmp_path)
    assert "| gpt | 4,100 | 0.990 (0.990 to 0.990) | 0.500 (0.500 to 0.500) |" in text and "| 0.250 (" in text
    assert "for 1,500 steps of 64 examples;" in text and "the same learning rate, 0.004:" in text
    assert "Not all seeds were trained within the time: gpt on 16 pairs, mamba on 16 pairs." in text
    study["tuning"] = {"values": {"optim.lr": [0.002, 0.004]}, "trials": 0}
    put(tmp_path, "language_recall_a.json", record)
    assert "Each has the one of 2 learning rates that is best on validation, with a seed that is not" in page(tmp_path)
    study["tuning"]["repeats"] = 2
    other = {**record, "verdict": {"text": "An earlier one."}, "date": "2025-01-01"}
    put(tmp_path, "language_recall_a.json", record)
    put(tmp_path, "language_recall_b.json", other)
    text = page(tmp_path)
    assert text.count("with 2 seeds that are not scored") == 2
    # Studies of memory are all shown, the latest first.
    assert text.index("Lost.") < text.index("An earlier one.")


def test_differences_say_which_hold_after_correction() -> None:
    def target(on: str, p_adjusted: float) -> dict[str, Any]:
        return {"model": "mamba", "rival": "gpt", "on": on, "difference": -0.1, "low": -0.15, "high": -0.05, "p": 0.01,
                "p_adjusted": p_adjusted, "outcome": "below"}  # fmt: skip

    verdict = {"rival": "gpt", "p": 0.02, "p_adjusted": 0.08, "outcome": "level"}
    record = {"error_rate": 0.05, "subject": "hybrid", "overall": [verdict, {"rival": "rwkv"}],
              "targets": [target("val", 0.04), target("test", 0.06), {"outcome": "too few seeds"}]}  # fmt: skip
    _, table, words = _targets(record)
    lines = table.splitlines()
    assert lines[2].endswith("| 0.0100 | 0.0400 | lower |")
    assert lines[3].endswith("| 0.0100 | 0.0600 | no difference; lower alone |")
    assert "for the 2 comparisons of this table" in words
    assert "hybrid against 2 rivals" in words and "gpt has p 0.0200 alone and 0.0800 corrected" in words
    assert words.endswith("which is no difference.")


@pytest.mark.parametrize(
    ("record", "words"),
    [("{", "cannot be read"), ('{"date": "2026"}', "command, device"), (json.dumps(MADE_BY), "lacks what its section")],
)
def test_bad_records_are_named(tmp_path: Path, record: str, words: str) -> None:
    (tmp_path / "decode_a.json").write_text(record)
    with pytest.raises(DataError, match=words):
        write_page(tmp_path, tmp_path / "out.md")


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**29, 2**40)] == ["0 B", "1023 B", "1 KiB", "1.5 GiB", "1024 GiB"]


def test_the_page_in_the_repository_is_that_of_its_records() -> None:
    assert (ROOT / "docs" / "results" / "language.md").read_text() == page(ROOT / "results")
