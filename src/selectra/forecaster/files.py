"""What a forecast job leaves in its folder; every file is whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from selectra.data.series import SeriesData
from selectra.errors import ConfigError
from selectra.train.checkpoint import CHECKPOINT, WEIGHTS, replacing
from selectra.train.record import RECORD
from selectra.train.same_data import table_fingerprint

METRICS, ERRORS, RUN = "metrics.json", "errors.json", "run.json"
FORECAST, LAST_WINDOW, RESULT = "forecast.csv", "last_window.csv", "result.json"
CV = "cross_validation.csv"
PICTURE, PAGE = "forecast.png", "report.html"
# What is known only when a job has ended.
RESULTS = (METRICS, ERRORS, FORECAST, LAST_WINDOW, CV, PICTURE, PAGE)


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


def check_folder(out: Path, models: Sequence[str], source: Path | None) -> None:
    """Refuse a path that cannot become the output folder; whether it can be written is tried elsewhere.

    Raises:
        ConfigError: A file stands where a folder is needed, a folder where a file is, or the data where a result is.
    """
    for folder in (out, *(out / name for name in models)):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"'{folder}' is a file, and a folder is needed there; name another with --out.")
    files = [out / name for name in (RUN, *RESULTS)]
    files += [out / model / name for model in models for name in (RUN, RESULT, CHECKPOINT, WEIGHTS, RECORD)]
    for path in files:
        if path.is_dir():
            raise ConfigError(f"'{path}' is a folder, and a file is written there; name another folder with --out.")
        if source is not None and path.exists() and source.exists() and path.samefile(source):
            raise ConfigError(f"'{path}' is the data, and a result is written there; name another folder with --out.")


def clear_results(out: Path, content: Mapping[str, Any]) -> None:
    """Remove the results of an earlier job with other settings or data; weights stay where they are.

    Args:
        content: What run.json is going to hold.
    """
    path = out / RUN
    if path.is_file() and _identity(read_json(path)) != _identity(plain(content)):
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)


def _identity(content: Any) -> Any:
    """What the results of a job depend on; None where this is no job."""
    try:
        settings = {key: value for key, value in content["job"].items() if key != "out"}
        return settings, content["models"], content["data"]["fingerprint"]
    except (AttributeError, KeyError, TypeError):
        return None


def fingerprint(*parts: Any) -> str:
    """A short text that changes when any part does."""
    text = json.dumps(plain(parts), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_fingerprint(data: SeriesData) -> str:
    """A short text that changes when the table or a covariate does."""
    found, known = table_fingerprint(data.table), data.covariates
    if not known.facts:
        return found
    values = [np.nan_to_num(each, nan=np.inf).tobytes() for each in (known.past, known.future, known.static)]
    digests = [hashlib.sha256(each).hexdigest() for each in values]
    return fingerprint(found, known.past_names, known.future_names, known.static_names, digests)


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


def cutoff_frame(data: SeriesData, cutoffs: Sequence[int], forecasts: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Forecasts `(cutoffs, horizon, s)` from each cutoff, as `unique_id, ds, cutoff, y, ...`."""
    keep, parts = kept_series(data), []
    for i, row in enumerate(cutoffs):
        rows = slice(row, row + data.horizon)
        columns = {"y": data.table.values[rows], **{name: values[i] for name, values in forecasts.items()}}
        part = long_frame(data.names, data.ds[rows], columns, keep)
        part.insert(2, "cutoff", data.ds[row - 1])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
