"""Whether the data is still what a training saw: a short description that run.json and every checkpoint hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from selectra.errors import DataError

if TYPE_CHECKING:
    from selectra.data.table import Table

FINGERPRINT = "fingerprint"


def table_fingerprint(table: Table) -> str:
    """A short text that changes when any stamp, name or value of a table does."""
    digest = hashlib.sha256("\x1f".join((*table.names, table.freq)).encode())
    digest.update(table.stamps.to_numpy().astype("datetime64[ns]").tobytes())
    digest.update(np.nan_to_num(table.values, nan=np.inf).tobytes())
    return digest.hexdigest()[:16]


def describe_data(data: Any) -> dict[str, Any] | None:
    """What identifies the data, in JSON's types: what it says of itself, or of its table; None for any other."""
    if hasattr(data, "describe"):
        return data.describe()
    table: Table | None = getattr(data, "table", None)
    if table is None:
        return None
    return {
        FINGERPRINT: table_fingerprint(table),
        "rows": table.rows,
        "series": list(table.names),
        "first": str(table.stamps[0]),
        "last": str(table.stamps[-1]),
        "freq": table.freq,
    }


def refuse_changed(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, where: str, advice: str) -> None:
    """Compare two descriptions; without one of them nothing can be said.

    Raises:
        DataError: They differ; the message says in what, and ends with `advice`.
    """
    if not before or not now or before.get(FINGERPRINT) == now[FINGERPRINT]:
        return
    different = [
        f"{key}: {before[key]!r} then and {now[key]!r} now"
        for key in now
        if key != FINGERPRINT and key in before and before[key] != now[key]
    ]
    found = "; ".join(different) or "rows and series are the same, and values are not"
    raise DataError(f"the data has changed since the training in '{where}' ({found}). {advice}")
