"""Do the cells of a store: those by gradient packed on a GPU, or one after the other by the plain loop."""

import dataclasses
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from selectra import data as _data
from selectra import models as _models
from selectra.compare.cells import Cell
from selectra.compare.forecasting import variate_order
from selectra.compare.on_device import OnDevice
from selectra.compare.on_device_text import TextOnDevice
from selectra.compare.residents import Residents, kind_of
from selectra.compare.store import Store
from selectra.compare.tune import PrunedError
from selectra.data.held_text import held_split
from selectra.data.series import SeriesData
from selectra.data.table import Table, read_table
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets, models, tasks
from selectra.spec import Spec, Train
from selectra.tasks.task import Task
from selectra.train.batches import TrainingOrder
from selectra.train.evaluation import evaluate
from selectra.train.loop import fit
from selectra.train.parallel import World
from selectra.train.record import BackendWatch, environment
from selectra.train.stop import DivergedError

__all__ = ["_data", "_models", "work_on_cpu", "work_on_gpu"]

DATA_VARIABLE = "SELECTRA_DATA"
PARTS = ("train", "val", "test")
# Evaluations that are queued ahead on a stream, so that the GPU has work while the host prepares the next training.
AHEAD = 2
ASK_EVERY = 0.5
# Batches of an evaluation; no result depends on it. Clips, and pictures with masks or boxes, are larger: of these it is
# as many as in a training step.
EVALUATED = 256
LARGER = ("video", "segmentation", "detection")
# Says of a failed cell that it would not fail with other data or settings, and is to be tried again.
CURABLE = "curable"
OnDone = Callable[[Cell, str, dict[str, Any]], None]
# For a trial: whether it is to be ended, from its validation errors so far.
Judge = Callable[[Cell], Callable[[Sequence[float]], bool]]


@dataclasses.dataclass(frozen=True)
class Built:
    """A cell's data, task and model, on the CPU."""

    data: Any
    task: Any
    model: nn.Module
    parts: dict[str, Any]


def data_path(path: str) -> Path:
    """A path as it is, or in the folder that SELECTRA_DATA names."""
    found = Path(path)
    if not found.is_absolute() and not found.exists():
        found = Path(os.environ.get(DATA_VARIABLE, "")) / path
    if not found.exists():
        raise DataError(f"there is no '{path}', neither here nor in the folder that {DATA_VARIABLE} names.")
    return found


@lru_cache(maxsize=16)
def _table(path: Path, time: str | None, freq: str | None, stamps: str) -> Table:
    return read_table(path, time=time, freq=freq, stamps=stamps)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=32)
def _ordered(path: Path, time: str | None, freq: str | None, stamps: str, variates: int) -> Table:
    table = _table(path, time, freq, stamps)
    order = variate_order(len(table.names), variates)
    names = tuple(table.names[i] for i in order)
    return dataclasses.replace(table, names=names, values=table.values[:, order], observed=table.observed[:, order])


@lru_cache(maxsize=16)
def load(spec: Spec) -> Any:
    """A data set, read once for all cells on it."""
    return datasets.build(spec)


def build(cell: Cell) -> Built:
    """As `train.job.build`, the data read once for all cells and series in the cell's order."""
    data = _tabled(cell) if cell.variates or _in_folder(cell.run.data) else load(cell.run.data)
    torch.manual_seed(cell.run.train.seed)
    model = models.build(cell.run.model, data.facts)
    task = tasks.build(cell.run.task, data.facts).for_data(data)
    return Built(data, task, model, {part: data.windows(part) for part in PARTS})


def _in_folder(spec: Spec) -> bool:
    """Whether the data is a file that only the folder of SELECTRA_DATA has."""
    path, folder = str(spec.args.get("path") or ""), os.environ.get(DATA_VARIABLE, "")
    return bool(path and folder) and not Path(path).exists() and (Path(folder) / path).is_file()


def _tabled(cell: Cell) -> SeriesData:
    args = {name: item.value for name, item in datasets.resolve(cell.run.data).items()}
    if args["futr"] is not None:
        raise ConfigError("a comparison takes no file of future covariates; leave 'data.futr' out.")
    shape = {name: args[name] for name in ("seq_len", "horizon", "target", "constant")}
    shape["split"] = "ratio" if args["split"] == "auto" else args["split"]
    where = (data_path(args["path"]), args["time"], args["freq"], args["stamps"])
    return SeriesData(_ordered(*where, cell.variates), **shape)


def order_digest(cell: Cell, windows: Any) -> str:
    """What tells the order of the first pass over the training windows from any other."""
    return _order_digest(len(windows), cell.run.train.model_dump_json())


@lru_cache(maxsize=64)
def _order_digest(count: int, train: str) -> str:
    # The order depends on how many windows there are, and not on what they hold.
    sampler = TrainingOrder(cast(Any, range(count)), Train.model_validate_json(train), World()).sampler
    sampler.set_epoch(0)
    return hashlib.sha256(repr(list(sampler)).encode()).hexdigest()[:16]


def facts_of(
    cell: Cell, parameters: int, train: Any, n_test: int, device: torch.device, packed: int
) -> dict[str, Any]:  # fmt: skip
    """What every record says beside the result."""
    return {
        **cell.label,
        "size": cell.run.model.name,
        "parameters": parameters,
        "test_windows": n_test,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "packed": packed,
        **({"data_order": order_digest(cell, train)} if cell.trial is None and cell.by_gradient else {}),
        **_environment(),
    }


def _facts(cell: Cell, built: Built, device: torch.device, packed: int) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    return facts_of(cell, parameters, built.parts["train"], len(built.parts["test"]), device, packed)


@lru_cache(maxsize=1)
def _environment() -> dict[str, Any]:
    return environment()


def never(cell: Cell) -> Callable[[Sequence[float]], bool]:
    """Ends no trial."""
    return lambda history: False


def work_on_cpu(
    store: Store,
    until: float,
    on_done: OnDone,
    by_gradient: bool | None = None,
    wait: bool = False,
    device: torch.device | None = None,
    judge: Judge = never,
) -> None:
    """Do cells one after the other by the plain loop.

    Args:
        until: Moment of `time.monotonic` after which no cell is begun.
        on_done: Called with every finished cell.
        by_gradient: Only those that belong on a GPU, or only those that do not.
        wait: Wait for cells that may yet be given back, or come.
        device: Where models are trained; default: the CPU.
        judge: What ends a trial early.
    """
    with store.beating():
        while time.monotonic() < until:
            cell = store.take(by_gradient)
            if cell is None:
                if not wait or store.counts()["taken"] + store.counts()["open"] == 0:
                    return
                time.sleep(0.5)
                continue
            state, record = _plain(cell, device or torch.device("cpu"), judge)
            if store.finish(cell, record, state):
                on_done(cell, state, record)


class _Watched:
    """A task that keeps the validation errors, and ends a trial that is to be ended."""

    def __init__(self, task: Task, ends: Callable[[Sequence[float]], bool]) -> None:
        self.task, self.ends = task, ends
        self.history: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def score(self, metrics: dict[str, float]) -> float:
        """The task's; raises where this trial is worse than those before."""
        score = self.task.score(metrics)
        self.history.append(score)
        if self.ends(self.history):
            raise PrunedError
        return score


def _plain(cell: Cell, device: torch.device, judge: Judge) -> tuple[str, dict[str, Any]]:
    try:
        built, world = build(cell), World(device=device)
        watched = _Watched(built.task, judge(cell) if cell.trial is not None else lambda history: False)
        # All else that a task has is the inner one's.
        task = cast(Task, watched)
        began = time.monotonic()
        try:
            fitted = fit(
                built.model, task, built.parts["train"], built.parts["val"], cell.run, progress=False, world=world
            )
        except PrunedError:
            result: dict[str, Any] = {"pruned": True, "seconds": time.monotonic() - began}
        else:
            result = {
                "val": fitted.best, "best_step": fitted.best_step, "steps": fitted.steps, "seconds": fitted.seconds,
                "backends": _backends(built, device),
            }  # fmt: skip
            if cell.trial is None:
                larger, precision = kind_of(cell) in LARGER, cell.run.train.precision
                size = cell.run.train.batch_size if larger else EVALUATED
                result["test"] = evaluate(built.model, built.task, built.parts["test"], size, world, precision)
    except (ConfigError, DataError, DivergedError) as error:
        cured = {} if isinstance(error, DivergedError) else {CURABLE: True}
        return "failed", {**cell.label, "reason": str(error), **cured}
    history = {"history": watched.history, "score": min(watched.history, default=None)}
    return "done", {**_facts(cell, built, device, 1), **history, **result}


def _backends(built: Built, device: torch.device) -> dict[str, str]:
    part = built.parts["val" if len(built.parts["val"]) else "train"]
    watch, batch = BackendWatch(), part[[0]].to(device)
    # As it is measured: in training a batch norm would take this batch into the statistics that the test part meets.
    built.model.eval()
    with watch, torch.no_grad():
        built.task.evaluator().update(built.model, batch)
    return watch.found()


class _Slot:
    """One stream, the memory of its graphs, and the training that runs on it.

    Args:
        most: The heaviest cell that it takes.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self.device, self.most = device, most
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        # A pool lives as long as a graph in it: this one does nothing, for ever.
        self.keeper = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            self.nothing = torch.zeros(1, device=device)
            self.keeper.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self.nothing.add_(1)
            self.keeper.capture_end()
        self.cell: Cell | None = None
        # Where nothing was there to take: when to ask again, if nothing ends before.
        self.ask_at = 0.0

    def start(self, cell: Cell, residents: "Residents", packed: int) -> None:
        """Build the model, take the first step, record the graphs."""
        self.cell, self.queued, self.more, self.ended = cell, deque(), True, False
        with torch.cuda.stream(self.stream):
            built = build(cell)
            self.facts = _facts(cell, built, self.device, packed)
            self.training = self._training(cell, built, residents)
            self.training.prepare()

    def _training(self, cell: Cell, built: Built, residents: "Residents") -> OnDevice:
        model = built.model.to(self.device)
        if kind_of(cell) == "language":
            splits = {part: held_split(built.data, part) for part in PARTS}
            held = residents.text(cell, built.data)
            return TextOnDevice(model, built.task, held, splits, cell.run, self.stream, self.pool)
        resident = residents(cell, built.parts["train"])
        return OnDevice(model, built.task, built.parts, cell.run, resident, self.stream, self.pool)

    def move(self) -> bool:
        """Queue what comes next where there is room; whether anything changed."""
        while self.queued and self.queued[0].query():
            self.queued.popleft()
        if self.ended or len(self.queued) >= AHEAD:
            return False
        if self.more:
            self.more = self.training.advance()
        else:
            self.training.finish()
            self.ended = True
        self.queued.append(self.stream.record_event())
        return True

    def result(self) -> tuple[str, dict[str, Any]]:
        """The record of a training that has ended; the slot is free after it."""
        outcome = self.training.outcome()
        found = dataclasses.asdict(outcome)
        record = {**self.facts, **found, **found.pop("more"), "backends": self.training.backends}
        del record["more"]
        if self.cell is not None and self.cell.trial is not None:
            # The graphs hold the test part; a trial's choice does not see it.
            for name in ("test", "last", "held_out"):
                record.pop(name, None)
            record["history"] = [each["loss" if "loss" in each else "mse"] for each in outcome.history]
            record["score"] = min(record["history"], default=None)
        del self.training
        self.cell = None
        if outcome.best_step == 0:
            return "failed", {**record, "reason": "diverged: no validation error was a number"}
        return "done", record


def _limits(packed: int) -> list[int]:
    """The heaviest cell of each slot: what a slot's graphs have used stays theirs, so few take the heavy ones."""
    return [packed, max(1, packed // 3), *[1] * packed][:packed]


def work_on_gpu(store: Store, device: torch.device, packed: int, until: float, on_done: OnDone) -> None:
    """Do the cells that belong on a GPU, `packed` at a time; at the limit those in flight are given back.

    Args:
        until: Moment of `time.monotonic` after which no cell is begun or finished.
        on_done: Called with every finished cell.
    """
    gpu = _Gpu(store, device, packed, on_done)
    with store.beating():
        while time.monotonic() < until and not gpu.idle:
            if not gpu.turn():
                time.sleep(0.0005)


class _Gpu:
    """All slots of a GPU, served in turn."""

    def __init__(self, store: Store, device: torch.device, packed: int, on_done: OnDone) -> None:
        self.store, self.packed, self.on_done = store, packed, on_done
        self.residents = Residents(device)
        self.slots = [_Slot(device, most) for most in _limits(packed)]
        self.idle = False

    def turn(self) -> bool:
        """Give every slot what it can take; whether anything changed."""
        moved = nothing = False
        for slot in self.slots:
            if slot.cell is None:
                nothing |= self._fill(slot)
            if slot.cell is not None:
                moved |= slot.move()
                if slot.ended and not slot.queued:
                    self._note(slot)
                    moved = True
        self.idle = nothing and all(slot.cell is None for slot in self.slots)
        return moved

    def _fill(self, slot: _Slot) -> bool:
        """Begin the next cell that fits; True where there is none at all, not even for an empty GPU."""
        if time.monotonic() < slot.ask_at:
            return False
        free = self.packed - sum(min(self.packed, each.cell.weight) for each in self.slots if each.cell is not None)
        most = min(free, slot.most)
        # An empty GPU takes a cell of any weight.
        cell = self.store.take(True, None if most == self.packed else most) if most else None
        if cell is None:
            slot.ask_at = time.monotonic() + ASK_EVERY
            return most == self.packed
        try:
            slot.start(cell, self.residents, self.packed)
        except (ConfigError, DataError, torch.OutOfMemoryError) as error:
            slot.cell = None
            self._finish(cell, "failed", {**cell.label, "reason": str(error), CURABLE: True})
        return False

    def _note(self, slot: _Slot) -> None:
        assert slot.cell is not None
        cell = slot.cell
        self._finish(cell, *slot.result())
        # What has ended may bring new cells, or room for a heavy one.
        for each in self.slots:
            each.ask_at = 0.0

    def _finish(self, cell: Cell, state: str, record: dict[str, Any]) -> None:
        if self.store.finish(cell, record, state):
            self.on_done(cell, state, record)
