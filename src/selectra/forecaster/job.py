"""The main job: one table, some models, one fair table of errors, and the forecast beyond the last row."""

from __future__ import annotations

import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from selectra.data.series import EXAMPLE_ORIGIN, SeriesFile
from selectra.data.splits import PARTS
from selectra.errors import ConfigError, DataError
from selectra.forecaster import files
from selectra.forecaster.scoring import Score, build_model, build_task, count_parameters, forecast_units, score
from selectra.registry import models
from selectra.report.page import write_page
from selectra.report.plots import write_forecast_picture
from selectra.report.tables import COLUMNS, shown_row, verdict
from selectra.spec import Optim, Run, Spec, Train
from selectra.train.checkpoint import CHECKPOINT, WEIGHTS, load_weights, writable_folder
from selectra.train.loop import fit
from selectra.train.record import environment
from selectra.train.same_data import describe_data, table_fingerprint
from selectra.train.stop import StoppedError

DEFAULT_MODELS = ("tsm2", "linear", "dlinear", "seasonal_naive", "naive")
QUICK_STEPS = 100
WARMUP_STEPS = 50


class ForecastJob(BaseModel):
    """Everything that a forecast from the command line depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    file: Path | None = None
    """CSV or parquet file, wide or long; None is the New York weather that comes with the package."""
    models: tuple[str, ...] = DEFAULT_MODELS
    """Registered names; the first is the main model of the report."""
    lookback: int = 96
    """Rows that a model sees."""
    horizon: int = 24
    """Rows that it forecasts."""
    split: Literal["auto", "ratio", "ett", "last"] = "auto"
    """70/10/20 % of the rows, the months of the ETT benchmark, the last horizon; "auto" as the public set's papers."""
    target: str | None = None
    """The series that is trained on and scored; None is all of them."""
    time: str | None = None
    """Name of the time column; None infers it."""
    freq: str | None = None
    """pandas' alias of the distance of rows; None infers it."""
    stamps: Literal["check", "order"] = "check"
    """"order" takes rows as evenly spaced, whatever their stamps."""
    out: Path = Path("selectra_forecast")
    """Folder for everything that is written."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights and of the order of windows."""
    quick: bool = False
    """Train for 100 steps at most: to see that everything works, not for figures."""
    epochs: float = Field(default=5, gt=0, allow_inf_nan=False)
    """Most passes over the training windows."""
    patience: int = Field(default=3, ge=1)
    """Passes without a better validation error after which training stops."""
    batch_size: int = Field(default=32, ge=1)
    """Windows in a training step."""
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Highest learning rate."""
    eval_batch_size: int = Field(default=256, ge=1)
    """Windows in a test batch; changes time and memory, not results."""
    device: str = "auto"
    """"cpu", "cuda", or "auto"."""

    def command(self) -> str:
        """The command line that repeats this job."""
        words = ["selectra", "forecast", *([str(self.file)] if self.file else [])]
        words += ["--model", ",".join(self.models), "--lookback", str(self.lookback), "--horizon", str(self.horizon)]
        words += ["--split", self.split, "--stamps", self.stamps, "--epochs", f"{self.epochs:g}"]
        words += ["--seed", str(self.seed), "--batch-size", str(self.batch_size)]
        for name in ("target", "time", "freq"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", value]
        return shlex.join([*words, *(["--quick"] if self.quick else []), "--out", str(self.out)])

    def load(self) -> SeriesFile:
        """Read the data."""
        return SeriesFile(**self._data_arguments())

    def _data_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"seq_len": self.lookback, "horizon": self.horizon, "split": self.split}
        arguments |= {"time": self.time, "freq": self.freq, "target": self.target, "stamps": self.stamps}
        return {"path": None if self.file is None else str(self.file), **arguments}

    def run_of(self, name: str) -> Run:
        """The training of one model."""
        length: dict[str, Any] = (
            {"steps": QUICK_STEPS, "eval_every": QUICK_STEPS // 2} if self.quick else {"epochs": self.epochs}
        )
        return Run(
            model=Spec(name),
            data=Spec("series_file", **self._data_arguments()),
            task=Spec("forecasting"),
            optim=Optim(lr=self.lr, warmup_steps=WARMUP_STEPS),
            train=Train(
                **length, batch_size=self.batch_size, patience=self.patience, seed=self.seed, device=self.device
            ),
            name=name,
        )


class Trained(BaseModel):
    """What is known of a model once it is trained and scored; stored beside its weights."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    row: dict[str, Any]
    by_step: list[list[float | None]]
    by_series: list[list[float | None]]


def forecast_job(job: ForecastJob, console: Console) -> list[dict[str, Any]]:
    """Do the job; print what is found and done, write everything into `job.out`, and return the rows of the table.

    Models that an interrupted job with the same settings and data has finished are not trained again.

    Raises:
        DataError: The data cannot be used as it is.
        ConfigError: A setting does not fit; found before any training.
        StoppedError: The job was interrupted; its message is the command that goes on.
    """
    try:
        return _whole_job(job, console)
    except KeyboardInterrupt as stopped:
        raise StoppedError(None, job.command()) from stopped


def _whole_job(job: ForecastJob, console: Console) -> list[dict[str, Any]]:
    files.check_folder(job.out, job.models, job.file)
    data = job.load()
    names = _check_models(job, data, console)
    out = writable_folder(job.out)
    _announce(job, data, console)
    content = _described(job, data, names)
    files.clear_results(out, content)
    files.write_json(out / files.RUN, content)
    results: dict[str, Trained] = {}
    future: dict[str, np.ndarray] = {}
    recent: dict[str, np.ndarray] = {}
    for name in names:
        model, results[name] = _train_or_load(job, name, data, content["data"]["fingerprint"], console)
        future[name] = forecast_units(model, data, data.future_window())[0]
        recent[name] = forecast_units(model, data, data.window_at(data.table.rows - data.horizon))[0]
    rows = [results[name].row for name in names]
    _write(out, data, results, future, recent)
    content["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    files.write_json(out / files.RUN, content)
    write_forecast_picture(out)
    write_page(out)
    _print_table(rows, len(data.windows("test")), console)
    written = ("forecast.csv", "forecast.png", "report.html", "metrics.json")
    console.print(f"[bold]Written to {escape(str(out))}/[/]: {', '.join(written)}, run.json, weights")
    return rows


def _described(job: ForecastJob, data: SeriesFile, names: tuple[str, ...]) -> dict[str, Any]:
    """The content of run.json: the job, each training, the data's facts, software and hardware."""
    table = data.table
    return {
        "job": job.model_dump(mode="json"),
        "command": job.command(),
        "finished": None,
        "models": list(names),
        "data": {
            "source": EXAMPLE_ORIGIN if job.file is None else job.file.name,
            "summary": data.summary(),
            "series": list(data.names),
            "fingerprint": table_fingerprint(table),
            "rows": table.rows,
            "rows_read": table.rows_read,
            "first": str(data.ds[0]),
            "last": str(data.ds[-1]),
            "freq": data.freq,
            "season": data.season,
            "windows": {part: len(data.windows(part)) for part in PARTS},
            "test_ends_with_file": data.borders.test == table.rows,
        },
        "runs": {name: job.run_of(name).model_dump(mode="json") for name in names},
        **environment(),
    }


def _check_models(job: ForecastJob, data: SeriesFile, console: Console) -> tuple[str, ...]:
    """Every model is built once before any is trained, so that a wrong name or size shows at once."""
    names = tuple(dict.fromkeys(job.models))
    if not names:
        raise ConfigError(f"name at least one model with --model; there are {models.names('series')}.")
    if len(names) > 1 and "seasonal_naive" in names and data.season > job.lookback:
        console.print(f"seasonal_naive is left out: its season of {data.season} rows is longer than the look-back.")
        names = tuple(name for name in names if name != "seasonal_naive")
    for name in names:
        if models.entry(name).kind != "series":
            raise ConfigError(
                f"{name!r} is a model for {models.entry(name).kind}s; for series there are {models.names('series')}."
            )
        build_model(Spec(name), data, job.seed)
    return names


def _announce(job: ForecastJob, data: SeriesFile, console: Console) -> None:
    source = f"the bundled {EXAMPLE_ORIGIN}" if job.file is None else str(job.file)
    console.print(f"[bold]Data[/]: {escape(source)}")
    for line in data.summary():
        console.print("  " + escape(line), highlight=False, style="yellow" if line.startswith("note:") else None)
    console.print(
        f"[bold]Task[/]: {job.lookback} rows in, {job.horizon} rows out ({data.freq}), "
        f"{'all series' if job.target is None else escape(job.target)}, seed {job.seed}"
    )
    if job.quick:
        console.print(f"[yellow]--quick: {QUICK_STEPS} training steps; these figures say little about the models.[/]")


def _train_or_load(
    job: ForecastJob, name: str, data: SeriesFile, data_print: str, console: Console
) -> tuple[torch.nn.Module, Trained]:
    """A trained and scored model; from its folder if the same job has finished it before."""
    run, folder = job.run_of(name), job.out / name
    identity = files.fingerprint(run.model_dump(mode="json"), data_print)
    model = build_model(run.model, data, job.seed)
    found_identity, stored = _read_result(folder)
    same = found_identity == identity
    if same and stored is not None and (folder / WEIGHTS).is_file():
        load_weights(folder / WEIGHTS, model)
        console.print(
            f"[bold]{name}[/]: finished before with the same settings and data, taken from {escape(str(folder))}"
        )
        return model, stored
    console.print(f"[bold]{name}[/]: {count_parameters(model):,} parameters")
    folder.mkdir(exist_ok=True)
    # From here on a checkpoint and weights in this folder belong to this run.
    for stale in () if same else (CHECKPOINT, WEIGHTS):
        (folder / stale).unlink(missing_ok=True)
    files.write_json(folder / files.RESULT, {"fingerprint": identity})
    task = build_task(run, data)
    started = time.perf_counter()
    try:
        train, val = data.windows("train"), data.windows("val")
        fit(model, task, train, val, run, folder, console=console, data=describe_data(data))
    except StoppedError as stopped:
        raise StoppedError(stopped.step, job.command()) from stopped
    seconds = time.perf_counter() - started
    found = score(model, task, data, job.eval_batch_size)
    trained = Trained(fingerprint=identity, **_result(name, model, found, seconds))
    files.write_json(folder / files.RESULT, trained.model_dump())
    return model, trained


def _read_result(folder: Path) -> tuple[str | None, Trained | None]:
    """The identity of the job that a model's folder was last used for, and its result if it was finished and whole."""
    content = files.read_json(folder / files.RESULT)
    if not isinstance(content, dict):
        return None, None
    try:
        return content.get("fingerprint"), Trained.model_validate(content)
    except ValidationError:
        return content.get("fingerprint"), None


def _result(name: str, model: torch.nn.Module, found: Score, seconds: float) -> dict[str, Any]:
    if not np.isfinite(found.metrics["mse"]):
        raise DataError(f"{name}: no test window has an observed target, so there is nothing to score.")
    metrics = {key: found.metrics.get(key) for key in ("mse", "mae", "mase")}
    row = {"model": name, **metrics, "params": count_parameters(model), "seconds": round(seconds, 2)}
    return files.plain({"row": row, "by_step": found.by_step, "by_series": found.by_series})


def _write(
    out: Path,
    data: SeriesFile,
    results: dict[str, Trained],
    future: dict[str, np.ndarray],
    recent: dict[str, np.ndarray],
) -> None:
    keep = files.kept_series(data)
    errors = {
        "series": [data.names[i] for i in keep],
        "models": {
            name: {
                "mse_by_step": item.by_step[0],
                "mae_by_step": item.by_step[1],
                "mse_by_series": item.by_series[0],
                "mae_by_series": item.by_series[1],
            }
            for name, item in results.items()
        },
    }
    files.write_json(out / files.ERRORS, errors)
    files.write_csv(out / files.FORECAST, files.long_frame(data.names, data.future_stamps(), future, keep))
    files.write_csv(out / files.LAST_WINDOW, files.last_window_frame(data, recent))
    files.write_json(out / files.METRICS, [item.row for item in results.values()])


def _print_table(rows: list[dict[str, Any]], windows: int, console: Console) -> None:
    best = min(rows, key=lambda row: row["mse"])
    table = RichTable(title=f"{windows:,} test windows; MSE and MAE of standardised values", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in sorted(rows, key=lambda row: row["mse"]):
        cells = shown_row(row)
        if row is best:
            cells[0] += "  ← best"
        table.add_row(*cells, style="bold green" if row is best else None)
    console.print(table)
    console.print(verdict(rows), highlight=False)
