"""Read the folder of a forecast job."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from selectra.errors import DataError

# A unit at the end of a name, as in "T (degC)".
UNIT = re.compile(r"\s*[(\[]([^()\[\]]*)[)\]]$")


@dataclass(frozen=True)
class Result:
    """What a forecast job left behind.

    `recent` holds the last rows of the data with what each model forecast for them, `future` the rows beyond.
    """

    metrics: list[dict[str, Any]]
    errors: dict[str, Any]
    run: dict[str, Any]
    future: pd.DataFrame
    recent: pd.DataFrame

    @property
    def models(self) -> list[str]:
        """Models in the order of the job; the first is the main one."""
        return [row["model"] for row in self.metrics]

    @property
    def best(self) -> str:
        """The model with the lowest MSE."""
        return min(self.metrics, key=lambda row: row["mse"])["model"]

    @property
    def levels(self) -> list[float]:
        """The intervals that were forecast, in per cent, rising; none in an older folder."""
        return sorted(level for level in self.run["job"].get("level", []) if self.bound("lo", level) in self.future)

    def bound(self, side: str, level: float) -> str:
        """The column of the main model's lower ("lo") or upper ("hi") bound."""
        return f"{self.models[0]}-{side}-{level:g}"

    @property
    def series(self) -> list[str]:
        """Series that were forecast."""
        return list(self.errors["series"])


def read_result(out: Path) -> Result:
    """Read the files of a finished job.

    Raises:
        DataError: One of them is absent or damaged.
    """
    try:
        parsed = [json.loads((out / name).read_text("utf-8")) for name in ("metrics.json", "errors.json", "run.json")]
        tables = [pd.read_csv(out / name, dtype={"unique_id": str}) for name in ("forecast.csv", "last_window.csv")]
    except (OSError, ValueError) as error:
        raise DataError(f"'{out}' does not hold a finished forecast: {error}") from error
    for table in tables:
        table["ds"] = pd.to_datetime(table["ds"])
    return Result(*parsed, *tables)


def split_unit(name: str) -> tuple[str, str]:
    """A series' name and its unit: "T (degC)" is ("T", "degC")."""
    found = UNIT.search(name)
    return (name[: found.start()], found.group(1)) if found else (name, "")


def refuse_other(path: Path, begins: str) -> None:
    """Refuse to write a report over a file that is none: a table of a user's may lie where the report's would.

    Args:
        begins: How a file that an earlier call wrote begins.

    Raises:
        DataError: There is a file, it is not empty, and it begins in another way.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = file.read(len(begins))
    except FileNotFoundError:
        return
    if found and found != begins:
        raise DataError(
            f"'{path}' is there, is no report of this kind, and would be written over: move it, or name another place "
            "(`selectra compare`: --store, beside which the reports lie; `selectra report`: --out)."
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` at the end, so that nobody sees half a file."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
