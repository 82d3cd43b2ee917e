"""A training that stays on its device: data, order, learning rates and best weights all lie there.

The host only says "again": on a GPU the whole step is one CUDA graph, an evaluation another, so that one thread drives
many small trainings at once. The result is that of `train.loop.fit` from the same seed: the same batches in the same
order under the same schedule. What differs: dropout draws from a generator of this training's own; a pass's last,
shorter batch is filled up with repeated windows that do not count, which only batch norm can notice; the gradient is
that of the mean, where the loop scales the gradient of the sum.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from selectra.data.windows import SeriesBatch, Windows
from selectra.errors import ConfigError
from selectra.spec import Optim, Run
from selectra.tasks import Forecasting
from selectra.tasks.forecasting import ForecastEvaluator
from selectra.train.batches import TrainingOrder
from selectra.train.optim import make_optimizer, make_schedule
from selectra.train.parallel import World
from selectra.train.record import BackendWatch

# Series (windows times variates) in one piece of an evaluation: bounds its memory.
EVALUATED_SERIES = 1024


class Resident(NamedTuple):
    """All rows of a data set on the device; `observed` is None where nothing is missing."""

    values: Tensor
    observed: Tensor | None

    @classmethod
    def of(cls, windows: Windows, device: torch.device) -> "Resident":
        """The rows that `windows` and its sister parts are cut from."""
        observed = None if windows.observed.all() else torch.from_numpy(windows.observed).to(device)
        return cls(torch.from_numpy(windows.values).to(device), observed)

    def batch(self, starts: Tensor, valid: Tensor, rows: Tensor, seq_len: int) -> SeriesBatch:
        """Windows of `rows` (0, 1, 2, ...) from these starts on; those that are not valid have no target."""
        shape, horizon = (len(starts), len(rows), self.values.shape[1]), len(rows) - seq_len
        rows = (starts[:, None] + rows).flatten()
        values = self.values.index_select(0, rows).view(shape)
        seen = valid[:, None, None].expand(shape[0], horizon, shape[2])
        observed: Any = None
        if self.observed is not None:
            here = self.observed.index_select(0, rows).view(shape)
            observed, seen = here[:, :seq_len], seen & here[:, seq_len:]
        return SeriesBatch(values[:, :seq_len], observed, values[:, seq_len:], seen)


def rates_of(optim: Optim, steps: int) -> tuple[float, ...]:
    """The learning rate of every step, as the loop's schedule gives it."""
    return _rates_of(optim.model_dump_json(), steps)


@lru_cache(maxsize=64)
def _rates_of(optim_as_text: str, steps: int) -> tuple[float, ...]:
    optim = Optim.model_validate_json(optim_as_text)
    optimizer = AdamW([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    schedule = make_schedule(optimizer, optim, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        # Without gradients this does nothing but stop a warning about the order of calls.
        optimizer.step()
        schedule.step()
    return tuple(rates)


def order_of(windows: Windows, run: Run) -> tuple[Tensor, Tensor]:
    """The starts of every step's windows `(steps, batch)`, and how many of them count `(steps,)`.

    The loop's own order. A pass's last batch is filled up with its own windows over again.
    """
    order = TrainingOrder(windows, run.train, World())
    steps, size = run.train.steps or ceil((run.train.epochs or 0) * len(order)), run.train.batch_size
    rows: list[list[int]] = []
    counts: list[int] = []
    epoch = 0
    while len(rows) < steps:
        order.sampler.set_epoch(epoch)
        for batch in order.batches:
            counts.append(len(batch))
            rows.append((batch * ceil(size / len(batch)))[:size])
        epoch += 1
    return torch.tensor(rows[:steps]) + windows.first, torch.tensor(counts[:steps])


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    `seconds` is from the first step to the last evaluation, on the device's clock where that is a GPU; `more` is what
    only some kinds of models have.
    """

    val: dict[str, float]
    test: dict[str, float]
    best_step: int
    steps: int
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


class OnDevice:
    """One training on one stream.

    Args:
        model: On the device, freshly seeded.
        task: Forecasting of all series.
        parts: The windows of train, val and test.
        run: Its optimizer, length, batch and seed.
        resident: The rows that all parts are cut from.
        stream: The stream of this training's graphs; None runs every step as it is called.
        pool: Memory that graphs of this stream share.
    """

    def __init__(
        self, model: nn.Module, task: Forecasting, parts: dict[str, Windows], run: Run, resident: Resident,
        stream: "torch.cuda.Stream | None" = None, pool: Any = None,
    ) -> None:  # fmt: skip
        _require_simple(run, task, parts["train"])
        self.model, self.task, self.parts, self.run, self.resident = model, task, parts, run, resident
        self.stream, self.pool, self.device = stream, pool, resident.values.device
        self.order, self.counts = (part.to(self.device) for part in order_of(parts["train"], run))
        self.steps = len(self.order)
        self.eval_every = run.train.eval_every or max(1, len(parts["train"]) // run.train.batch_size)
        self.rate_table = torch.tensor(rates_of(run.optim, self.steps), device=self.device)
        self.rate = torch.tensor(run.optim.lr, device=self.device)
        # The groups of the loop's optimizer, its arithmetic in one kernel, its rate and step on the device.
        groups = make_optimizer(model, run.optim).param_groups
        self.optimizer = AdamW(
            [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups],
            lr=self.rate, betas=run.optim.betas, fused=True, capturable=self.device.type == "cuda",
        )  # fmt: skip
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.state = [*model.parameters(), *model.buffers()]
        self.best = [tensor.detach().clone() for tensor in self.state]
        self.number = torch.zeros(1, dtype=torch.long, device=self.device)
        self.seq_len = parts["train"].seq_len
        self.in_window = torch.arange(self.seq_len + parts["train"].horizon, device=self.device)
        self.in_batch = torch.arange(run.train.batch_size, device=self.device)
        self._make_evaluation()
        self.done = self.evaluated = 0
        self.step_again: Callable[[], None] = self._step
        self.evaluate_again: Callable[[], None] = self._evaluate
        self.note_again: Callable[[], None] = self._note

    def _make_evaluation(self) -> None:
        self.piece = max(1, EVALUATED_SERIES // self.resident.values.shape[1])
        self.in_piece = torch.arange(self.piece, device=self.device)
        self.cursor = torch.zeros((), dtype=torch.long, device=self.device)
        self.end = torch.zeros((), dtype=torch.long, device=self.device)
        self.sums = torch.zeros(3, self.resident.values.shape[1], dtype=torch.float64, device=self.device)
        n_evaluations = ceil(self.steps / self.eval_every)
        self.history = torch.full((n_evaluations, *self.sums.shape), float("nan"), device=self.device).double()
        self.at_history = torch.zeros(1, dtype=torch.long, device=self.device)
        self.best_score = torch.tensor(inf, dtype=torch.float64, device=self.device)
        self.best_at = torch.zeros(1, dtype=torch.long, device=self.device)
        self.best_sums = torch.zeros_like(self.sums)

    def _step(self) -> None:
        """One optimizer step; everything it reads and writes is on the device."""
        starts = self.order.index_select(0, self.number)[0]
        valid = self.in_batch < self.counts.index_select(0, self.number)
        self.rate.copy_(self.rate_table.index_select(0, self.number)[0])
        batch = self.resident.batch(starts, valid, self.in_window, self.seq_len)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, batch)
        (loss.sum / loss.count).backward()
        if self.run.optim.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.run.optim.clip)
        self.optimizer.step()
        self.number += 1

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Add the errors of the next piece of windows."""
        starts = self.cursor + self.in_piece
        valid = starts < self.end
        batch = self.resident.batch(torch.where(valid, starts, self.cursor), valid, self.in_window, self.seq_len)
        evaluator = ForecastEvaluator()
        evaluator.update(self.model, batch)
        assert evaluator.sums is not None
        self.sums += evaluator.sums
        self.cursor += self.piece

    @torch.no_grad()
    def _note(self) -> None:
        """Note the validation error, keep the weights where they are the best so far, and begin the sums anew."""
        index = 1 if self.task.kind == "mae" else 0
        score = self.sums[index].sum() / self.sums[2].sum()
        better = score < self.best_score
        for kept, now in (
            (self.best_score, score), (self.best_at, self.number), (self.best_sums, self.sums),
            *zip(self.best, self.state, strict=True),
        ):  # fmt: skip
            kept.copy_(torch.where(better, now, kept))
        self.history.index_copy_(0, self.at_history, self.sums[None])
        self.at_history += 1
        self._begin("val")

    def _begin(self, part: str) -> None:
        windows = self.parts[part]
        self.sums.zero_()
        self.cursor.fill_(windows.first)
        self.end.fill_(windows.first + len(windows))

    def pieces(self, part: str) -> int:
        """Calls of an evaluation that a part takes."""
        return ceil(len(self.parts[part]) / self.piece)

    def prepare(self) -> None:
        """Take the first step, and record the graphs of all others."""
        graphed = self.stream is not None
        with _own_generator(self.device, self.run.train.seed), self.on_stream():
            if self.stream is not None:
                # What was made on another stream must be there.
                self.stream.wait_stream(torch.cuda.default_stream(self.device))
            self.began = _mark(self.device)
            self.model.train()
            watch = BackendWatch()
            with watch:
                self._step()
            self.backends = watch.found()
            self.done = 1
            self.optimizer.zero_grad(set_to_none=True)
            if graphed:
                self.step_again = self._record(self._step)
            self.model.eval()
            self._begin("val")
            if graphed:
                # Once as it is, for whatever a library makes at its first call.
                self._evaluate()
                self.evaluate_again = self._record(self._evaluate)
                self.note_again = self._record(self._note)
                self._begin("val")

    def on_stream(self) -> Any:
        """What follows goes to this training's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _record(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Without the waiting for the device and emptying of caches that `torch.cuda.graph` does: others run on.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            call()
        finally:
            graph.capture_end()
        return graph.replay

    def advance(self) -> bool:
        """Do, or queue, all until the next evaluation's end; whether there is more to come."""
        until = min(self.steps, self.evaluated + self.eval_every)
        with self.on_stream():
            if self.stream is None:
                self.model.train()
            for _ in range(until - self.done):
                self.step_again()
            if self.stream is None:
                self.model.eval()
            for _ in range(self.pieces("val")):
                self.evaluate_again()
            self.note_again()
        self.done = self.evaluated = until
        return self.done < self.steps

    @torch.no_grad()
    def finish(self) -> None:
        """Take the best weights and measure them on the test windows: do it, or queue it."""
        with self.on_stream():
            for now, kept in zip(self.state, self.best, strict=True):
                now.copy_(kept)
            self._begin("test")
            for _ in range(self.pieces("test")):
                self.evaluate_again()
            self.ended = _mark(self.device)

    def outcome(self) -> Outcome:
        """The result; waits for the device."""
        with self.on_stream():
            history = [_metrics(sums, self.task) for sums in self.history.cpu()]
            val, test = _metrics(self.best_sums.cpu(), self.task), _metrics(self.sums.cpu(), self.task)
            return Outcome(
                val, test, int(self.best_at), self.steps, _between(self.began, self.ended),
                [{"mse": each["mse"], "mae": each["mae"]} for each in history],
            )  # fmt: skip


def _require_simple(run: Run, task: Forecasting, train: Windows) -> None:
    """Refuse what only the loop does."""
    asked = {
        "train.accumulate": run.train.accumulate != 1,
        "train.patience": run.train.patience is not None,
        "train.deterministic": run.train.deterministic,
        "task.target_index": task.target_index is not None,
        "task.quantiles": bool(task.quantiles),
        "train.batch_size, larger than the training part": run.train.batch_size > len(train),
    }
    refused = [name for name, wrong in asked.items() if wrong]
    if refused:
        raise ConfigError(f"a training that stays on the device does not take {refused[0]}; use train.loop.fit.")


def _metrics(sums: Tensor, task: Forecasting) -> dict[str, float]:
    evaluator = task.evaluator()
    evaluator.sums = sums
    return evaluator.compute()


def _own_generator(device: torch.device, seed: int) -> Any:
    if device.type != "cuda":
        torch.manual_seed(seed)
        return nullcontext()
    return _Generator(device, seed)


class _Generator:
    """Inside the block, PyTorch's generator of a GPU has a state of its own, which graphs recorded there keep."""

    def __init__(self, device: torch.device, seed: int) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.usual = torch.cuda.default_generators[index]
        self.own = self.usual.clone_state()
        self.own.manual_seed(seed)

    def __enter__(self) -> None:
        self.before = self.usual.graphsafe_get_state()
        self.usual.graphsafe_set_state(self.own)

    def __exit__(self, *_: object) -> None:
        self.usual.graphsafe_set_state(self.before)


def _mark(device: torch.device) -> Any:
    """A point in time: on a GPU, of the present stream."""
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
