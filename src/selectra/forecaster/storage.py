"""A fitted Forecaster as a folder: one JSON file that names one safetensors file, and nothing that is executed.

The JSON file is written last and takes the place of an earlier one at once, so that a reader sees the former
Forecaster or this one, never a part of both.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

from selectra.data.channels import Channel, Channels
from selectra.data.covariates import Covariates, CovariateScalers
from selectra.data.panel import Panel
from selectra.data.table import Table
from selectra.data.windows import Scaler
from selectra.errors import ConfigError, DataError
from selectra.forecaster.files import read_json, write_json
from selectra.forecaster.frames import Style
from selectra.forecaster.intervals import Calibration
from selectra.forecaster.predictor import Predictor
from selectra.forecaster.scoring import build_from_facts
from selectra.forecaster.settings import model_spec
from selectra.spec import Spec
from selectra.train.checkpoint import copy_weights, replacing
from selectra.train.parallel import pick_device

if TYPE_CHECKING:
    from selectra.forecaster.estimator import Forecaster

INDEX = "forecaster.json"
KINDS = ("past", "future", "static")


class Saved(BaseModel):
    """What the JSON file holds; the arrays are in the file that it names."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["selectra.Forecaster"] = "selectra.Forecaster"
    version: Literal[1] = 1
    params: dict[str, Any]
    facts: dict[str, int]
    names: list[str]
    freq: str
    unit: Literal["s", "ms", "us", "ns"]
    layout: str
    time_name: str
    style: Style
    past: list[tuple[str, str | None]]
    future: list[tuple[str, str | None]]
    static: list[str]
    levels: list[float]
    calibration: dict[str, Any] | None
    arrays: str
    sha256: str


def save_forecaster(forecaster: Forecaster, out: Path) -> None:
    """Write a fitted Forecaster into a folder.

    Raises:
        ConfigError: The folder holds something else or cannot be written, or an argument cannot be written down.
    """
    content = _described(forecaster)
    _prepare(out)
    data = serialize(_arrays(forecaster))
    digest = hashlib.sha256(data).hexdigest()
    name = f"forecaster-{digest[:16]}.safetensors"
    with replacing(out / name) as partial:
        partial.write_bytes(data)
    saved = Saved(**content, arrays=name, sha256=digest)
    write_json(out / INDEX, saved.model_dump())
    for stale in out.glob("forecaster-*.safetensors"):
        if stale.name != name:
            stale.unlink()


def load_forecaster(out: Path) -> Forecaster:
    """Read what `save_forecaster` wrote.

    Raises:
        DataError: There is nothing of that kind, or it is damaged.
    """
    from selectra.forecaster.estimator import Forecaster  # noqa: PLC0415 - it saves and loads by this file

    saved = _read_index(out)
    arrays = _read_arrays(out, saved)
    try:
        params = dict(saved.params)
        for key in ("model_args", "train_args"):
            params[key] = dict(Spec.from_json(params[key]).args)
        if isinstance(params["model"], dict):
            params["model"] = Spec.from_json(params["model"])
        params["futr_exog_list"] = params["futr_exog_list"] or ()
        forecaster = Forecaster(**params)
        forecaster.params_ = forecaster.get_params()
        spec = model_spec(forecaster.model, forecaster.model_args)
        model = build_from_facts(spec, saved.facts, forecaster.seed)
        weights = {key.removeprefix("model."): value for key, value in arrays.items() if key.startswith("model.")}
        model.load_state_dict(weights)
        model.to(pick_device(forecaster.train_args.get("device", "auto")))
        forecaster.predictor_ = Predictor(
            model, saved.facts["seq_len"], saved.facts["horizon"], _scaler(arrays, "series"),
            CovariateScalers(*(_scaler(arrays, kind) if getattr(saved, kind) else None for kind in KINDS)),
            _calibration(saved, arrays), tuple(saved.levels), forecaster.alias,
        )  # fmt: skip
        forecaster.panel_ = _panel(saved, arrays)
        forecaster.style_, forecaster.facts_ = saved.style, saved.facts
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the Forecaster in '{out}' is damaged, or of another version: {reason}; save it anew"
        ) from error
    return forecaster


def _described(forecaster: Forecaster) -> dict[str, Any]:
    predictor, panel, params = forecaster.predictor_, forecaster.panel_, dict(forecaster.params_)
    for key in ("model_args", "train_args"):
        params[key] = Spec("", **params[key]).to_json()
    if isinstance(params["model"], Spec):
        params["model"] = params["model"].to_json()
    calibration = predictor.calibration
    described = None
    if calibration is not None:
        described = {"levels": list(calibration.levels), "quantiles": list(calibration.quantiles)}
        described |= {"windows": calibration.windows, "pooled": calibration.pooled}
    params |= {"level": None if params["level"] is None else list(predictor.levels)}
    params |= {"h": int(params["h"]), "seed": int(params["seed"]), "futr_exog_list": list(params["futr_exog_list"])}
    params |= {"input_size": None if params["input_size"] is None else int(params["input_size"])}
    table, channels = panel.table, panel.channels
    return {
        "params": params,
        "facts": forecaster.facts_,
        "names": list(table.names),
        "freq": table.freq,
        "unit": np.datetime_data(table.stamps.to_numpy().dtype)[0],
        "layout": table.layout,
        "time_name": table.time_name,
        "style": forecaster.style_,
        "past": [(c.column, c.series) for c in channels.past],
        "future": [(c.column, c.series) for c in channels.future],
        "static": list(channels.static),
        "levels": list(predictor.levels),
        "calibration": described,
    }


def _arrays(forecaster: Forecaster) -> dict[str, Tensor]:
    predictor, panel = forecaster.predictor_, forecaster.panel_
    # A copy each: safetensors refuses tensors that share memory, as tied weights do.
    found = {f"model.{name}": value.clone() for name, value in copy_weights(predictor.model).items()}
    arrays: dict[str, np.ndarray] = {
        "stamps": panel.table.stamps.to_numpy().view(np.int64),
        "values": panel.table.values,
        "ends": panel.ends.astype(np.int64),
    }
    arrays |= {kind: getattr(panel.covariates, kind) for kind in KINDS if getattr(panel.channels, kind)}
    scalers = {"series": predictor.scaler, **predictor.covariate_scalers._asdict()}
    for kind, scaler in scalers.items():
        if scaler is not None:
            arrays |= {f"{kind}.mean": scaler.mean, f"{kind}.std": scaler.std}
    if predictor.calibration is not None:
        arrays["radii"] = predictor.calibration.radii
    return found | {name: torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}


def _prepare(out: Path) -> None:
    """Make the folder, and try to write in it."""
    if out.is_dir() and any(out.iterdir()):
        content = read_json(out / INDEX)
        if not isinstance(content, dict) or content.get("format") != "selectra.Forecaster":
            raise ConfigError(f"the folder '{out}' holds something else than a saved Forecaster; name another one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write in the folder '{out}': {error.strerror}; name another one") from error


def _read_index(out: Path) -> Saved:
    path = out / INDEX
    if not path.is_file():
        raise DataError(f"'{out}' holds no saved Forecaster (no {INDEX}); Forecaster.save writes one")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is damaged: it is no JSON object; put a whole copy in its place")
    if content.get("format") != "selectra.Forecaster":
        raise DataError(f"'{path}' was not written by Forecaster.save: its format is {content.get('format')!r}")
    try:
        return Saved.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"'{path}' is damaged, or of another version of Selectra: {place}: {first['msg']}; save it anew"
        ) from error


def _read_arrays(out: Path, saved: Saved) -> dict[str, Tensor]:
    path = out / saved.arrays
    if Path(saved.arrays).name != saved.arrays or not path.is_file():
        raise DataError(f"'{out}' lacks the file '{saved.arrays}' that {INDEX} names; put a whole copy in its place")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != saved.sha256:
        raise DataError(f"'{path}' is damaged: its checksum is not the one in {INDEX}; put a whole copy in its place")
    try:
        return parse(data)
    except SafetensorError as error:
        raise DataError(f"'{path}' is no safetensors file: {error}") from error


def _scaler(arrays: dict[str, Tensor], kind: str) -> Scaler:
    return Scaler(arrays[f"{kind}.mean"].numpy(), arrays[f"{kind}.std"].numpy())


def _calibration(saved: Saved, arrays: dict[str, Tensor]) -> Calibration | None:
    found = saved.calibration
    if found is None:
        return None
    return Calibration(
        tuple(found["levels"]), arrays["radii"].numpy(), tuple(found["quantiles"]), found["windows"], found["pooled"]
    )


def _panel(saved: Saved, arrays: dict[str, Tensor]) -> Panel:
    values = arrays["values"].numpy()
    stamps = pd.DatetimeIndex(arrays["stamps"].numpy().view(f"datetime64[{saved.unit}]"))
    table = Table(
        tuple(saved.names), stamps, values, ~np.isnan(values), saved.freq, len(stamps),
        time_name=saved.time_name, layout=saved.layout,
    )  # fmt: skip
    past, future = (tuple(Channel(*pair) for pair in kind) for kind in (saved.past, saved.future))
    empty = {"past": (len(stamps), 0), "future": (len(stamps), 0), "static": (0, 0)}
    kinds = {kind: arrays[kind].numpy() if getattr(saved, kind) else np.zeros(empty[kind]) for kind in KINDS}
    covariates = Covariates(
        kinds["past"], kinds["future"], kinds["static"],
        tuple(c.label for c in past), tuple(c.label for c in future), tuple(saved.static),
    )  # fmt: skip
    return Panel(table, arrays["ends"].numpy(), covariates, Channels(past, future, tuple(saved.static)))
