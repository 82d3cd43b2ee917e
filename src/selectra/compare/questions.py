"""The studies that a user asks for by name, by a file of Python, or by a table, a folder or a text of their own."""

import runpy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from selectra import data as _data
from selectra import models as _models
from selectra import tasks as _tasks
from selectra.compare.amounts import amount_of
from selectra.compare.dense import Dense, ask_dense
from selectra.compare.study import FEWEST_SEEDS, Budget, Study, Tuning, Variant
from selectra.compare.usual_models import (
    FORECASTERS,
    IMAGE_MODELS,
    QUICK_FORECASTERS,
    QUICK_IMAGE_MODELS,
    kind_of,
)
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets, models, studies
from selectra.spec import Optim, Run, Spec, Train, nearest, override
from selectra.values import describe_problem

__all__ = ["Asked", "_data", "_models", "_tasks", "amount_of", "dense_study", "find_study", "forecasting_study",
           "language_study", "vision_study"]  # fmt: skip

RATES = (2e-4, 1e-3, 5e-3)
RANGE = (1e-4, 1e-2)
DECLARED = {"optim.lr": "models want different learning rates, so each gets the best of the same trials"}
LENGTHS = (96, 200, 336, 720)
LOOKBACK, HORIZON = 96, 24
# Options that only forecasts have.
ROWS = ("lookback", "horizon")
# Studies of a user's own data.
NAMED = ("forecasting", "vision", "language", "detection", "segmentation")


@dataclass(frozen=True)
class Asked:
    """What the command line says about a study; None leaves what the study has.

    Args:
        file: A table of series, a folder of images, with objects or masks or in classes, or a text.
        models: Names, for a study of a user's own data.
        quick: For a first look within minutes.
        lookback: Rows that a forecast sees; None is 96.
        horizon: Rows that are forecast; None is 24.
        trials: Draws by optuna from the study's own ranges, or between its own values, in place of these.
        img_size: Pixels of the sides that images of a folder are brought to, of segmentation those of training's crops;
            None where all images of classes have one size, else a usual one.
        match: What is turned to meet the budget.
    """

    file: str | None = None
    models: tuple[str, ...] = ()
    quick: bool = False
    lookback: int | None = None
    horizon: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    seeds: int | None = None
    trials: int | None = None
    budget: Budget | None = None
    img_size: int | None = None
    match: Literal["width", "depth"] | None = None


def find_study(what: str, asked: Asked) -> Study:
    """The study that a word stands for: one of `NAMED`, a built-in name, or a file of Python.

    Raises:
        ConfigError: There is none, it cannot be read, or something is asked that would have no effect on it.
    """
    if what == "forecasting":
        _refuse(asked, ("img_size",), "`compare vision`; a forecast has --lookback and --horizon")
        study = forecasting_study(asked)
    elif what == "vision":
        _refuse(asked, ROWS, "`compare forecasting`; images have --img-size")
        study = vision_study(asked)
    elif what in ("detection", "segmentation"):
        _refuse(asked, ROWS, "`compare forecasting`; images have --img-size")
        study = dense_study(what, asked)
    elif what == "language":
        _refuse(asked, (*ROWS, "img_size"), "other kinds of data; a text's pieces are as long as the study says")
        study = language_study(asked)
    else:
        _refuse(asked, ("quick", "models", "img_size"),
                f"`compare` of {', '.join(NAMED)}; other studies say it themselves")  # fmt: skip
        if what.endswith(".py"):
            _refuse(asked, ("file", *ROWS), "studies that have a name; one in a file of Python says its data itself")
            study = _from_file(Path(what))
        else:
            study = _on_data(_built_in(what), asked)
    return _changed(study, asked)


def _refuse(asked: Asked, names: Sequence[str], belongs: str) -> None:
    """Refuse what would have no effect.

    Args:
        belongs: What it is for, and where the study in hand has the like.
    """
    usual = Asked()
    for name in names:
        if getattr(asked, name) != getattr(usual, name):
            option = "the second argument" if name == "file" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for {belongs}; leave it out.")


def _on_data(study: Study, asked: Asked) -> Study:
    """A built-in study on a user's tables or folders, each of them a base, in place of the bundled data."""
    first, bases = study.bases[0], []
    rows = datasets.entry(first.data.name).kind == "series"
    if not rows:
        _refuse(asked, ROWS, f"studies of series, and '{study.name}' is none")
    if asked.file is None:
        _refuse(asked, ROWS, f"a table of your own, as in `compare {study.name} my.csv`; without one '{study.name}' "
                "has its own data")  # fmt: skip
        return study
    for file in asked.file.split(","):
        name = Path(file).name.split(".")[0]
        if rows:
            shape = {"seq_len": asked.lookback or LOOKBACK, "horizon": asked.horizon or HORIZON}
            name, data = f"{name} {shape['horizon']}", first.data.replace(path=file, **shape)
        else:
            data = first.data.replace(path=file)
        bases.append(first.model_copy(update={"name": name, "data": data}))
    return study.model_copy(update={"bases": tuple(bases)})


def _built_in(name: str) -> Study:
    from selectra.recipes import studies as _filled  # noqa: F401, PLC0415

    if name not in studies.names():
        known = [*NAMED, *studies.names()]
        raise ConfigError(f"there is no study '{name}'; there are {known}, and files of Python.{nearest(name, known)}")
    return studies.build(Spec(name))


def _from_file(path: Path) -> Study:
    """The one Study that a file defines, as a value or as a function without arguments.

    Raises:
        ConfigError: There is no such file, it cannot be run, or it defines no study or several; with file and line.
    """
    if not path.is_file():
        raise ConfigError(f"there is no '{path}'; a study is a file of Python that defines a selectra Study.")
    try:
        found = runpy.run_path(str(path))
        mine = {name: value for name, value in found.items() if isinstance(value, Study)}
        if not mine:
            makers = {name: value for name, value in found.items()
                      if getattr(value, "__annotations__", {}).get("return") in (Study, "Study")}  # fmt: skip
            mine = {name: make() for name, make in makers.items()}
    except SyntaxError as error:
        raise ConfigError(f"'{error.filename}', line {error.lineno}, is no Python: {error.msg}.") from error
    except (ValidationError, ConfigError, ImportError, NameError) as error:
        problem = f"{error.title}: {describe_problem(error)}" if isinstance(error, ValidationError) else error
        raise ConfigError(f"'{path}', line {_line_in(path, error)}: {problem}") from error
    if len(mine) != 1:
        raise ConfigError(f"'{path}' defines {len(mine)} studies{': ' + ', '.join(mine) if mine else ''}; "
                          "it must define one, as `study = Study(...)`.")  # fmt: skip
    return next(iter(mine.values()))


def _line_in(path: Path, error: Exception) -> int | None:
    """The line of a file that an error came through last."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == str(path)]
    return lines[-1] if lines else None


def _changed(study: Study, asked: Asked) -> Study:
    """The study with what the command line says otherwise, checked again."""
    changes: dict[str, Any] = {}
    words = [f"train.{name}={value}" for name, value in (("steps", asked.steps), ("batch_size", asked.batch_size))
             if value is not None]  # fmt: skip
    if words:
        changes["bases"] = tuple(_paced(base, override(base, words)) for base in study.bases)
    if asked.seeds is not None:
        changes["seeds"] = asked.seeds
    budget = asked.budget or study.budget
    if budget is None and asked.match is not None:
        raise ConfigError(f"--match {asked.match} turns models to a budget, and there is none; "
                          "name one, such as --budget-params 5M.")  # fmt: skip
    if budget is not None:
        changes["budget"] = budget if asked.match is None else budget.model_copy(update={"over": asked.match})
    if asked.trials:
        prune = study.tuning is None or study.tuning.prune
        changes["tuning"] = Tuning(ranges=_ranges(study), trials=asked.trials, prune=prune)
        changes["declared"] = {**DECLARED, **study.declared}
    elif asked.trials == 0 and study.tuning is not None:
        # Without trials these settings differ between no models, unless a variant changes them itself.
        own = {word.partition("=")[0] for variant in study.variants for word in variant.changes}
        gone = set(study.tuning.names) - own
        changes["tuning"] = None
        changes["declared"] = {name: reason for name, reason in study.declared.items() if name not in gone}
    return Study.model_validate({**dict(study), **changes})


def _ranges(study: Study) -> dict[str, tuple[float, float]]:
    """What is drawn from: the study's own ranges, or from the least to the greatest of its own values.

    Raises:
        ConfigError: Its values span no range.
    """
    if study.tuning is None:
        return {"optim.lr": RANGE}
    found = dict(study.tuning.ranges)
    for name, values in study.tuning.values.items():
        numbers = [each for each in values if isinstance(each, (int, float)) and not isinstance(each, bool)]
        if len(numbers) < len(values) or not 0 < min(numbers) < max(numbers):
            raise ConfigError(
                f"the study '{study.name}' tries {name} in {list(values)}, between which nothing can be drawn; "
                "leave --trials, or give the study `ranges`."
            )
        found[name] = (min(numbers), max(numbers))
    return found


def _paced(before: Run, run: Run) -> Run:
    """At least four evaluations, and of fewer steps no larger a share that only warms up, whatever number is asked."""
    steps, words = run.train.steps, []
    if steps is None:
        return run
    if run.train.eval_every is not None and run.train.eval_every > steps // 4:
        words.append(f"train.eval_every={max(1, steps // 8)}")
    if before.train.steps is not None and steps < before.train.steps:
        words.append(f"optim.warmup_steps={run.optim.warmup_steps * steps // before.train.steps}")
    return override(run, words)


def forecasting_study(asked: Asked) -> Study:
    """Forecasters against each other on a user's table, or on the New York weather that comes with the package."""
    steps, models_ = (200, _chosen(asked.models, QUICK_FORECASTERS)) if asked.quick else (
        1000, _chosen(asked.models, dict.fromkeys(FORECASTERS)))  # fmt: skip
    name = Path(asked.file).name.split(".")[0] if asked.file else "New York weather"
    if asked.file and Path(asked.file).suffix and not Path(asked.file).is_file():
        raise DataError(f"there is no '{asked.file}'; name a table of series, or a public set such as ETTh1.")
    data = Spec("series_file", **({"path": asked.file} if asked.file else {}), seq_len=asked.lookback or LOOKBACK,
                horizon=asked.horizon or HORIZON)  # fmt: skip
    base = Run(
        name=name,
        model=Spec("naive"),
        data=data,
        task=Spec("forecasting", loss="mse"),
        optim=Optim(lr=RATES[1], weight_decay=0.01, warmup_steps=20),
        train=Train(steps=steps, batch_size=32, eval_every=max(1, steps // (4 if asked.quick else 10))),
    )
    return _study(f"forecasting_{_short(name)}", f"Should I use Mamba to forecast {name}?", base, models_, asked)


def vision_study(asked: Asked) -> Study:
    """Image classifiers against each other on a user's folder.

    Raises:
        ConfigError: This installation has no data set of images.
    """
    if "images" not in datasets.names("image"):
        raise ConfigError("`compare vision` needs the data set 'images', which this Selectra does not have; "
                          "a study in a file of Python can name its own data.")  # fmt: skip
    name = Path(asked.file).name if asked.file else "drawn shapes"
    steps, usual = (200, QUICK_IMAGE_MODELS) if asked.quick else (2000, IMAGE_MODELS)
    views = {"crop": 4, "flip": 0.5, **({"img_size": asked.img_size} if asked.img_size else {})}
    base = Run(
        name=name,
        model=Spec("vit_smoke"),
        data=Spec("images", **({"path": asked.file} if asked.file else {}), **views),
        task=Spec("classification"),
        optim=Optim(lr=RATES[1], weight_decay=0.05, warmup_steps=steps // 20),
        train=Train(steps=steps, batch_size=32 if asked.quick else 64, eval_every=steps // (4 if asked.quick else 8)),
    )
    known = {name: spec for name, spec in usual.items() if spec.name in models.names("image")}
    study = _study(f"vision_{_short(name)}", f"Should I use Mamba to classify {name}?", base,
                   _chosen(asked.models, known), asked)  # fmt: skip
    return study.model_copy(update={"metric": "top1", "higher_is_better": True, "lengths": ()})


def dense_study(kind: Dense, asked: Asked) -> Study:
    """Backbones against each other below one detector, or one segmentation head, on a user's folder.

    Raises:
        ConfigError: A backbone is unknown, or no model of images.
    """
    found = ask_dense(kind, asked.file, asked.models, asked.quick, asked.img_size)
    kinds = {name: kind_of(spec) for name, spec in found.backbones.items()}
    study = _study(f"{kind}_{_short(found.base.name)}", f"Should I use Mamba to {found.title}?", found.base,
                   found.models, asked, kinds)  # fmt: skip
    return study.model_copy(update={"metric": found.metric, "higher_is_better": True, "lengths": ()})


def language_study(asked: Asked) -> Study:
    """Language models against each other on a user's text, JSONL or parquet file, byte by byte.

    Without a file: the built-in study on Tiny Shakespeare. With `quick`, models of 0.4 million parameters.
    """
    from selectra.recipes.studies.language_shared import SMALL, TEN_MILLION  # noqa: PLC0415

    built_in = _built_in("language_shakespeare")
    if not (asked.file or asked.quick or asked.models):
        return built_in
    if asked.file and not Path(asked.file).is_file():
        raise DataError(f"there is no '{asked.file}'; name a text, JSONL or parquet file.")
    base, name = built_in.bases[0], Path(asked.file).name.split(".")[0] if asked.file else "Tiny Shakespeare"
    data = Spec("text_file", path=asked.file, seq_len=256, stride=16) if asked.file else base.data
    words = [f"name={name}"]
    if asked.quick:
        data = data.replace(seq_len=128)
        words += ["train.steps=200", "train.batch_size=16", "train.eval_every=50", "train.precision=float32",
                  "optim.warmup_steps=20"]  # fmt: skip
    base = override(base.model_copy(update={"data": data}), words)
    study = _study(f"language_{_short(name)}", f"Should I use Mamba to model {name}?", base,
                   _chosen(asked.models, SMALL if asked.quick else TEN_MILLION), asked)  # fmt: skip
    budget = Budget(quantity="params", amount=4.2e5 if asked.quick else 1.06e7, align=8)
    return study.model_copy(update={"metric": "loss", "lengths": (), "budget": budget, "tuning": built_in.tuning})


def _study(
    name: str, question: str, base: Run, chosen: Mapping[str, Spec], asked: Asked,
    kinds: Mapping[str, str] | None = None,
) -> Study:  # fmt: skip
    """A study with the same trials for all.

    Args:
        kinds: The sorts of the models, where these do not say it themselves.
    """
    kinds = kinds or {each: kind_of(spec) for each, spec in chosen.items()}
    if len(chosen) < 2:
        raise ConfigError(f"{list(chosen)} is one model, and a comparison is of two or more; name another.")
    variants = tuple(Variant(name=each, model=spec, kind=kinds[each]) for each, spec in chosen.items())
    if not any(each.kind == "mamba" for each in variants):
        raise ConfigError(f"none of {list(chosen)} is a Mamba model; name one, such as {_example(base.task)}.")
    return Study(
        name=name, question=question, bases=(base,), variants=variants, subject="mamba", subject_title="Mamba",
        seeds=FEWEST_SEEDS if asked.seeds is None else asked.seeds, declared=DECLARED,
        tuning=Tuning(values={"optim.lr": RATES}), lengths=LENGTHS,
    )  # fmt: skip


def _chosen(names: Sequence[str], usual: Mapping[str, Spec | None]) -> dict[str, Spec]:
    found = {}
    for name in names or usual:
        spec = usual.get(name) or Spec(name)
        # An unknown name is refused in the registry's words.
        models.entry(spec.name)
        found[name] = spec
    return found


def _example(task: Spec) -> str:
    """A Mamba model for a task."""
    return {"forecasting": "tsm2", "language": "mamba_lm"}.get(task.name, "vmamba")


def _short(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())
