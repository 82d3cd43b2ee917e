"""`selectra compare` and `selectra report`: heavy imports happen inside, so that help comes at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from selectra.choices import Match
from selectra.errors import ConfigError, DataError

if TYPE_CHECKING:
    from selectra.compare.store import Store
    from selectra.compare.study import Budget as StudyBudget
    from selectra.compare.study import Study

BUDGETS = {"params": "budget_params", "flops": "budget_flops", "latency": "budget_latency"}


def compare(
    what: Annotated[
        str,
        typer.Argument(
            help="forecasting, vision, detection, segmentation, language, costs, a built-in study, or a file of Python "
            "that defines one."
        ),
    ] = "forecasting",
    file: Annotated[
        str | None,
        typer.Argument(
            help="Your table of series, folder of images (in classes, with COCO or VOC annotations, with masks) or "
            "text; default: bundled data. `costs`: language, images, series."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few or small models, briefly trained: minutes on two cores.")
    ] = False,
    store: Annotated[
        Path | None, typer.Option(help="The file of cells and records; an earlier one is gone on with.")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Models, separated by commas, one of them a Mamba; detection, segmentation: backbones."),
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Rows that are forecast; default: 24.")] = None,
    lookback: Annotated[int | None, typer.Option(min=1, help="Rows that a forecast sees; default: 96.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Trainings of every model; at least 3.")] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=0, help="Draws by optuna for every model, in the study's range of learning rates; 0: none."),
    ] = None,
    budget_params: Annotated[
        str | None, typer.Option(help="Bring every model to so many parameters, such as 5M or 300k.")
    ] = None,
    budget_flops: Annotated[str | None, typer.Option(help="Or to so many FLOPs a sample.")] = None,
    budget_latency: Annotated[
        str | None, typer.Option(help="Or to so many milliseconds of a forward pass of 32 samples, here.")
    ] = None,
    match: Annotated[
        Match | None, typer.Option(help="What is turned to meet the budget, width or depth; default: width.")
    ] = None,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto".')] = "auto",
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which nothing is begun any more.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes for what needs no GPU; on a CPU, for all. Default: one; without GPU each core."
        ),
    ] = None,
    packed: Annotated[int, typer.Option(min=1, help="Trainings side by side on the GPU.")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of every training.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows or images in a step.")] = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels of the sides that a folder's images are brought to; segmentation: of training's crops."
        ),
    ] = None,
    tables: Annotated[
        str | None, typer.Option(help="The tables of docs/results/forecasting.md instead: a,b,orders,ablation,costs,c.")
    ] = None,
    points: Annotated[str | None, typer.Option(help="`costs`: only these lengths or sides, such as 500,4096.")] = None,
) -> None:
    """Train models against each other, every finished cell stored at once, and write the page that says who wins."""
    from selectra.compare.questions import Asked, find_study  # noqa: PLC0415

    of_studies = {"--quick": quick, "--seeds": seeds, "--trials": trials, "--horizon": horizon,
                  "--lookback": lookback, "--img-size": img_size, "--budget-flops": budget_flops,
                  "--budget-latency": budget_latency, "--match": match}  # fmt: skip
    if what == "costs":
        given = {**of_studies, "--steps": steps, "--batch-size": batch_size, "--tables": tables, "--workers": workers}
        _costs((file, models, points), given, budget_params, store, device, time_limit)
        return
    if points is not None:
        raise ConfigError("--points are for `compare costs`; a study has its own lengths.")
    if tables is not None or _holds_tables(store):
        if what != "forecasting" or file is not None or quick:
            raise ConfigError("--tables are the built-in tables of forecasters: they take no file, study or --quick.")
        of_studies |= {"--models": models, "--budget-params": budget_params}
        if ignored := [name for name, value in of_studies.items() if value is not None and value is not False]:
            raise ConfigError(f"{ignored[0]} is for studies; the built-in tables of forecasters have their own. "
                              "Leave it out, or leave out --tables and name another --store.")  # fmt: skip
        _tables(store, tables or "a,b", (device, time_limit, workers or 1, packed), (steps or 1000, batch_size or 32))
        return
    budget = _budget({"params": budget_params, "flops": budget_flops, "latency": budget_latency})
    asked = Asked(file, _names(models), quick, lookback, horizon, steps, batch_size, seeds, trials, budget, img_size,
                  None if match is None else match.value)  # fmt: skip
    _study(find_study(what, asked), store, (device, time_limit, workers or _usual_workers(device), packed))


def _study(study: "Study", store: Path | None, how: tuple[str, float | None, int, int]) -> None:
    """Do a study, and write its page; `how` are the device, the time limit, the workers and the trainings side by side.

    Raises:
        DataError: No training succeeded.
    """
    from selectra.compare.conduct import Wish, conduct, failures  # noqa: PLC0415
    from selectra.compare.crew import Crew  # noqa: PLC0415
    from selectra.report.read import refuse_other  # noqa: PLC0415
    from selectra.report.study import BEGINS, refuse_others  # noqa: PLC0415

    path, console = store or Path(f"{study.name}.sqlite"), _console()
    # Before the first training: what is written at the end lies beside the store, as the user's own table may.
    refuse_others(path.with_suffix(""), study.question)
    refuse_other(path.with_suffix(".json"), BEGINS)
    counts = conduct(study, Wish(path, *how), console)
    # Of processes that torchrun started the first one is the last to leave.
    if Crew.found().rank:
        return
    if counts["done"]:
        _report_study(path, None, console)
    elif reasons := failures(path):
        raise DataError(f"no training of '{study.name}' succeeded: {'; '.join(reasons[:3])}")


def _names(models: str | None) -> tuple[str, ...]:
    """The models that are asked for by name."""
    names = () if models is None else tuple(name.strip() for name in models.split(","))
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"--models takes different models, separated by commas; got '{models}'.")
    return names


def _costs(
    chosen: tuple[str | None, str | None, str | None], given: dict[str, object], params: str | None,
    store: Path | None, device: str, time_limit: float | None,
) -> None:  # fmt: skip
    """Measure cost curves, and write their page."""
    from selectra.compare.curve_command import compare_costs  # noqa: PLC0415
    from selectra.compare.curves import Wish  # noqa: PLC0415
    from selectra.compare.questions import amount_of  # noqa: PLC0415
    from selectra.report.costs import refuse_others  # noqa: PLC0415

    refused = [name for name, value in given.items() if value is not None and value is not False]
    if refused:
        raise ConfigError(f"{refused[0]} is for studies; `compare costs` trains nothing to the end.")
    kinds, names, points = (tuple(text.split(",")) if text else () for text in chosen)
    if not all(point.isdigit() and int(point) > 0 for point in points):
        raise ConfigError(f"--points takes whole numbers separated by commas, got '{','.join(points)}'.")
    asked: dict[str, Any] = {
        "models": names,
        "params": None if params is None else amount_of(params),
        "points": tuple(map(int, points)),
    }
    path, console = store or Path("costs.json"), _console()
    if kinds:
        asked["kinds"] = kinds
    refuse_others(path.with_suffix(""))
    compare_costs(Wish(**asked), path, device, time_limit, console)
    _report_json(path, None, console)


def _usual_workers(device: str) -> int:
    """A process for every core, at most four, where there is no GPU; with torchrun its processes are the workers."""
    import os  # noqa: PLC0415

    from selectra.compare.crew import Crew  # noqa: PLC0415

    crew = Crew.found()
    return 1 if crew.size > 1 or crew.device(device).type == "cuda" else max(1, min(4, os.cpu_count() or 1))


def _tables(store: Path | None, tables: str, how: tuple[str, float | None, int, int], budget: tuple[int, int]) -> None:
    from selectra.compare.command import Wish, compare_forecasting  # noqa: PLC0415
    from selectra.compare.forecasting import Budget  # noqa: PLC0415

    names = tuple(name.strip() for name in tables.split(","))
    compare_forecasting(Wish(store or Path("forecasting.sqlite"), names, *how, Budget(*budget)), _console())


def _holds_tables(store: Path | None) -> bool:
    """Whether a file is that of the built-in tables, which is gone on with as such."""
    if store is None or not store.is_file():
        return False
    from selectra.compare.store import Store  # noqa: PLC0415

    opened = Store(store)
    found = opened.recall("budget") is not None
    opened.close()
    return found


def _budget(given: dict[str, str | None]) -> "StudyBudget | None":
    from selectra.compare.questions import amount_of  # noqa: PLC0415
    from selectra.compare.study import Budget  # noqa: PLC0415

    asked = [(name, text) for name, text in given.items() if text is not None]
    if len(asked) > 1:
        raise ConfigError(f"models are brought to one budget; got --budget-{asked[0][0]} and --budget-{asked[1][0]}.")
    return Budget.model_validate({"quantity": asked[0][0], "amount": amount_of(asked[0][1])}) if asked else None


def report(
    records: Annotated[
        Path,
        typer.Argument(
            help="The store of a comparison; JSON records of one or of `compare costs`; or a folder of records."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; a study's Markdown and CSV lie beside it. Default: beside the records."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Where a store's records go, as JSON and CSV; default: beside the store.")
    ] = None,
) -> None:
    """Write the page of a comparison from its records."""
    console = _console()
    for path in (out, export):
        if path is not None and not path.parent.is_dir():
            raise DataError(f"the folder '{path.parent}' does not exist; make it, or name another.")
    if records.is_dir():
        if out is not None and out.stem == "language":
            from selectra.report.language import write_page  # noqa: PLC0415

            write_page(records, out)
            console.print(f"The page is {out}, made from {records}", highlight=False, soft_wrap=True)
            return
        _report_answer(records, out, console)
        return
    if not records.is_file():
        raise DataError(f"there is no '{records}'; `selectra compare` makes one.")
    if records.suffix == ".json":
        _report_json(records, out, console)
        return
    from selectra.compare.store import Store  # noqa: PLC0415

    store = Store(records)
    if store.recall("study") is not None:
        store.close()
        _report_study(records, out, console, export)
    elif store.recall("budget") is None and not any(store.counts().values()):
        store.close()
        raise DataError(f"'{records}' holds nothing yet: its comparison was refused or stopped before it began; "
                        "`selectra compare` goes on with it.")  # fmt: skip
    else:
        _report_tables(store, records, out, export, console)


def _report_answer(folder: Path, out: Path | None, console: Console) -> None:
    """Write what all records of a folder say together."""
    import os  # noqa: PLC0415

    from selectra.compare.answer import collect  # noqa: PLC0415
    from selectra.report.answer import TITLE, write_answer  # noqa: PLC0415
    from selectra.report.answer_plot import write_picture  # noqa: PLC0415
    from selectra.report.read import refuse_other  # noqa: PLC0415

    if not any(folder.glob("*.json")):
        raise DataError(f"there are no records, NAME.json, in '{folder}': `selectra compare` leaves them beside its "
                        "stores.")  # fmt: skip
    content, out = collect(folder), out or Path("answer.md")
    refuse_other(out, f"# {TITLE}\n")
    if content["points"]:
        write_picture(content["points"], out.with_suffix(".png"))
    write_answer(content, out, Path(os.path.relpath(folder, out.parent)).as_posix())
    console.print(content["verdict"], highlight=False, markup=False, soft_wrap=True, style="bold")
    console.print(f"The page is {out}, made from the records in {folder}", highlight=False, soft_wrap=True)


def _report_json(records: Path, out: Path | None, console: Console) -> None:
    from selectra.report import costs  # noqa: PLC0415
    from selectra.report.forecasting import write_page  # noqa: PLC0415
    from selectra.report.study import WHAT, read_study, write_reports  # noqa: PLC0415

    what = _what_of(records)
    if what == costs.WHAT:
        content = costs.read_costs(records)
        paths = costs.write_reports(content, (out or records).with_suffix(""))
        console.print(costs.verdict(content), highlight=False, markup=False, soft_wrap=True, style="bold")
        console.print(f"The page is {paths[0]}, beside {', '.join(each.name for each in (*paths[1:], records))}",
                      highlight=False, soft_wrap=True)  # fmt: skip
        return
    if what == WHAT:
        paths = write_reports(read_study(records), (out or records).with_suffix(""))
        console.print(f"The page is {paths[0]}, made from {records}", highlight=False, soft_wrap=True)
        return
    out = out or Path("forecasting.md")
    write_page(records, out)
    console.print(f"The page is {out}, made from {records}", highlight=False, soft_wrap=True)


def _what_of(records: Path) -> object:
    """What a file of records says that it is, wherever it says so; None where it says nothing."""
    import json  # noqa: PLC0415

    try:
        content = json.loads(records.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"'{records}' cannot be read as records: {error}.") from error
    return content.get("what") if isinstance(content, dict) else None


def _report_tables(store: "Store", records: Path, out: Path | None, export: Path | None, console: Console) -> None:
    from selectra.compare.export import BEGINS, COLUMNS, write  # noqa: PLC0415
    from selectra.report.read import refuse_other  # noqa: PLC0415

    target = export or records.with_suffix(".json")
    for path, begins in ((target, BEGINS), (target.with_suffix(".csv"), ",".join(COLUMNS[:4]))):
        refuse_other(path, begins)
    write(store, target)
    store.close()
    _report_json(target, out, console)


def _report_study(path: Path, out: Path | None, console: Console, export: Path | None = None) -> None:
    """Export a study's records and write its page, Markdown and CSV."""
    from selectra.compare.results import write_results  # noqa: PLC0415
    from selectra.report.read import refuse_other  # noqa: PLC0415
    from selectra.report.study import BEGINS, read_study, write_reports  # noqa: PLC0415

    records = export or path.with_suffix(".json")
    refuse_other(records, BEGINS)
    write_results(path, records)
    content = read_study(records)
    paths = write_reports(content, (out or path).with_suffix(""))
    console.print(content["verdict"]["text"], highlight=False, markup=False, soft_wrap=True, style="bold")
    console.print(f"The page is {paths[0]}, beside {', '.join(each.name for each in (*paths[1:], records))}",
                  highlight=False, soft_wrap=True)  # fmt: skip


def _console() -> Console:
    from selectra.cli import _console as made  # noqa: PLC0415

    return made()
