"""`selectra compare costs`: the record of cost curves, made or gone on with."""

import json
import shlex
import sys
import time
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from selectra.compare.curves import FORMAT, WHAT, Wish, measure_curves
from selectra.errors import DataError
from selectra.train.checkpoint import replacing
from selectra.train.parallel import pick_device


def compare_costs(wish: Wish, store: Path, device: str, time_limit: float | None, console: Console) -> dict[str, Any]:
    """Measure what the record lacks, and write it after every row.

    Raises:
        DataError: The file is something else.
    """
    if not store.parent.is_dir():
        raise DataError(f"the folder '{store.parent}' does not exist; make it, or name another file.")
    before = read_costs(store) if store.exists() else None
    until = inf if time_limit is None else time.monotonic() + time_limit
    stamp = {"command": shlex.join(["selectra", *sys.argv[1:]]), "date": datetime.now(UTC).strftime("%Y-%m-%d")}

    def save(record: dict[str, Any]) -> None:
        with replacing(store) as partial:
            partial.write_text(json.dumps({**stamp, **record}, indent=1) + "\n", encoding="utf-8")

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    asked = Wish(wish.kinds, wish.models, wish.params, wish.points, wish.seconds, until)
    return {**stamp, **measure_curves(asked, pick_device(device), save, say, before)}


def read_costs(path: Path) -> dict[str, Any]:
    """A record of cost curves.

    Raises:
        DataError: It is absent, damaged, of something else, or of another version.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as a record of costs: {error}.") from error
    if not isinstance(content, dict) or content.get("what") != WHAT:
        raise DataError(f"'{path}' holds no cost curves; name another file with --store.")
    if content.get("format") != FORMAT:
        raise DataError(f"'{path}' has version {content.get('format')} of the records' format, and this is {FORMAT}.")
    return content
