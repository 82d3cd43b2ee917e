"""The command line: one function for each command. Heavy imports happen inside them, so that help comes at once."""

import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from selectra import cli_compare
from selectra.choices import Benchmark, DataAction, Part, Sort, Split, Stamps
from selectra.errors import BackendError, ConfigError, DataError, RankError
from selectra.image_commands import explain, predict, refuse_page, write_cases
from selectra.runs import find_run, folder_of, registries
from selectra.spec import Spec, nearest
from selectra.text_commands import tokenize
from selectra.train.stop import FAILED, StoppedError
from selectra.usage import describe_usage, read_levels, read_lookback, with_options
from selectra.values import describe_problem

if TYPE_CHECKING:
    from selectra.registry import Registry, Resolved

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")

USER_ERROR, INTERRUPTED = 2, 130
FORECAST_MODELS = "tsm2,linear,dlinear,seasonal_naive,naive"
TEST_SIZE = "smoke"
# What series models are built with when only their size is asked for.
EXAMPLE_FACTS: dict[str, dict[str, Any]] = {
    "series": {"seq_len": 96, "horizon": 96, "n_series": 7, "season": 24},
    "language": {"vocab_size": 50304},
    "segmentation": {"n_classes": 150},
    "detection": {"n_classes": 80},
}

CITATION = """@software{{selectra,
  title = {{Selectra: selective state-space models on images, time series and language}},
  author = {{{{The Selectra authors}}}},
  version = {{{version}}},
  license = {{Apache-2.0}}
}}"""

Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, such as model.d_state=8 train.epochs=2.")]


def _console(stderr: bool = False) -> Console:
    """The terminal; processes other than the first one are silent."""
    return Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0")


def _installed_version() -> str:
    try:
        return metadata.version("selectra")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _print_version(wanted: bool) -> None:
    if wanted:
        _console().print(f"selectra {_installed_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Selective state-space models on images, time series and language."""


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="A recipe, a model, or the run.json of an earlier training.")],
    changes: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/NAME, or where the run.json lies.")
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Start from the beginning, over what the folder holds.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write for TensorBoard too, beside the record.")
    ] = False,
) -> None:
    """Train a recipe, and go on where an earlier call stopped."""
    from selectra.train.job import train_job  # noqa: PLC0415
    from selectra.train.progress import duration  # noqa: PLC0415

    console, run = _console(), find_run(name, changes or [])
    out = out or folder_of(name) or Path("runs") / run.name
    fitted = train_job(run, out, console, resume=not anew, tensorboard=tensorboard)
    metrics = ", ".join(f"{key} {value:.4f}" for key, value in fitted.best.items())
    console.print(
        f"Done after {fitted.steps} steps, {duration(fitted.seconds)} without evaluations "
        f"(ended by: {fitted.stopped_by}). Best on validation, at step {fitted.best_step}: {metrics}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Everything is in {out}; test it with: {shlex.join(['selectra', 'eval', str(out)])}", soft_wrap=True)


@app.command("eval")
def evaluate(
    out: Annotated[Path, typer.Argument(help="Folder of a training.")],
    split: Annotated[Part, typer.Option(help="The part of the data.")] = Part.test,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: as in training.")] = None,
    changed_data: Annotated[
        bool, typer.Option("--changed-data", help="Also on data that has changed since the training.")
    ] = False,
    page: Annotated[
        bool,
        typer.Option(
            "--page", help="Segmentation, detection, clips: also a page of the best and worst cases of each class."
        ),
    ] = False,
) -> None:
    """Evaluate trained weights, by default on the test part, which `train` never opens."""
    from selectra.train.job import evaluate_job  # noqa: PLC0415

    if page:
        refuse_page(out)
    metrics, count = evaluate_job(out, split.value, batch_size, changed_data)
    _console().print(f"{out}: all {count:,} examples (windows, images, sequences) of this part", highlight=False)
    table = Table("metric", split.value)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6f}")
    _console().print(table)
    if page:
        write_cases(out, split.value, metrics, _console())


app.command()(predict)
app.command()(explain)
app.command()(tokenize)


@app.command("list")
def list_(
    sort: Annotated[Sort | None, typer.Argument(help="What to list; default: all.")] = None,
    kind: Annotated[str | None, typer.Option(help='Only this kind, such as "series".')] = None,
    every: Annotated[bool, typer.Option("--all", help="Also the sizes that exist for tests.")] = False,
) -> None:
    """List what is registered."""
    console, found = _console(), registries()
    kinds = sorted({found[each].entry(name).kind for each in Sort for name in found[each].names()})
    if kind is not None and kind not in kinds:
        raise ConfigError(f"there is no kind '{kind}'; there are {kinds}.{nearest(kind, kinds)}")
    for each, registry in found.items():
        names = [name for name in registry.names(kind) if every or registry.entry(name).size != TEST_SIZE]
        if sort in (None, each) and names:
            console.print(_listing(each, registry, names))


def _listing(sort: Sort, registry: "Registry", names: list[str]) -> Table:
    of_models = sort is Sort.models
    table = Table(title=sort.value, title_justify="left")
    for column in ["name", "kind", *(["parameters", "takes", "state"] if of_models else ["what it is"]), "source"]:
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for name in names:
        entry = registry.entry(name)
        middle = [entry.summary]
        if of_models:
            count, state = _parameters(registry, name)
            middle = [count, ", ".join(entry.takes) or "-", state]
        table.add_row(name, entry.kind, *middle, entry.source or "-")
    if of_models:
        table.caption = (
            "Parameters for 7 series, 96 values in and 96 out; for 1,000 classes, 150 of pixels; for 50,304 tokens."
        )
    return table


def _parameters(registry: "Registry", name: str) -> tuple[str, str]:
    """How many parameters a model has with example facts, and its state: "works", or what it needs beside those."""
    import torch  # noqa: PLC0415

    entry = registry.entry(name)
    # What a published size says of itself is no example.
    facts = {key: value for key, value in EXAMPLE_FACTS.get(entry.kind, {}).items() if key not in entry.defaults}
    try:
        # Nothing is allocated and nothing drawn.
        with torch.device("meta"):
            model = registry.build(Spec(name), facts)
    except ConfigError as error:
        return "-", str(error)
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}", "works"


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe, a model, or a run.json.")],
    changes: Overrides = None,
) -> None:
    """Show every setting with its value and where it comes from; builds nothing."""
    from selectra.train import job  # noqa: PLC0415

    run = job.typed(find_run(name, changes or []))
    table = Table("name", "value", "from", title=run.name, title_justify="left")
    for section, resolved in job.check(run).items():
        spec = getattr(run, section)
        table.add_row(f"[bold]{section}[/bold]", f"[bold]{spec.name}[/bold]", "")
        _add_resolved(table, section, resolved)
    for section in ("optim", "train", "parallel"):
        table.add_row(f"[bold]{section}[/bold]", "", "")
        content = getattr(run, section)
        for field, info in type(content).model_fields.items():
            value = getattr(content, field)
            table.add_row(f"{section}.{field}", str(value), "default" if value == info.default else "run")
    _console().print(table)


def _add_resolved(table: Table, prefix: str, resolved: "dict[str, Resolved]") -> None:
    for name, item in resolved.items():
        value, origin = ("read from the data", "data") if item.origin == "missing" else (repr(item.value), item.origin)
        table.add_row(f"{prefix}.{name}", value, origin)


@app.command()
def forecast(
    file: Annotated[
        Path | None, typer.Argument(help="CSV or parquet, or a public set such as ETTh1; default: New York weather.")
    ] = None,
    model: Annotated[str, typer.Option(help="Models, separated by commas.")] = FORECAST_MODELS,
    lookback: Annotated[
        str, typer.Option(help='Rows that a forecast sees; "auto": chosen on validation for each model.')
    ] = "96",
    horizon: Annotated[int, typer.Option(min=1, help="Rows that are forecast.")] = 24,
    split: Annotated[
        Split, typer.Option(help="ett: 12/4/4 months; ratio: 70/10/20 percent; auto: as the public set's papers.")
    ] = Split.auto,
    target: Annotated[str | None, typer.Option(help="The series that counts; default: all.")] = None,
    time: Annotated[str | None, typer.Option(help="The time column; default: found in the data.")] = None,
    freq: Annotated[str | None, typer.Option(help='Time between rows, such as "h" or "15min"; default: found.')] = None,
    stamps: Annotated[
        Stamps, typer.Option(help="Place rows by their time stamps, or take them as evenly spaced in file order.")
    ] = Stamps.check,
    level: Annotated[str, typer.Option(help='Intervals in percent, separated by commas, or "none".')] = "80,95",
    futr: Annotated[
        Path | None, typer.Option(help="The next rows of covariates known ahead, in columns that FILE has too.")
    ] = None,
    cv: Annotated[int, typer.Option(min=0, help="Forecast also from this many cutoffs in the test part.")] = 0,
    epochs: Annotated[float, typer.Option(help="Most passes over the training windows.")] = 5,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("selectra_forecast"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one batch.")] = 32,
    quick: Annotated[bool, typer.Option("--quick", help="Train briefly, for a first look.")] = False,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto".')] = "auto",
) -> None:
    """Forecast a table of series: train, compare with baselines, write table, picture and page."""
    from selectra.forecaster import ForecastJob, forecast_job  # noqa: PLC0415

    job = ForecastJob(
        file=file, models=tuple(name.strip() for name in model.split(",")), horizon=horizon,
        lookback=read_lookback(lookback), level=read_levels(level), futr=futr, cv=cv,
        split=split.value, target=target, time=time, freq=freq, stamps=stamps.value, epochs=epochs,
        out=out, seed=seed, batch_size=batch_size, quick=quick, device=device,
    )  # fmt: skip
    try:
        forecast_job(job, _console())
    except DataError as error:
        raise DataError(with_options(str(error))) from error


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="Folder of a language model: config.json and weights.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue, all at once.")] = None,
    file: Annotated[Path | None, typer.Option(help="Further prompts, one a line.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help='A tokenizer.json or "bytes"; default: the folder\'s.')] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens for each prompt.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; higher: more varied.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens alone.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that have this probability.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer; may be given again.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1".')] = "cpu",
    dtype: Annotated[str | None, typer.Option(help='Such as "bfloat16"; default: as the model is kept.')] = None,
    graph: Annotated[bool, typer.Option("--graph", help="On a GPU: replay a step as one CUDA graph.")] = False,
) -> None:
    """Continue texts with a language model, shown as they come."""
    from selectra.language.command import GenerateJob, generate_command  # noqa: PLC0415

    draws = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    stops = tuple(stop or ())
    job = GenerateJob(
        folder, tuple(prompts or ()), file, tokenizer, max_new_tokens, draws, stops, seed, device, dtype, graph
    )
    generate_command(job, _console())


@app.command("data")
def data_(
    action: Annotated[
        DataAction, typer.Argument(help="What to do with public sets, or index `shards`.")
    ] = DataAction.list,
    names: Annotated[
        list[str] | None, typer.Argument(help="Sets, such as ETTh1 Weather; default: all. Shards.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="`get`: the folder; default: the user's cache. `shards`: the index.")
    ] = None,
) -> None:
    """List public forecasting sets, get one with a checksum, check the copies here, or index shards of images."""
    from selectra.data.command import data_command  # noqa: PLC0415

    data_command(action.value, names or [], to, _console())


@app.command()
def doctor() -> None:
    """Check this installation: backends, correctness, speed."""
    from selectra.doctor import doctor as examine  # noqa: PLC0415

    raise typer.Exit(examine(_console()))


@app.command()
def bench(
    what: Annotated[
        Benchmark, typer.Argument(help="What to time; `plot` and `tables` only read records.")
    ] = Benchmark.scan,
    file: Annotated[
        Path | None, typer.Argument(help="For `plot` a record of `lengths`, for `tables` a Markdown file.")
    ] = None,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto".')] = "auto",
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Time for each measurement; default: 2 on a CPU, 1 on a GPU (`lengths`: 0.5)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the record (default: none is written); for `plot` the picture.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="The record's own path, instead of --out.")] = None,
    tags: Annotated[
        str | None,
        typer.Option(help="Only these: shapes of `scan` or `cross` (lm,vim-t), models of `model`, parts of `vision`."),
    ] = None,
) -> None:
    """Time operators against the reference and other packages, after checking that they agree."""
    from selectra.bench.command import Wish, bench_command  # noqa: PLC0415

    bench_command(Wish(what.value, file, device, seconds, out, record, tags), _console())


@app.command()
def cite() -> None:
    """Print how to cite Selectra, as BibTeX."""
    _console().print(CITATION.format(version=_installed_version()), highlight=False, markup=False, soft_wrap=True)


app.command()(cli_compare.compare)
app.command()(cli_compare.report)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run a command; a user's error is one line and exit code 2, a stop by hand 130, one by SIGTERM that is saved 0."""
    words = list(sys.argv[1:] if words is None else words)
    errors = _console(stderr=True)
    # typer's own classes for wrong usage are reached through one that it exports.
    usage_error = cast(type[Exception], typer.BadParameter.__mro__[2])
    try:
        code = app(words, prog_name="selectra", standalone_mode=False)
    except usage_error as error:
        errors.print(f"error: {describe_usage(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(USER_ERROR) from error
    except (ConfigError, DataError, BackendError, RankError, *FAILED, ValidationError) as error:
        if "--debug" in words:
            raise
        problem = describe_problem(error) if isinstance(error, ValidationError) else error
        errors.print(f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(USER_ERROR) from error
    except StoppedError as error:
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(INTERRUPTED if error.by_hand else 0) from error
    except (typer.Abort, KeyboardInterrupt) as error:
        errors.print("stopped at once; what was saved before is kept.")
        raise SystemExit(INTERRUPTED) from error
    # typer turns an interruption into the exit code that it returns.
    if code == INTERRUPTED:
        errors.print("stopped at once; what was saved before is kept.")
    raise SystemExit(code if isinstance(code, int) else 0)
