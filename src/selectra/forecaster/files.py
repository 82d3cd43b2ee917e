"""What a forecast job leaves in its folder; every file is whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from selectra.data.series import SeriesData
from selectra.data.table import Table
from selectra.errors import ConfigError
from selectra.train.checkpoint import replacing

METRICS, ERRORS, RUN = "metrics.json", "errors.json", "run.json"
FORECAST, LAST_WINDOW, RESULT = "forecast.csv", "last_window.csv", "result.json"


def plain(value: Any) -> Any:
    """The same in JSON's types; what is not finite becomes None."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Any) -> None:
    """Write JSON with a line for each entry of the upper levels."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote; None where there is no such file, or where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table without its index; seven digits hold all of a float32."""
    with replacing(path) as partial:
        frame.to_csv(partial, index=False, float_format="%.7g")


def check_folder(out: Path) -> None:
    """Refuse a path that cannot become the output folder; whether it can be written is tried elsewhere."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; name a folder with --out.")


def fingerprint(*parts: Any) -> str:
    """A short text that changes when any part does."""
    text = json.dumps(plain(parts), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def table_fingerprint(table: Table) -> str:
    """A short text that changes when any stamp, name or value of a table does."""
    digest = hashlib.sha256("\x1f".join((*table.names, table.freq)).encode())
    digest.update(table.stamps.to_numpy().astype("datetime64[ns]").tobytes())
    digest.update(np.nan_to_num(table.values, nan=np.inf).tobytes())
    return digest.hexdigest()[:16]


def long_frame(
    names: tuple[str, ...], stamps: pd.DatetimeIndex, columns: Mapping[str, np.ndarray], keep: list[int]
) -> pd.DataFrame:
    """Nixtla's long frame `unique_id, ds, ...` from columns of `(rows, series)`; series `keep` alone."""
    return pd.DataFrame(
        {
            "unique_id": np.repeat([names[i] for i in keep], len(stamps)),
            "ds": np.tile(stamps.to_numpy(), len(keep)),
            **{column: values[:, keep].T.ravel() for column, values in columns.items()},
        }
    )


def kept_series(data: SeriesData) -> list[int]:
    """The series that are forecast: the target, or all."""
    return list(range(len(data.names))) if data.target_index is None else [data.target_index]


def last_window_frame(data: SeriesData, forecasts: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The last `horizon` rows with what each model forecast for them, and the rows before as history."""
    keep, values = kept_series(data), data.table.values
    start = data.table.rows - data.horizon
    first = max(0, start - max(data.seq_len, 2 * data.horizon))
    history = long_frame(data.names, data.ds[first:start], {"y": values[first:start]}, keep)
    truth = long_frame(data.names, data.ds[start:], {"y": values[start:], **forecasts}, keep)
    history.insert(2, "part", "history")
    truth.insert(2, "part", "truth")
    return pd.concat([history, truth], ignore_index=True)
