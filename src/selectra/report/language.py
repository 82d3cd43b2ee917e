"""The page of what language models were measured at, in Markdown, from the records in a folder.

Every kind of record has a section; of several records of a kind the one of the latest date counts, of studies of memory
all, which have models of other sizes, and a kind without one says so. A record is a JSON object with `command`, `date`
and `device`, beside what its section reads.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from selectra.errors import DataError
from selectra.report.decoding import decoding, jamba
from selectra.report.language_study import losses, scores
from selectra.report.read import whole

NO_RECORD = "No record yet: this was not run."
INTRODUCTION = (
    "# Language: what was measured\n\n"
    "Made by `selectra report results --out docs/results/language.md` from the records that it names; nothing is "
    "written by hand. What a section lacks was not run.\n\n"
    "What is exact is tested, not recorded: logits (float64, to 1e-9), 200 greedy tokens with a cache, left padding, "
    "the loss of routers and files both ways against `transformers`' Mamba, Mamba-2, Jamba and RWKV with random "
    "weights (`pytest tests/models/test_transformers.py`), and stored outputs and gradients of official code "
    "(`pytest tests/models/test_language_golden.py`)."
)


class Section(NamedTuple):
    """What is shown of one kind of record."""

    title: str
    pattern: str
    """File names of the records."""
    lines: Callable[[dict[str, Any]], Iterator[str]]
    """The paragraphs of a record."""
    every: bool = False
    """Whether all records are shown, the latest first."""


SECTIONS = (
    Section("Decoding one token at a time", "decode_*.json", decoding),
    Section("One block of Jamba at published sizes", "jamba_*.json", jamba),
    Section("Tiny Shakespeare: six families at one budget", "language_shakespeare_*.json", losses),
    Section("Copying by length", "language_copying_*.json", scores, every=True),
    Section("Recall by number of pairs", "language_recall_*.json", scores, every=True),
)


def write_page(folder: Path, out: Path) -> None:
    """Write the page from the records in a folder.

    Raises:
        DataError: A record is damaged or lacks what its section shows.
    """
    text = page(folder)
    with whole(out) as partial:
        partial.write_text(text, encoding="utf-8")


def page(folder: Path) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        parts.append(f"## {section.title}")
        paths = latest(folder, section.pattern)
        if not paths:
            parts.append(NO_RECORD)
        for path in paths if section.every else paths[:1]:
            record = read_record(path)
            try:
                parts += section.lines(record)
            except (KeyError, TypeError, IndexError) as error:
                raise DataError(f"'{path}' lacks what its section shows: {type(error).__name__} {error}.") from error
            parts.append(_source(record, path))
    return "\n\n".join(parts) + "\n"


def latest(folder: Path, pattern: str) -> list[Path]:
    """The records, those of the latest date first."""
    return sorted(folder.glob(pattern), key=lambda path: (read_record(path)["date"], path.name), reverse=True)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        DataError: It is damaged, or does not say what made it.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as a record: {error}.") from error
    lacking = [name for name in ("command", "date", "device") if not isinstance(record, dict) or name not in record]
    if lacking:
        raise DataError(f"'{path}' is no record: it does not say its {', '.join(lacking)}.")
    return record


def _source(record: dict[str, Any], path: Path) -> str:
    versions = [f"{name} {record[key]}" for key, name in (("torch", "PyTorch"),) if key in record]
    where = ", ".join([f"`{record['command']}`", record["date"], record["device"], *versions])
    return f"From [`results/{path.name}`](../../results/{path.name}): {where}."
