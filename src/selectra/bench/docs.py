"""Tables inside Markdown files, filled from the records that they name.

A table stands between `<!-- table KIND from PATTERN -->` and `<!-- end -->`. The pattern is a path relative to the
Markdown file and may hold `*`; of several records the newest counts, but for kinds that join all of them. Two patterns
are divided by a comma.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selectra.bench.block_table import block_table, model_table, norms_table, parts_table, ways_table
from selectra.bench.cpu_limit import limit_table
from selectra.bench.cpu_targets import cpu_target_table
from selectra.bench.cross import cross_table
from selectra.bench.length_table import findings, length_table
from selectra.bench.scan_table import host_table, memory_table, precision_table, summary, table
from selectra.bench.stack_table import (
    conv_table,
    cpu_parts_table,
    cpu_scan_table,
    stack_table,
    stream_table,
    threads_table,
)
from selectra.bench.start import start_table
from selectra.bench.targets import target_table
from selectra.bench.vision_results import (
    accuracy_table,
    against_table,
    attention_words,
    sources,
    stability_table,
    trainings_table,
    transfer_table,
    verdict,
)
from selectra.bench.vision_table import attention_table, einfft_table, growth_table, training_table
from selectra.bench.vision_targets import vision_target_table
from selectra.errors import ConfigError, DataError

MARK = re.compile(r"(<!-- table (\w+) from ([^>]+?) -->\n).*?(<!-- end -->)", re.S)
NO_RECORD = "No record yet."

TABLES: dict[str, Callable[..., str]] = {
    "scan": lambda record: f"{table(record['rows'])}\n\nGeometric means: {summary(record['rows'])}.",
    "precision": precision_table,
    "memory": memory_table,
    "host": host_table,
    "lengths": length_table,
    "findings": lambda record: "\n".join(f"- {line}" for line in findings(record)["words"]),
    "targets": target_table,
    "block": block_table,
    "ways": ways_table,
    "parts": parts_table,
    "norms": norms_table,
    "cross": cross_table,
    "model": model_table,
    "stack": stack_table,
    "stream": stream_table,
    "cpu_parts": cpu_parts_table,
    "cpu_scan": cpu_scan_table,
    "cpu_limits": limit_table,
    "cpu_conv": conv_table,
    "cpu_threads": threads_table,
    "cpu_targets": cpu_target_table,
    "start": start_table,
    "vision_training": training_table,
    "vision_attention": attention_table,
    "vision_growth": growth_table,
    "vision_einfft": einfft_table,
    "vision_claim": attention_words,
    "vision_transfer": transfer_table,
    "vision_stability": stability_table,
    "source": lambda record: f"`{record['command']}`, {record['date']}, {_versions(record)}.",
}

# Of all records that fit, not of the newest alone.
JOINED: dict[str, Callable[..., str]] = {
    "vision_accuracy": accuracy_table,
    "vision_against": against_table,
    "vision_verdict": verdict,
    "vision_trainings": trainings_table,
    "vision_targets": vision_target_table,
    "sources": sources,
}


def filled(text: str, folder: Path) -> str:
    """The text with every table as its records give it.

    Args:
        folder: Where the Markdown file lies.

    Raises:
        ConfigError: A table of an unknown kind.
    """

    def fill(match: re.Match[str]) -> str:
        start, kind, patterns, end = match.groups()
        if kind not in TABLES and kind not in JOINED:
            raise ConfigError(f"there is no table '{kind}'; there are {', '.join([*TABLES, *JOINED])}.")
        places = [pattern.strip() for pattern in patterns.split(",")]
        if kind in JOINED:
            every = [record for pattern in places for record in matching(folder, pattern)]
            body = JOINED[kind](*every) if every else NO_RECORD
        else:
            records = [newest(folder, pattern) for pattern in places]
            body = NO_RECORD if records[0] is None else TABLES[kind](*records)
        return f"{start}\n{body}\n\n{end}"

    return MARK.sub(fill, text)


def newest(folder: Path, pattern: str) -> dict[str, Any] | None:
    """The record of the latest date among the files that fit, or None where there is none."""
    return max(matching(folder, pattern), key=lambda record: record["date"], default=None)


def matching(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """All records that fit, by name."""
    start, name = (folder / pattern).parent, Path(pattern).name
    return [read_record(path) for path in sorted(start.glob(name))]


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        DataError: It is absent or damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' is no record of `selectra bench`: {error}") from error
    if not isinstance(record, dict) or not ("benchmark" in record or "what" in record):
        raise DataError(f"'{path}' is no record of `selectra bench`; it says no benchmark.")
    return record


def _versions(record: dict[str, Any]) -> str:
    facts = record["environment"]
    gpus = facts["hardware"]["gpus"]
    where = gpus[0] if record["device"].startswith("cuda") and gpus else facts["hardware"]["processor"]
    peers = [f"{name} {p if isinstance(p, str) else p['version']}" for name, p in record.get("peers", {}).items()]
    if "instruction set" in record:
        threads = facts["hardware"]["threads"]
        where += f", {threads} thread{'s' if threads > 1 else ''}, {record['instruction set']}"
    return ", ".join([where, f"PyTorch {facts['versions']['torch']}", *peers])
