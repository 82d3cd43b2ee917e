"""`selectra compare`: fill a store with cells, have them done, say how far it is and what is left."""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from selectra.compare.cells import Cell
from selectra.compare.cost import measure_costs
from selectra.compare.crew import dismiss
from selectra.compare.forecasting import (
    BUDGET_TRIALS,
    LAST,
    TABLES,
    Budget,
    add_best_other,
    add_decided,
    budget_cells,
    first_cells,
)  # fmt: skip
from selectra.compare.store import Store
from selectra.compare.worker import work_on_cpu, work_on_gpu
from selectra.errors import ConfigError
from selectra.train.parallel import pick_device
from selectra.train.progress import duration
from selectra.train.stop import StoppedError

BUDGET, COSTS = "budget", "costs"
# Seconds that a process may take, after the limit, to end the cell in its hands.
GRACE = 5.0
# Cells that failed with these words are tried again by the next call.
WANT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Wish:
    """What a user asks of a comparison.

    Args:
        store: The file of its cells and records.
        tables: Which tables, in the order in which they are done.
        device: Where models are trained.
        time_limit: Seconds after which nothing is begun any more; None is no limit.
        workers: Processes for the cells that need no GPU; on a CPU, for all.
        packed: Trainings side by side on the GPU.
        budget: What every training has alike.
    """

    store: Path
    tables: tuple[str, ...] = tuple(TABLES)
    device: str = "auto"
    time_limit: float | None = None
    workers: int = 1
    packed: int = 8
    budget: Budget = field(default_factory=Budget)


def compare_forecasting(wish: Wish, console: Console) -> None:
    """Do what is left of the tables.

    Raises:
        ConfigError: The store holds cells of another budget.
    """
    device, began = pick_device(wish.device), time.monotonic()
    until = inf if wish.time_limit is None else began + wish.time_limit
    store = Store(wish.store)
    stages = _stages(wish.tables)
    store.reopen(cell.key for cell, state, record in store.cells()
                 if state == "failed" and record and WANT_OF_MEMORY in record["reason"])  # fmt: skip
    if BUDGET_TRIALS in wish.tables:
        store.add(budget_cells(wish.budget.batch_size))
    if _known(wish.tables):
        _same_budget(store, wish.budget)
        store.add(first_cells(_known(wish.tables), wish.budget))
    progress = _Progress(store, wish, console)
    try:
        for stage in stages:
            if time.monotonic() >= until:
                break
            _do(stage, store, dataclasses.replace(wish, tables=stage), device, until, progress)
    finally:
        store.close()
    progress.last_word(time.monotonic() - began)


def _known(tables: Sequence[str]) -> tuple[str, ...]:
    return tuple(table for table in tables if table not in (COSTS, BUDGET_TRIALS))


def _stages(tables: Sequence[str]) -> list[tuple[str, ...]]:
    """Tables that can be done side by side; costs are measured alone, and the last table needs the others' results."""
    order = ((BUDGET_TRIALS,), ("a", "b"), ("orders", "ablation"), (COSTS,), (LAST,))
    unknown = [table for table in tables if not any(table in stage for stage in order)]
    if unknown:
        known = ", ".join(table for stage in order for table in stage)
        raise ConfigError(f"there is no table '{unknown[0]}'; there are {known}.")
    stages = (tuple(table for table in stage if table in tables) for stage in order)
    return [stage for stage in stages if stage]


def _do(
    stage: tuple[str, ...], store: Store, wish: Wish, device: torch.device, until: float, progress: "_Progress"
) -> None:  # fmt: skip
    """Do one stage."""
    on_gpu = device.type == "cuda"
    if stage == (COSTS,):
        if on_gpu and store.recall(COSTS) is None:
            store.remember(COSTS, measure_costs(device, wish.budget))
        return
    add_decided(store, _known(stage), wish.budget)
    if stage == (LAST,):
        add_best_other(store, wish.budget)
    counts = store.counts()
    progress.say(f"{counts['done']} cells are done, {counts['open']} are open, in {wish.store}")
    helpers = _start_helpers(wish, until, on_gpu)
    try:
        if on_gpu:
            work_on_gpu(store, device, wish.packed, until, progress)
        elif not helpers:
            work_on_cpu(store, until, progress)
        for helper in helpers:
            helper.join(None if until == inf else max(0.0, until - time.monotonic()) + GRACE)
    finally:
        dismiss(helpers)


def _same_budget(store: Store, budget: Budget) -> None:
    before = store.recall(BUDGET)
    if before is not None and before != asdict(budget):
        raise ConfigError(
            f"'{store.path}' holds trainings with the budget {before}, and now it is {asdict(budget)}; "
            "ask for the same, or name another file."
        )
    store.remember(BUDGET, asdict(budget))


def _start_helpers(wish: Wish, until: float, on_gpu: bool) -> Sequence[Any]:
    """Processes for what needs no GPU; on a CPU for everything, where there are several."""
    count = wish.workers if on_gpu or wish.workers > 1 else 0
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // max(count, 1) - (1 if on_gpu else 0))
    limit = until - time.monotonic()
    helpers = [
        context.Process(target=_help, args=(wish, limit, False if on_gpu else None, threads)) for _ in range(count)
    ]
    for helper in helpers:
        helper.start()
    return helpers


def _help(wish: Wish, limit: float, by_gradient: bool | None, threads: int) -> None:
    torch.set_num_threads(threads)
    store = Store(wish.store)

    def after(cell: Cell, state: str, record: dict[str, Any]) -> None:
        _decide(store, wish, cell)

    try:
        work_on_cpu(store, time.monotonic() + limit, after, by_gradient, wait=by_gradient is None)
    except StoppedError:
        # The limit of time came in the middle of a cell, which is given back.
        return
    finally:
        store.close()


def _decide(store: Store, wish: Wish, cell: Cell) -> None:
    """After a trial: when it was the last of its group, the cells that waited for it can be done."""
    if cell.group:
        add_decided(store, _known(wish.tables), wish.budget, (cell.label["data"], cell.label["model"]))


class _Progress:
    """A line for every finished cell, with the time that is left."""

    def __init__(self, store: Store, wish: Wish, console: Console) -> None:
        self.store, self.wish, self.console = store, wish, console
        self.began, self.done = time.monotonic(), 0

    def __call__(self, cell: Cell, state: str, record: dict[str, Any]) -> None:
        _decide(self.store, self.wish, cell)
        self.done += 1
        spent = time.monotonic() - self.began
        counts = self.store.counts()
        n_left = counts["open"] + counts["taken"]
        left = spent / self.done * n_left
        found = f"MSE {record['test']['mse']:.4f}" if state == "done" else f"failed: {record['reason']}"
        self.say(f"{counts['done']} done, {n_left} left, about {duration(left)}: {cell.name}: {found}")

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def last_word(self, seconds: float) -> None:
        """What was done in this call."""
        store = Store(self.wish.store)
        counts = store.counts()
        store.close()
        self.say(
            f"After {duration(seconds)}: {counts['done']} cells done, {counts['failed']} failed, "
            f"{counts['open'] + counts['taken']} left; everything is in {self.wish.store}"
        )
