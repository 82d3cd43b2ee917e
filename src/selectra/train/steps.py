"""The one training loop. Of a task it knows `loss`, `evaluator` and `score`, of a batch `to`, and nothing else."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from selectra.tasks.task import Loss, Task
from selectra.train.batch_norms import together
from selectra.train.batches import Order, Windows, agreed, part_of
from selectra.train.depth import training_mode
from selectra.train.deterministic import deterministic
from selectra.train.evaluation import evaluate
from selectra.train.loader import naming_ended
from selectra.train.meter import Meter
from selectra.train.optim import clip, require_finite, scale_gradients
from selectra.train.parallel import wait_for_gradients, wrap
from selectra.train.precision import Precision, autocast, overflowed
from selectra.train.progress import Display
from selectra.train.record import BackendWatch, Record
from selectra.train.sentinel import Draws, first_broken
from selectra.train.state import State
from selectra.train.stop import StopFlag, StoppedError
from selectra.train.streams import left_out


class Steps:
    """Steps, evaluations and checkpoints of one training by gradient."""

    def __init__(
        self, state: State, task: Task, order: Order, val: Windows | None, record: Record, display: Display,
        flag: StopFlag,
    ) -> None:  # fmt: skip
        self.state, self.task, self.order, self.val = state, task, order, val
        self.record, self.display, self.flag = record, display, flag
        self.meter, self.splits = Meter(order.start_at(state.at.position), state.world), (order.windows, val)
        train = state.run.train
        self.wrapped = wrap(state.model, state.world, train.compile, fixed=train.deterministic)
        self.together = together(state.model, state.world, state.run.train.compile)
        training_mode(state.model)
        self.precision: Precision = state.run.train.precision
        self.watch = BackendWatch()
        self.stop = False

    def go(self) -> None:
        train, device = self.state.run.train, self.state.world.device
        with naming_ended(train.workers), deterministic(train.deterministic, device):
            # What was due when the training was interrupted comes first.
            if not self.state.at.stopped_by:
                self.after_step()
            while not self.state.at.stopped_by:
                loss = self.one_step()
                self.display.step(self.state.at.step, loss, self.meter.rate, self.meter.wait)
                self.after_step()

    def one_step(self) -> float:
        """One optimizer step; returns its loss over all processes."""
        state, run, world, began = self.state, self.state.run, self.state.world, time.monotonic()
        first = not self.display.clock.started
        sums: dict[str, torch.Tensor] = {}
        draws, seen = Draws(world.device), []
        with self.watch if first else nullcontext(), self.together:
            for i in range(run.train.accumulate):
                self.together.counts = self.order.counts(state.at.position + i)
                batch = part_of(agreed(self.meter.take(self.together.counts), world), world)
                seen.append(batch)
                with wait_for_gradients(self.wrapped, last=i + 1 == run.train.accumulate):
                    loss = self.loss_of(self.wrapped, batch)
                    loss = (loss if self.together.counts else loss.nothing()).shared(world.sum)
                    state.scaler.scale(loss.sum).backward()
                for name, value in {"loss": loss.sum, "count": loss.count, **loss.parts}.items():
                    sums[name] = sums.get(name, 0) + value.detach().double()
        said = [
            torch.tensor(float(each), device=world.device).double()
            # Where all have parts of the same samples, they count once.
            for each in (self.meter.samples * (world.first or not world.split), self.flag.asked, state.save_failed)
        ]
        *totals, samples, stop, failed = world.sum(torch.stack([*sums.values(), *said])).tolist()
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
        self.display.clock.took("step", seconds)
        self.stop = stop > 0
        if first:
            self.record.write("backends", step=state.at.step, **self.watch.found())
        more = self.meter.step(seconds, samples)
        self.record.write("step", step=state.at.step, **means, norm=norm, lr=state.rate, seconds=seconds, **more)
        state.at.seconds += seconds
        return means["loss"]

    def loss_of(self, model: nn.Module, batch: Any) -> Loss:
        """The task's loss, in the precision asked for."""
        with autocast(self.state.world.device, self.precision, cached=not self.state.world.sharded):
            return self.task.loss(model, batch)

    def find(self, batches: list[Any], draws: Draws) -> str:
        """The first layer and tensor of a step that is not finite."""
        if self.state.world.sharded or self.state.world.split:
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
            # Behind the checkpoint nobody would name them again.
            self.name_left_out()
            began = time.monotonic()
            state.save(self.record)
            self.display.clock.took("checkpoint", time.monotonic() - began, at.step)
        if self.stop or at.stopped_by:
            state.saved()
        if self.stop or (at.stopped_by and self.flag.asked):
            raise StoppedError(at.step, state.resume_command, self.flag.by_hand)

    def validate(self) -> None:
        """Measure on the validation windows, keep the best weights, and see whether this is the end."""
        state, began = self.state, time.monotonic()
        if self.val:
            metrics = evaluate(
                state.measured, self.task, self.val, state.run.train.batch_size, state.world, self.precision,
                workers=state.run.train.workers, limit=state.run.train.load_timeout,
            )  # fmt: skip
            seconds = time.monotonic() - began
            best = state.note(metrics, self.task.score(metrics))
            self.record.write("metrics", step=state.at.step, split="val", best=best, seconds=seconds, **metrics)
            self.display.clock.took("evaluation", seconds, state.at.step)
            self.display.evaluated(state.at.step, metrics, best)
            state.at.seconds += seconds
        self.name_left_out()
        state.end_if_due()

    def name_left_out(self) -> None:
        """Tell of the samples that any process has left out since this was told last."""
        names = left_out(self.splits, self.state.world.readers)
        self.display.left_out(self.record.left_out(self.state.at.step, names))
