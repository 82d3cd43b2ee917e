"""A run from its written form to its result: look names up, check, build, train or evaluate."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from torch import nn

# Importing the rooms fills the registries.
from selectra import data as _data
from selectra import models as _models
from selectra.errors import ConfigError, DataError
from selectra.language.checkpoint import save_pretrained
from selectra.language.model import LanguageModel
from selectra.pretrained import load_pretrained
from selectra.registry import Resolved, datasets, models, tasks
from selectra.spec import Parallel, Run, Spec
from selectra.tasks.task import Task
from selectra.train.checkpoint import WEIGHTS, latest, load_weights, replacing, writable_folder
from selectra.train.depth import freeze
from selectra.train.deterministic import fix_products
from selectra.train.evaluation import evaluate
from selectra.train.loop import Fitted, fit
from selectra.train.parallel import World, joined
from selectra.train.record import environment, read_data, read_run
from selectra.train.same_data import describe_data, refuse_changed
from selectra.train.sharding import require_gather

__all__ = ["Built", "_data", "_models", "build", "check", "evaluate_job", "train_job", "typed"]

# Folder of a trained language model, in the Hugging Face layout.
PRETRAINED = "pretrained"
Tables = dict[str, dict[str, Resolved]]
OF_IMAGES = ("n_classes", "in_channels", "img_size")
# What all data of a kind say once they are read: a model's own default for it is never used.
FACTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "series": ("seq_len", "horizon", "n_series"), "language": ("vocab_size", "seq_len"),
        "video": (*OF_IMAGES, "n_frames"), **dict.fromkeys(("image", "segmentation", "detection"), OF_IMAGES),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """What a run names, built."""

    data: Any
    model: nn.Module
    task: Task
    resolved: Tables


def typed(run: Run) -> Run:
    """The run with every text value read by its annotation; unknown names and values that do not fit are refused."""
    changes = {"model": models.typed(run.model), "data": datasets.typed(run.data), "task": tasks.typed(run.task)}
    return run.model_copy(update=changes)


def facts_in(spec: Spec) -> dict[str, Any]:
    """What the data's own arguments say before the data is read, such as the horizon."""
    return {name: item.value for name, item in datasets.resolve(spec, partial=True).items()}


def check(run: Run) -> Tables:
    """Resolve everything that can be resolved without reading the data; builds nothing.

    What only the data will say has the origin "missing".

    Raises:
        ConfigError: A name, an argument or a value does not fit, or the task cannot train this kind of model.
    """
    facts = facts_in(run.data)
    kind = tasks.entry(run.task.name).kind
    for registry, name in ((models, run.model.name), (datasets, run.data.name)):
        found = registry.entry(name).kind
        if found != kind:
            raise ConfigError(
                f"the {registry.what} '{name}' is for {found}, and the task '{run.task.name}' for {kind}."
            )
    tables = {"data": datasets.resolve(run.data, partial=True), "task": tasks.resolve(run.task, partial=True)}
    if run.parallel.kind == "length" and kind != "language":
        raise ConfigError(f"parallel.kind=length splits sequences of language models; the task is for {kind}.")
    model = models.resolve(run.model, facts, partial=True)
    unread = [name for name in FACTS.get(kind, ()) if name in model and model[name].origin in ("default", "size")]
    return {"model": model | {name: Resolved(None, "missing") for name in unread}, **tables}


def build(run: Run) -> Built:
    """Build the data, then the model from its facts, then the task.

    Raises:
        ConfigError: As `check`, and where the run contradicts the data.
    """
    if run.train.threads is not None:
        torch.set_num_threads(run.train.threads)
    data = datasets.build(run.data)
    resolved = {
        "data": datasets.resolve(run.data),
        "model": models.resolve(run.model, data.facts),
        "task": tasks.resolve(run.task, data.facts),
    }
    torch.manual_seed(run.train.seed)
    with torch.device("meta") if in_parts(run) else nullcontext():
        model = models.build(run.model, data.facts)
    return Built(data, model, tasks.build(run.task, data.facts).for_data(data), resolved)


def train_job(run: Run, out: Path, console: Console, resume: bool = True, tensorboard: bool = False) -> Fitted:
    """Train a run into a folder, and say what came of it."""
    run = typed(run)
    check(run)
    require_gather(run)
    if run.train.deterministic:
        fix_products()
    writable_folder(out)
    with joined(run.parallel, run.train.device) as world:
        built = build(run)
        begin_from(built.model, run, None if not resume else out, console)
        if world.first:
            for line in built.data.summary():
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            count = sum(p.numel() for p in built.model.parameters())
            trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
            part = f" ({trained:,} trained)" if trained < count else ""
            console.print(f"{run.model.name}: {count:,} parameters{part}, on {world.device}", highlight=False)
        kept = world.first and isinstance(built.model, LanguageModel) and _can_be_kept(built.model, console)
        train, val = built.data.windows("train"), built.data.windows("val")
        fitted = fit(
            built.model, built.task, train, val, run, out,
            resume=resume, world=world, console=console, resolved=built.resolved,
            data=describe_data(built.data), tensorboard=tensorboard,
        )  # fmt: skip
        if kept and isinstance(built.model, LanguageModel):
            # What `selectra generate` reads, with the best weights.
            save_pretrained(_in_one_piece(built.model, run, built.data.facts, out, world), out / PRETRAINED)
            # Generated examples are no text.
            if hasattr(built.data, "tokenizer"):
                built.data.tokenizer.save(out / PRETRAINED)
    return fitted


def _can_be_kept(model: LanguageModel, console: Console) -> bool:
    """Whether the trained model can be kept for `selectra generate`; if not, it is said before the training."""
    try:
        model.hugging_face()
    except ConfigError as error:
        line = f"There will be no folder '{PRETRAINED}' for `selectra generate`: {error}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        return False
    return True


def in_parts(run: Run) -> bool:
    """Whether weights are made by the processes that hold them, once the model is cut.

    Raises:
        ConfigError: Nothing is cut, or the weights are to come from a file.
    """
    if run.parallel.in_parts and run.parallel.kind != "fsdp2":
        raise ConfigError(f"parallel.in_parts goes with parallel.kind=fsdp2; it is '{run.parallel.kind}'.")
    if run.parallel.in_parts and run.train.pretrained is not None:
        raise ConfigError("parallel.in_parts makes weights, and train.pretrained reads them; take one of the two.")
    return run.parallel.in_parts


def _in_one_piece(model: LanguageModel, run: Run, facts: Mapping[str, Any], out: Path, world: World) -> LanguageModel:
    """The model with its best weights: itself, or a copy where it is spread over processes."""
    if not world.sharded:
        return model
    copy: Any = models.build(run.model, facts)
    load_weights(out / WEIGHTS, copy)
    return copy


def begin_from(model: nn.Module, run: Run, resumed: Path | None, console: Console) -> None:
    """Take the weights to start from, and freeze what the run says; a training that goes on has its weights.

    Args:
        resumed: Folder whose checkpoint will be gone on with, if it has one; None starts anew.

    Raises:
        DataError: The file is missing or damaged, or of another model.
        ConfigError: There is nothing to freeze so much of.
    """
    path, goes_on = run.train.pretrained, resumed is not None and latest(resumed) is not None
    if path is not None and not goes_on:
        loaded = load_pretrained(model, path)
        what = (("resized", loaded.resized), ("starting afresh", loaded.fresh))
        notes = [f"{word}: {', '.join(names)}" for word, names in what if names]
        line = f"Weights of '{path}'" + (f" ({'; '.join(notes)})" if notes else "") + "."
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    freeze(model, run.train.freeze)


def evaluate_job(
    out: Path, split: str, batch_size: int | None, changed_data: bool = False
) -> tuple[dict[str, float], int]:
    """Evaluate the stored weights of a trained run on a split, and write them down; also, how many windows.

    Args:
        changed_data: Evaluate also on data that has changed since the training.

    Raises:
        ConfigError: The split has no windows, or the folder holds no run.
        DataError: There are no weights, or the data has changed since the training.
    """
    run = read_run(out)
    # Alone or by torchrun, however the training was.
    with joined(run.parallel.model_copy(update={"kind": "auto"}), run.train.device) as world:
        built = build(run.model_copy(update={"parallel": Parallel()}))
        if not changed_data:
            advice = "Bring the data back, or evaluate on it as it is now with --changed-data."
            refuse_changed(read_data(out), describe_data(built.data), str(out), advice)
        load_weights(out / WEIGHTS, built.model)
        windows = built.data.windows(split)
        if len(windows) == 0:
            raise DataError(f"the split '{split}' has no windows.")
        size = batch_size or run.train.batch_size
        model, evaluator = built.model.to(world.device), built.task.evaluator()
        workers, limit = run.train.workers, run.train.load_timeout
        metrics = evaluate(
            model, built.task, windows, size, world, run.train.precision, evaluator, workers=workers, limit=limit
        )
        if world.first:
            details = getattr(evaluator, "details", dict)()
            _write_metrics(out, split, {"windows": len(windows), "metrics": metrics, **details}, world)
    return metrics, len(windows)


def _write_metrics(out: Path, split: str, found: dict[str, Any], world: World) -> None:
    content = {"split": split, **found, "processes": world.size, **environment()}
    with replacing(out / f"{split}.json") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
