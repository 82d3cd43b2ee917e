"""The one training loop. Of a task it knows `loss`, `evaluator` and `score`, of a batch `to`, and nothing else."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
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
from selectra.tasks.task import Loss, Task, nothing_of
from selectra.train import checkpoint
from selectra.train.batch_norms import together
from selectra.train.batches import Passes, TrainingOrder, Windows
from selectra.train.depth import training_mode
from selectra.train.evaluation import evaluate
from selectra.train.optim import clip, require_finite, scale_gradients
from selectra.train.parallel import World, pick_device, recomputed, wait_for_gradients, wrap
from selectra.train.precision import Precision, autocast, overflowed
from selectra.train.progress import Clock, Display
from selectra.train.record import BackendWatch, Record, open_record
from selectra.train.sentinel import Draws, first_broken
from selectra.train.state import State, StoppedBy
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
) -> Fitted:
    """Train a model, and leave it with the weights that were best on the validation windows.

    A model with a method `solve` is solved once over the training windows; one without parameters is only evaluated.

    Args:
        out: Folder for run.json, record.jsonl, checkpoints and model.safetensors; None writes nothing.
        resume: Go on from `out`'s checkpoint where there is one; otherwise start anew and overwrite it.
        resolved: What every argument resolved to, for run.json.
        data: What identifies the data; a checkpoint of a training on other data is refused.

    Raises:
        DataError: There is no room for a checkpoint or the record; the checkpoint before is whole.
        StoppedError: SIGINT or SIGTERM came; the state is saved.
        DivergedError: The loss or a gradient is not finite.
    """
    world = world or World(device=pick_device(run.train.device))
    if not val_windows and run.train.patience:
        raise ConfigError("train.patience is set, and there are no validation windows to measure an improvement.")
    learns = any(p.requires_grad for p in model.parameters()) and not hasattr(model, "solve")
    if out is not None and world.first:
        checkpoint.writable_folder(out)
    order = TrainingOrder(train_windows, run.train, world) if learns else None
    if run.train.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if not (world.sharded and learns):
        model.to(world.device)
    state = State(model, run, order, out, world, data)
    # The first process looks for all: the others see its folder, and maybe later.
    resume = resume and learns and out is not None and world.gather(checkpoint.latest(out) is not None)[0]
    length = state.resume() if resume else 0
    shown = (console or Console()) if progress and world.first else None
    with (
        checkpoint.full_disk_named(out),
        open_record(out, world, run, resolved, length, data) as record,
        stopping_gently() as flag,
    ):
        if order is None:
            _solve(state, task, train_windows, val_windows)
            if flag.asked:
                raise StoppedError(0, state.resume_command, flag.by_hand)
            record.write("metrics", step=0, split="val", best=True, **state.at.best)
        else:
            n_eval = ceil(len(val_windows) / run.train.batch_size) if val_windows else 0
            clock = Clock(state.steps, state.eval_every, (run.train.accumulate, n_eval))
            early = run.train.patience is not None
            with Display(shown, clock, run.name, early) as display, recomputed(model, run.train.recompute):
                try:
                    Steps(state, task, order, val_windows, record, display, flag).go()
                finally:
                    state.close()
    state.take_best()
    return Fitted(state.at.best, state.at.best_step, state.at.step, state.at.seconds, state.at.stopped_by)


def _solve(state: State, task: Task, train: Windows, val: Windows | None) -> None:
    """Models that learn nothing by gradient; every process sees all training windows."""
    began, solve = time.monotonic(), getattr(state.model, "solve", None)
    if solve is not None:
        solve(Passes(train, state.run.train.batch_size, state.world.device))
    if val:
        metrics = evaluate(state.model, task, val, state.run.train.batch_size, state.world, state.run.train.precision)
        state.note(metrics, task.score(metrics))
    state.keep()
    state.at.seconds = time.monotonic() - began
    state.at.stopped_by = "nothing to train" if solve is None else "solved"


class Steps:
    """Steps, evaluations and checkpoints of one training by gradient."""

    def __init__(
        self, state: State, task: Task, order: TrainingOrder, val: Windows | None, record: Record, display: Display,
        flag: StopFlag,
    ) -> None:  # fmt: skip
        self.state, self.task, self.order, self.val = state, task, order, val
        self.record, self.display, self.flag = record, display, flag
        self.batches = order.start_at(state.at.position)
        self.wrapped = wrap(state.model, state.world, state.run.train.compile)
        self.together = together(state.model, state.world, state.run.train.compile)
        training_mode(state.model)
        self.precision: Precision = state.run.train.precision
        self.watch = BackendWatch()
        self.stop = False

    def go(self) -> None:
        # What was due when the training was interrupted comes first.
        if not self.state.at.stopped_by:
            self.after_step()
        while not self.state.at.stopped_by:
            loss = self.one_step()
            self.display.step(self.state.at.step, loss)
            self.after_step()

    def one_step(self) -> float:
        """One optimizer step; returns its loss over all processes."""
        state, run, world, began = self.state, self.state.run, self.state.world, time.monotonic()
        first = not self.display.clock.step_times
        sums: dict[str, torch.Tensor] = {}
        draws, seen = Draws(world.device), []
        with self.watch if first else nullcontext(), self.together:
            for i in range(run.train.accumulate):
                seen.append(batch := next(self.batches).to(world.device))
                self.together.counts = self.order.counts(state.at.position + i)
                with wait_for_gradients(self.wrapped, last=i + 1 == run.train.accumulate):
                    loss = self.loss_of(self.wrapped, batch)
                    loss = loss if self.together.counts else nothing_of(loss)
                    state.scaler.scale(loss.sum).backward()
                for name, value in {"loss": loss.sum, "count": loss.count, **loss.parts}.items():
                    sums[name] = sums.get(name, 0) + value.detach().double()
        said = [
            torch.tensor(float(each), device=world.device).double() for each in (self.flag.asked, state.save_failed)
        ]
        *totals, stop, failed = world.sum(torch.stack([*sums.values(), *said])).tolist()
        if failed:
            state.saved()
        totals = dict(zip(sums, totals, strict=True))
        count = max(totals.pop("count"), 1.0)
        means = {name: value / count for name, value in totals.items()}
        # Right for ragged targets, for accumulation and for every process.
        state.scaler.unscale_(state.optimizer)
        scale_gradients(state.model, world.size / count)
        norm = clip(state.model, run.optim.clip)
        if not overflowed(state.scaler, means["loss"], norm):
            require_finite(means["loss"], norm, state.model, state.at.step + 1, lambda: self.find(seen, draws))
        state.advance(run.train.accumulate)
        seconds = time.monotonic() - began
        self.display.clock.step_times.append(seconds)
        self.stop = stop > 0
        if first:
            self.record.write("backends", step=state.at.step, **self.watch.found())
        self.record.write("step", step=state.at.step, **means, norm=norm, lr=state.rate, seconds=seconds)
        state.at.seconds += seconds
        return means["loss"]

    def loss_of(self, model: nn.Module, batch: Any) -> Loss:
        """The task's loss, in the precision asked for."""
        with autocast(self.state.world.device, self.precision, cached=not self.state.world.sharded):
            return self.task.loss(model, batch)

    def find(self, batches: list[Any], draws: Draws) -> str:
        """The first layer and tensor of a step that is not finite."""
        if self.state.world.sharded:
            # Its calls would be joint acts of all processes, and each may find something else.
            return ""
        scaler = self.state.scaler
        return first_broken(
            self.state.model, batches, lambda batch: scaler.scale(self.loss_of(self.state.model, batch).sum), draws
        )

    def after_step(self) -> None:
        """Evaluate, save, stop: whatever is due."""
        state, at = self.state, self.state.at
        if state.evaluation_due and not self.stop:
            self.validate()
        if self.stop or at.stopped_by or state.save_due:
            state.save(self.record)
        if self.stop or at.stopped_by:
            state.saved()
        if self.stop or (at.stopped_by and self.flag.asked):
            raise StoppedError(at.step, state.resume_command, self.flag.by_hand)

    def validate(self) -> None:
        """Measure on the validation windows, keep the best weights, and see whether this is the end."""
        state, began = self.state, time.monotonic()
        if self.val:
            metrics = evaluate(
                state.measured, self.task, self.val, state.run.train.batch_size, state.world, self.precision
            )
            seconds = time.monotonic() - began
            best = state.note(metrics, self.task.score(metrics))
            self.record.write("metrics", step=state.at.step, split="val", best=best, seconds=seconds, **metrics)
            self.display.clock.eval_times.append(seconds)
            self.display.evaluated(state.at.step, metrics, best)
            state.at.seconds += seconds
        state.end_if_due()
