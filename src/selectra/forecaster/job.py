"""The main job: one table, some models, one fair table of errors, and the forecast beyond the last row."""

from __future__ import annotations

import contextlib
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from selectra.data.series import EXAMPLE_ORIGIN, SeriesData, SeriesFile
from selectra.data.splits import PARTS
from selectra.errors import ConfigError, DataError
from selectra.forecaster import files
from selectra.forecaster.forecasts import Forecasts, forecasts
from selectra.forecaster.intervals import check_levels
from selectra.forecaster.scoring import build_model, notes_of
from selectra.forecaster.training import Trained, Work, train_or_load
from selectra.registry import models
from selectra.report.page import write_page
from selectra.report.plots import write_forecast_picture
from selectra.report.tables import columns_of, shown_row, verdict
from selectra.spec import Optim, Run, Spec, Train
from selectra.train.checkpoint import writable_folder
from selectra.train.parallel import pick_device
from selectra.train.record import environment
from selectra.train.stop import StoppedError

DEFAULT_MODELS = ("tsm2", "linear", "dlinear", "seasonal_naive", "naive")
QUICK_STEPS = 100
WARMUP_STEPS = 50
LOOKBACKS = (96, 192, 336, 512, 720)


class ForecastJob(BaseModel):
    """Everything that a forecast from the command line depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    file: Path | None = None
    """CSV or parquet file, wide or long; None is the New York weather that comes with the package."""
    models: tuple[str, ...] = DEFAULT_MODELS
    """Registered names; the first is the main model of the report."""
    lookback: int | Literal["auto"] = 96
    """Rows that a model sees; "auto" takes for each model the best on validation of 96, 192, 336, 512 and 720."""
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
    level: tuple[float, ...] = (80, 95)
    """Intervals in per cent, calibrated on the validation windows; none when empty."""
    futr: Path | None = None
    """The next rows of the covariates that are known ahead, in columns that `file` has too."""
    cv: int = Field(default=0, ge=0)
    """Cutoffs, a horizon apart, from which the last rows of the test part are forecast once more."""
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
        words += ["--level", ",".join(f"{level:g}" for level in self.level) or "none"]
        for name in ("target", "time", "freq", "futr"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", str(value)]
        words += ["--cv", str(self.cv)] if self.cv else []
        words += ["--device", self.device] if self.device != "auto" else []
        return shlex.join([*words, *(["--quick"] if self.quick else []), "--out", str(self.out)])

    def load(self) -> SeriesFile:
        """Read the data; where the look-back is to be chosen, for the shortest one."""
        return SeriesFile(**self._data_arguments(self.first_lookback))

    @property
    def first_lookback(self) -> int:
        """The look-back, or the shortest one that is tried."""
        return LOOKBACKS[0] if self.lookback == "auto" else self.lookback

    def _data_arguments(self, lookback: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {"seq_len": lookback, "horizon": self.horizon, "split": self.split}
        arguments |= {"time": self.time, "freq": self.freq, "target": self.target, "stamps": self.stamps}
        arguments |= {} if self.futr is None else {"futr": str(self.futr)}
        return {"path": None if self.file is None else str(self.file), **arguments}

    def run_of(self, name: str, lookback: int) -> Run:
        """The training of one model."""
        length: dict[str, Any] = (
            {"steps": QUICK_STEPS, "eval_every": QUICK_STEPS // 2} if self.quick else {"epochs": self.epochs}
        )
        return Run(
            model=Spec(name),
            data=Spec("series_file", **self._data_arguments(lookback)),
            task=Spec("forecasting"),
            optim=Optim(lr=self.lr, warmup_steps=WARMUP_STEPS),
            train=Train(
                **length, batch_size=self.batch_size, patience=self.patience, seed=self.seed, device=self.device
            ),
            name=name,
        )


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
    except StoppedError as stopped:
        raise StoppedError(stopped.step, job.command(), stopped.by_hand) from stopped
    except KeyboardInterrupt as stopped:
        raise StoppedError(None, job.command()) from stopped


def _whole_job(job: ForecastJob, console: Console) -> list[dict[str, Any]]:
    pick_device(job.device)
    files.check_folder(job.out, job.models, job.file)
    data = job.load()
    levels = check_levels(job.level)
    cutoffs = _cutoffs(job, data)
    by_lookback = {data.seq_len: data, **_longer(job, data)}
    lookbacks = _check_models(job, by_lookback, console)
    out = writable_folder(job.out)
    _announce(job, data, console)
    content = _described(job, data, lookbacks)
    files.clear_results(out, content)
    files.write_json(out / files.RUN, content)
    work = Work(by_lookback, job.run_of, content["data"]["fingerprint"], levels, job.eval_batch_size, out, console)
    results: dict[str, Trained] = {}
    found: list[Forecasts] = []
    for name in lookbacks:
        predictor, results[name] = train_or_load(work, name, lookbacks[name])
        found.append(forecasts(predictor, by_lookback[predictor.seq_len], cutoffs))
    rows = [results[name].row for name in lookbacks]
    if job.cv:
        rows = [row | {"cv": item.errors(data, cutoffs)} for row, item in zip(rows, found, strict=True)]
    _write(out, data, rows, results, found, cutoffs)
    content["notes"] = [note for item in found for note in notes_of(item.predictor.model)]
    content["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    files.write_json(out / files.RUN, content)
    write_forecast_picture(out)
    write_page(out)
    _print_table(rows, len(data.windows("test")), console)
    written = ("forecast.csv", "forecast.png", "report.html", "metrics.json", *([files.CV] if job.cv else []))
    console.print(f"[bold]Written to {escape(str(out))}/[/]: {', '.join(written)}, run.json, weights")
    return rows


def _cutoffs(job: ForecastJob, data: SeriesFile) -> list[int]:
    """The first rows of the forecasts of --cv, the last of which ends with the test part.

    Raises:
        ConfigError: There are not that many after the validation part.
    """
    rows = data.borders.test - data.borders.val
    if job.cv * job.horizon > rows:
        raise ConfigError(
            f"--cv {job.cv} needs {job.cv * job.horizon:,} rows after the validation part, there are {rows:,}; "
            f"at most {rows // job.horizon} cutoffs fit"
        )
    return [data.borders.test - job.horizon * i for i in range(job.cv, 0, -1)]


def _longer(job: ForecastJob, data: SeriesFile) -> dict[int, SeriesData]:
    """The data for the other look-backs that are tried, as far as they fit."""
    found: dict[int, SeriesData] = {}
    for lookback in LOOKBACKS[1:] if job.lookback == "auto" else ():
        with contextlib.suppress(DataError):
            found[lookback] = data.at(lookback)
    return found


def _described(job: ForecastJob, data: SeriesFile, lookbacks: dict[str, list[int]]) -> dict[str, Any]:
    """The content of run.json: the job, each training, the data's facts, software and hardware."""
    table = data.table
    return {
        "job": job.model_dump(mode="json"),
        "command": job.command(),
        "finished": None,
        "models": list(lookbacks),
        "data": {
            "source": EXAMPLE_ORIGIN if job.file is None else job.file.name,
            "summary": data.summary(),
            "series": list(data.names),
            "fingerprint": files.data_fingerprint(data),
            "rows": table.rows,
            "rows_read": table.rows_read,
            "first": str(data.ds[0]),
            "last": str(data.ds[-1]),
            "freq": data.freq,
            "season": data.season,
            "windows": {part: len(data.windows(part)) for part in PARTS},
            "test_ends_with_file": data.borders.test == table.rows,
        },
        "runs": {name: job.run_of(name, data.seq_len).model_dump(mode="json") for name in lookbacks},
        "lookbacks": lookbacks,
        **environment(),
    }


def _check_models(job: ForecastJob, data: dict[int, SeriesData], console: Console) -> dict[str, list[int]]:
    """Every model and the look-backs that are tried for it; each is built once before any is trained, so that a wrong
    name or size shows at once."""
    names = tuple(dict.fromkeys(job.models))
    if not names:
        raise ConfigError(f"name at least one model with --model; there are {models.families('series')}.")
    season = next(iter(data.values())).season
    fitting = [lookback for lookback in data if season <= lookback]
    if len(names) > 1 and "seasonal_naive" in names and not fitting:
        console.print(f"seasonal_naive is left out: its season of {season} rows is longer than the look-back.")
        names = tuple(name for name in names if name != "seasonal_naive")
    found: dict[str, list[int]] = {}
    for name in names:
        if models.entry(name).kind != "series":
            raise ConfigError(
                f"{name!r} is a model for {models.entry(name).kind}s; for series there are {models.families('series')}."
            )
        found[name] = (fitting or list(data)) if name.startswith("seasonal_naive") else list(data)
        for lookback in found[name]:
            with torch.device("meta"):
                build_model(Spec(name), data[lookback], job.seed)
    return found


def _announce(job: ForecastJob, data: SeriesFile, console: Console) -> None:
    source = f"the bundled {EXAMPLE_ORIGIN}" if job.file is None else str(job.file)
    console.print(f"[bold]Data[/]: {escape(source)}")
    for line in data.summary():
        console.print("  " + escape(line), highlight=False, style="yellow" if line.startswith("note:") else None)
    console.print(
        f"[bold]Task[/]: {_rows_in(job)} rows in, {job.horizon} rows out ({data.freq}), "
        f"{'all series' if job.target is None else escape(job.target)}, seed {job.seed}"
    )
    if job.quick:
        console.print(f"[yellow]--quick: {QUICK_STEPS} training steps; these figures say little about the models.[/]")


def _rows_in(job: ForecastJob) -> str:
    return str(job.lookback) if job.lookback != "auto" else f"{', '.join(map(str, LOOKBACKS))} (what fits)"


def _write(
    out: Path,
    data: SeriesFile,
    rows: list[dict[str, Any]],
    results: dict[str, Trained],
    found: list[Forecasts],
    cutoffs: list[int],
) -> None:
    keep = files.kept_series(data)
    future, recent = ({k: v for each in found for k, v in part(each).items()} for part in (_future, _recent))
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
    if cutoffs:
        columns = {name: values for each in found for name, values in each.cutoffs.items()}
        files.write_csv(out / files.CV, files.cutoff_frame(data, cutoffs, columns))
    files.write_json(out / files.METRICS, rows)


def _future(found: Forecasts) -> dict[str, np.ndarray]:
    return found.future


def _recent(found: Forecasts) -> dict[str, np.ndarray]:
    return found.recent


def _print_table(rows: list[dict[str, Any]], windows: int, console: Console) -> None:
    best = min(rows, key=lambda row: row["mse"])
    inside = "; per cent: values inside the interval" if any("%" in column for column in columns_of(rows)) else ""
    title = f"{windows:,} test windows; MSE and MAE of standardised values{inside}"
    # Narrow enough for 80 columns with all that can be there.
    table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for column in columns_of(rows):
        name = "params" if column == "parameters" else column
        table.add_column(name, justify="left" if column == "model" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["mse"]):
        cells = shown_row(row, columns_of(rows))
        if row is best:
            cells[0] += "  ← best"
        table.add_row(*cells, style="bold green" if row is best else None)
    console.print(table)
    console.print(verdict(rows), highlight=False)
