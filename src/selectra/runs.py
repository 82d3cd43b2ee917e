"""The run that a name on the command line stands for. Heavy imports happen inside, so that help comes at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selectra.choices import Sort
from selectra.errors import ConfigError
from selectra.spec import Run, Spec, nearest, override

if TYPE_CHECKING:
    from selectra.registry import Registry

USUAL_DATA = {"series": "series_file", "image": "images", "video": "moving_shapes"}


def registries() -> "dict[Sort, Registry]":
    """All registries, filled."""
    from selectra import data, models, recipes, registry, tasks  # noqa: F401, PLC0415
    from selectra.recipes import studies  # noqa: F401, PLC0415

    return {
        Sort.models: registry.models,
        Sort.data: registry.datasets,
        Sort.tasks: registry.tasks,
        Sort.recipes: registry.recipes,
        Sort.studies: registry.studies,
    }


def find_run(name: str, words: Sequence[str]) -> Run:
    """The run that a recipe, a model or a run.json stands for, with changes."""
    from selectra.train.record import read_run  # noqa: PLC0415

    found, folder = registries(), folder_of(name)
    if folder is not None:
        return override(read_run(Path(name)), words)
    recipes, models = found[Sort.recipes], found[Sort.models]
    if name in recipes.names():
        return override(recipes.build(Spec(name)), words)
    if name in [*models.names(), *models.families()]:
        return override(_usual_run(name, found, words), words)
    empty = " (the folder of this name holds no run.json)" if Path(name).is_dir() else ""
    known = [*recipes.names(), *models.names(), *models.families()]
    raise ConfigError(
        f"'{name}' is no recipe, model or run.json{empty}; recipes are {recipes.names()}, "
        f"models {models.names()}.{nearest(name, known)}"
    )


def folder_of(name: str) -> Path | None:
    """Where the run.json lies that `name` stands for; None for the name of a recipe or a model, which comes first."""
    found, path = registries(), Path(name)
    if name in [*found[Sort.recipes].names(), *found[Sort.models].names(), *found[Sort.models].families()]:
        return None
    if name.endswith(".json") and not path.is_dir():
        return path.parent
    return path if (path / "run.json").exists() else None


def _usual_run(model: str, found: "dict[Sort, Registry]", words: Sequence[str]) -> Run:
    """A model on the data set and the task that the words name, or else on those of its kind."""
    kind = found[Sort.models].entry(model).kind
    data, task = found[Sort.data].names(kind), found[Sort.tasks].names(kind)
    usual = [USUAL_DATA[kind]] if USUAL_DATA.get(kind) in data else data
    named = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    data_set, usual_task = named.get("data"), named.get("task")
    if (data_set is None and len(usual) != 1) or (usual_task is None and len(task) != 1):
        raise ConfigError(
            f"'{model}' alone does not say what to train on: for {kind} there are {data} and {task}. Add data=NAME, "
            "and task=NAME where there are several."
        )
    return Run(model=Spec(model), data=Spec(data_set or usual[0]), task=Spec(usual_task or task[0]), name=model)
