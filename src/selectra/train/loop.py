"""One training, from its beginning or from where it was interrupted, to its best weights; `steps` has the loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from selectra.errors import ConfigError
from selectra.registry import Resolved
from selectra.spec import Run
from selectra.tasks.task import Task
from selectra.train import checkpoint
from selectra.train.batches import Order, Windows, of_each, training_order
from selectra.train.memory import naming_full_memory
from selectra.train.optim import all_warmup
from selectra.train.parallel import World, pick_device, recomputed, split_along_length
from selectra.train.progress import Clock, Display
from selectra.train.record import Record, open_record
from selectra.train.solved import solve
from selectra.train.state import State, StoppedBy
from selectra.train.steps import Steps
from selectra.train.stop import StopFlag, StoppedError, stopping_gently


@dataclass(frozen=True)
class Fitted:
    """What a training came to: the kept weights' metrics on the validation windows, and how it ended."""

    best: dict[str, float]
    best_step: int
    steps: int
    seconds: float
    stopped_by: StoppedBy


def fit(
    model: nn.Module,
    task: Task,
    train_windows: Windows,
    val_windows: Windows | None,
    run: Run,
    out: Path | None = None,
    *,
    progress: bool = True,
    resume: bool = True,
    world: World | None = None,
    console: Console | None = None,
    resolved: Mapping[str, Mapping[str, Resolved]] | None = None,
    data: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
) -> Fitted:
    """Train a model, and leave it with the weights that were best on the validation windows.

    A model with a method `solve` is solved once over the training windows; one without parameters is only evaluated.

    Args:
        out: Folder for run.json, record.jsonl, checkpoints and model.safetensors; None writes nothing.
        resume: Go on from `out`'s checkpoint where there is one; otherwise start anew and overwrite it.
        resolved: What every argument resolved to, for run.json.
        data: What identifies the data; a checkpoint of a training on other data is refused.
        tensorboard: Write the record's numbers for TensorBoard too.

    Raises:
        DataError: There is no room for a checkpoint or the record; the checkpoint before is whole.
        StoppedError: SIGINT or SIGTERM came; the state is saved.
        DivergedError: The loss or a gradient is not finite.
        DeviceMemoryError: The device's memory is full.
        StalledError: The processes that prepare batches do not answer.
    """
    world = world or World(device=pick_device(run.train.device))
    if not val_windows and run.train.patience:
        raise ConfigError("train.patience is set, and there are no validation windows to measure an improvement.")
    learns = any(p.requires_grad for p in model.parameters()) and not hasattr(model, "solve")
    if out is not None and world.first:
        checkpoint.writable_folder(out)
        checkpoint.recover(out)
    order = training_order(train_windows, run.train, world.readers) if learns else None
    if run.train.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if not (world.sharded and learns):
        model.to(world.device)
    state = State(model, run, order, out, world, data)
    # The first process looks for all: the others see its folder, and maybe later.
    resume = resume and learns and out is not None and world.gather(checkpoint.latest(out) is not None)[0]
    length = state.resume() if resume else 0
    board = (tensorboard, state.at.step)
    with (
        checkpoint.full_disk_named(out),
        open_record(out, world, run, resolved, length, data, board) as record,
        stopping_gently() as flag,
    ):
        if order is None:
            solve(state, task, train_windows, val_windows)
            if flag.asked:
                raise StoppedError(0, state.resume_command, flag.by_hand)
            record.write("metrics", step=0, split="val", best=True, **state.at.best)
        else:
            shown = (console or Console()) if progress and world.first else None
            _take_steps(state, task, order, val_windows, record, shown, flag)
    state.take_best()
    return Fitted(state.at.best, state.at.best_step, state.at.step, state.at.seconds, state.at.stopped_by)


def _take_steps(
    state: State, task: Task, order: Order, val_windows: Windows | None, record: Record,
    shown: Console | None, flag: StopFlag,
) -> None:  # fmt: skip
    """All steps that are left, with what they took and what is left on a terminal; None shows nothing."""
    run, readers = state.run, state.world.readers
    n_eval = ceil(len(val_windows) / (readers.size * of_each(run.train.batch_size, readers))) if val_windows else 0
    saves = None if state.out is None else run.train.save_every or state.eval_every
    clock = Clock(state.steps, state.eval_every, (run.train.accumulate, n_eval), saves, state.at.step)
    early = run.train.patience is not None
    warning = all_warmup(run.optim, state.steps)
    if shown is not None and warning is not None:
        shown.print(warning, highlight=False, markup=False, soft_wrap=True)
    with (
        Display(shown, clock, run.name, early) as display,
        split_along_length(state.world, run.parallel.timeout),
        recomputed(state.model, run.train.recompute),
        naming_full_memory(state),
    ):
        try:
            Steps(state, task, order, val_windows, record, display, flag).go()
        finally:
            state.close()
