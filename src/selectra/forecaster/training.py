"""One model of a forecast job: trained, its look-back chosen where asked, calibrated and scored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.markup import escape
from torch import nn

from selectra.data.series import SeriesData
from selectra.errors import DataError
from selectra.forecaster import files
from selectra.forecaster.intervals import calibrate
from selectra.forecaster.predictor import Predictor
from selectra.forecaster.scoring import Score, build_model, build_task, count_parameters, notes_of, quantiles_of, score
from selectra.spec import Run
from selectra.train.checkpoint import WEIGHTS, forget, load_weights
from selectra.train.loop import Fitted, fit
from selectra.train.record import RECORD
from selectra.train.same_data import describe_data

METRICS = ("mse", "mae", "mase", "crps")


class Trained(BaseModel):
    """What is known of a model once it is trained and scored; stored beside its weights."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    row: dict[str, Any]
    by_step: list[list[float | None]]
    by_series: list[list[float | None]]


class Tried(BaseModel):
    """A look-back's validation error; stored beside the weights."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    val: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """What is the same for all models of a job.

    Args:
        data: The data for each look-back.
        run_of: The training of a model for a look-back.
        data_print: A text that changes when the data does.
        levels: The intervals, in per cent.
        eval_batch_size: Windows in a test batch.
        out: The job's folder.
    """

    data: dict[int, SeriesData]
    run_of: Callable[[str, int], Run]
    data_print: str
    levels: tuple[float, ...]
    eval_batch_size: int
    out: Path
    console: Console


def train_or_load(work: Work, name: str, lookbacks: list[int]) -> tuple[Predictor, Trained]:
    """A trained, calibrated and scored model; from its folder if the same job has finished it before.

    Of several look-backs the one with the lowest validation error is kept; the test windows are opened for it alone.
    """
    folder = work.out / name
    runs = [work.run_of(name, lookback).model_dump(mode="json") for lookback in lookbacks]
    identity = files.fingerprint(runs if len(runs) > 1 else runs[0], work.data_print, list(work.levels))
    found_identity, stored = _read(folder, Trained)
    same = found_identity == identity
    if same and isinstance(stored, Trained) and (folder / WEIGHTS).is_file():
        lookback = int(stored.row.get("lookback", lookbacks[0]))
        data = work.data[lookback]
        model = build_model(work.run_of(name, lookback).model, data, work.run_of(name, lookback).train.seed)
        load_weights(folder / WEIGHTS, model)
        work.console.print(
            f"[bold]{name}[/]: finished before with the same settings and data, taken from {escape(str(folder))}"
        )
        return _predictor(work, name, model, data), stored
    folder.mkdir(exist_ok=True)
    if not same:
        _clear(folder)
    files.write_json(folder / files.RESULT, {"fingerprint": identity})
    lookback, seconds = (lookbacks[0], 0.0) if len(lookbacks) == 1 else _choose(work, name, lookbacks, folder)
    data, run = work.data[lookback], work.run_of(name, lookback)
    model = build_model(run.model, data, run.train.seed)
    work.console.print(f"[bold]{name}[/]: {count_parameters(model):,} parameters")
    for note in notes_of(model):
        work.console.print(f"  note: {note}", style="yellow", highlight=False)
    if len(lookbacks) > 1:
        load_weights(folder / WEIGHTS, model)
    else:
        seconds = _fit(model, run, data, folder, work.console).seconds
    predictor = _predictor(work, name, model, data)
    found = score(model, build_task(run, data), data, work.eval_batch_size, predictor.calibration, predictor.levels)
    row = _row(name, model, found, seconds, work.levels)
    if len(lookbacks) > 1:
        row["lookback"] = lookback
    content = {"row": row, "by_step": found.by_step, "by_series": found.by_series}
    trained = Trained(fingerprint=identity, **files.plain(content))
    files.write_json(folder / files.RESULT, trained.model_dump())
    return predictor, trained


def _choose(work: Work, name: str, lookbacks: list[int], folder: Path) -> tuple[int, float]:
    """Train each look-back in a folder of its own, and bring the best one's weights and records up.

    Returns:
        The best look-back, and the seconds of all trainings.
    """
    found: dict[int, Tried] = {}
    for lookback in lookbacks:
        own, data, run = folder / f"lookback-{lookback}", work.data[lookback], work.run_of(name, lookback)
        identity = files.fingerprint(run.model_dump(mode="json"), work.data_print)
        known, stored = _read(own, Tried)
        if known == identity and isinstance(stored, Tried) and (own / WEIGHTS).is_file():
            found[lookback] = stored
            continue
        own.mkdir(exist_ok=True)
        if known != identity:
            _clear(own)
        files.write_json(own / files.RESULT, {"fingerprint": identity})
        fitted = _fit(build_model(run.model, data, run.train.seed), run, data, own, work.console)
        val = build_task(run, data).score(fitted.best)
        found[lookback] = Tried(fingerprint=identity, val=val, seconds=fitted.seconds)
        files.write_json(own / files.RESULT, found[lookback].model_dump())
    lookback = min(found, key=lambda each: found[each].val)
    tried = ", ".join(f"{each}: {item.val:.4f}" for each, item in found.items())
    work.console.print(
        f"[bold]{name}[/]: look-back {lookback} (validation error by look-back: {tried})", highlight=False
    )
    for part in (files.RUN, RECORD, WEIGHTS):
        source = folder / f"lookback-{lookback}" / part
        if source.is_file():
            with files.replacing(folder / part) as partial:
                shutil.copyfile(source, partial)
    return lookback, sum(item.seconds for item in found.values())


def _fit(model: nn.Module, run: Run, data: SeriesData, folder: Path, console: Console) -> Fitted:
    """Train into a folder."""
    train, val = data.windows("train"), data.windows("val")
    return fit(model, build_task(run, data), train, val, run, folder, console=console, data=describe_data(data))


def _clear(folder: Path) -> None:
    """From here on a checkpoint and weights in this folder belong to another run."""
    forget(folder)


def _predictor(work: Work, name: str, model: nn.Module, data: SeriesData) -> Predictor:
    calibration = None
    if work.levels:
        batch = work.eval_batch_size
        calibration = calibrate(model, data.windows("val"), work.levels, quantiles_of(model), batch)
    return Predictor(
        model, data.seq_len, data.horizon, data.scaler, data.covariate_scalers, calibration, work.levels, name
    )


def _read(folder: Path, kind: type[BaseModel]) -> tuple[str | None, BaseModel | None]:
    """The identity of the job that a folder was last used for, and its result if it was finished and whole."""
    content = files.read_json(folder / files.RESULT)
    if not isinstance(content, dict):
        return None, None
    try:
        return content.get("fingerprint"), kind.model_validate(content)
    except ValidationError:
        return content.get("fingerprint"), None


def _row(name: str, model: nn.Module, found: Score, seconds: float, levels: tuple[float, ...]) -> dict[str, Any]:
    if not np.isfinite(found.metrics["mse"]):
        raise DataError(f"{name}: no test window has an observed target, so there is nothing to score.")
    keys = [key for key in METRICS if key != "crps" or key in found.metrics]
    keys += [f"{what}-{level:g}" for level in levels for what in ("coverage", "width")]
    row = {"model": name, **{key: found.metrics.get(key) for key in keys}}
    return row | {"params": count_parameters(model), "seconds": round(seconds, 2)}
