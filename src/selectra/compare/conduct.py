"""Have a study done: match and measure its models, then trials, then the scored trainings; each stored at once."""

import json
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from selectra.compare.cells import Cell
from selectra.compare.crew import Crew, dismiss
from selectra.compare.image_worker import packs_images, work_on_images
from selectra.compare.prepare import TimeUpError, prepare, seconds_by_steps
from selectra.compare.store import Store
from selectra.compare.study import Study, Variant, changes
from selectra.compare.tune import best_settings, finished_trials, next_settings, optuna, pruner, settings_of
from selectra.compare.worker import CURABLE, load, never, work_on_cpu, work_on_gpu
from selectra.errors import ConfigError, DataError
from selectra.registry import models
from selectra.spec import Run, Spec
from selectra.train.job import typed
from selectra.train.progress import duration
from selectra.train.same_data import describe_data, refuse_changed
from selectra.train.stop import StoppedError

STUDY, PREPARED = "study", "prepared"
# Seconds that a process may take, after the limit, to end the cell in its hands.
GRACE = 5.0
# Cells that failed with these words are tried again by the next call, as are those of which the record says so.
WANT_OF_MEMORY = "out of memory"
# Differences that a refusal names.
SHOWN = 4
# Seconds between two looks at what others do.
WAITING = 0.5


@dataclass(frozen=True)
class Wish:
    """How a study is to be done.

    Args:
        store: The file of its cells and records.
        device: Where models are trained.
        time_limit: Seconds after which nothing is begun any more; None is no limit.
        workers: Processes side by side on the CPU; beside a GPU, for what needs none.
        packed: Trainings side by side on a GPU.
    """

    store: Path
    device: str = "auto"
    time_limit: float | None = None
    workers: int = 1
    packed: int = 8


def conduct(study: Study, wish: Wish, console: Console) -> dict[str, int]:
    """Do what is left of a study; how many cells are in which state.

    Raises:
        ConfigError: The study is not fair, its budget cannot be met, or the file holds another study.
        DataError: The file, or the data, cannot be read.
    """
    study.check()
    if study.tuning is not None and study.tuning.ranges:
        optuna()
    crew, began = Crew.found(), time.monotonic()
    device = crew.device(wish.device)
    until = inf if wish.time_limit is None else began + wish.time_limit
    store = Store(wish.store)
    try:
        while crew.rank and store.recall(STUDY) is None:
            if time.monotonic() >= until:
                return store.counts()
            time.sleep(WAITING)
        try:
            # Trainings on a GPU share its memory as far as it goes.
            side_by_side = 1 if device.type == "cuda" else wish.workers
            study = open_study(store, study, device, console, until, side_by_side)
        except TimeUpError as error:
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)
            return store.counts()
        store.reopen(_curable(store))
        decide(store, study)
        progress = Progress(store, study, wish, console)
        if progress.left()[0]:
            _require_same_data(store, study)
        progress.first_word()
        while time.monotonic() < until:
            _work(study, store, wish, device, until, progress)
            counts = store.counts()
            # What others of this crew have in hand may yet come back.
            if crew.size == 1 or not counts["taken"] + counts["open"]:
                break
            time.sleep(WAITING)
        return progress.last_word(time.monotonic() - began)
    finally:
        store.close()


def open_study(
    store: Store, study: Study, device: torch.device, console: Console, until: float = inf, side_by_side: int = 1
) -> Study:  # fmt: skip
    """Prepare a study in an empty file, or go on with the one that the file holds; the study as it was prepared.

    Raises:
        ConfigError: The file holds another study, or cells of the tables of `selectra compare forecasting`.
        TimeUpError: `until` came before models were matched and measured.
    """
    text = json.loads(study.model_dump_json())
    before = store.recall(STUDY)
    if before is None:
        if store.recall("budget") is not None or any(store.counts().values()):
            raise ConfigError(f"'{store.path}' holds the tables of forecasters and no study; name another file.")
        # What is slow and can fail comes before anything is stored.
        store.settle(PREPARED, prepare(study, device, console, until, side_by_side))
        before = store.settle(STUDY, text)
    before = _as_now(before)
    if before != text:
        changed = list(changes(before, text))
        more = f", and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            f"'{store.path}' holds another study, '{before.get('name')}': {', '.join(changed[:SHOWN])}{more}; "
            "ask for the same, or name another file with --store."
        )
    return stored_study(store)


def _curable(store: Store) -> list[str]:
    """Keys of the cells that failed for want of memory, or by what is wrong with data or settings.

    A trial stays as it failed where the settings have been chosen without it: chosen again, every seed would be scored
    twice.
    """
    cells = store.cells()
    chosen = {(cell.label["base"], cell.label["variant"]) for cell, _, _ in cells if cell.trial is None}
    failed = [(cell, record) for cell, state, record in cells if state == "failed" and record]
    return [
        cell.key for cell, record in failed
        if (record.get(CURABLE) or WANT_OF_MEMORY in record["reason"])
        and (cell.trial is None or (cell.label["base"], cell.label["variant"]) not in chosen)
    ]  # fmt: skip


def _require_same_data(store: Store, study: Study) -> None:
    """Refuse to go on with data that is not what the models were measured, and the first of them trained, on.

    Raises:
        DataError: It has changed.
    """
    # A file of before descriptions were kept has none.
    before = store.recall(PREPARED).get("data", {})
    for base in study.bases:
        advice = (
            "All trainings of a comparison see the same data: bring it back as it was, or begin anew in another file "
            "with --store."
        )
        if before.get(base.name):
            refuse_changed(before[base.name], describe_data(load(typed(base).data)), str(store.path), advice)


def failures(path: Path) -> list[str]:
    """Why cells of a file failed, each reason once."""
    store = Store(path)
    found = [record["reason"] for _, state, record in store.cells() if state == "failed" and record]
    store.close()
    return list(dict.fromkeys(found))


def _as_now(before: dict[str, Any]) -> dict[str, Any]:
    """A stored study with the defaults of settings that did not exist when it was stored."""
    try:
        return json.loads(Study.model_validate(before).model_dump_json())
    except ValidationError:
        # A newer one's: what differs is named by its fields.
        return before


def stored_study(store: Store) -> Study:
    """The study that a file holds, its models at their matched sizes.

    Raises:
        DataError: It holds none.
    """
    found = store.recall(STUDY)
    if found is None:
        raise DataError(f"'{store.path}' holds no study.")
    return Study.model_validate(found)


def prepared_models(store: Store) -> dict[tuple[str, str], dict[str, Any]]:
    """What was found out about each variant on each base before the first training."""
    return {(each["base"], each["variant"]): each for each in store.recall(PREPARED)["models"]}


def sized(study: Study, known: dict[tuple[str, str], dict[str, Any]], base: Run, variant: Variant) -> Variant:
    """The variant at the size that it has on a base."""
    spec = Spec.from_json(known[base.name, variant.name]["spec"])
    return variant.model_copy(update={"model": spec})


def decide(store: Store, study: Study, only: tuple[str, str] | None = None) -> None:
    """Add every cell that follows from what is finished; adding one twice changes nothing.

    Args:
        only: The base and the variant whose trial has just ended; None looks at all.
    """
    known = prepared_models(store)
    for base in study.bases:
        for variant in study.variants:
            if only is None or only == (base.name, variant.name):
                _decide_one(store, study, base, variant, known)


def _decide_one(
    store: Store, study: Study, base: Run, variant: Variant, known: dict[tuple[str, str], dict[str, Any]]
) -> None:  # fmt: skip
    by_gradient, shaped = known[base.name, variant.name]["by_gradient"], sized(study, known, base, variant)
    if study.tuning is None or not by_gradient:
        store.add(study.scored(base, shaped, by_gradient))
        return
    ended, n_open = finished_trials(store, study, base, variant)
    for number, settings in next_settings(study.tuning, study.run(base, variant, 0), ended, n_open).items():
        store.add([study.trial(base, shaped, number, settings)])
    if len(ended) == study.tuning.count:
        best = best_settings(ended)
        if best is not None:
            store.add(study.scored(base, shaped, by_gradient, best))


def _work(
    study: Study, store: Store, wish: Wish, device: torch.device, until: float, progress: "Progress"
) -> None:  # fmt: skip
    on_gpu, judge = device.type == "cuda", judge_of(store, study)
    rows, images = on_gpu and _packs_rows(study), on_gpu and packs_images(study)
    helpers = _start_helpers(wish, until, rows or images)
    try:
        if rows:
            work_on_gpu(store, device, wish.packed, until, progress)
        elif images:
            work_on_images(store, device, wish.packed, until, progress, judge)
        elif on_gpu or not helpers:
            work_on_cpu(store, until, progress, device=device, judge=judge)
        progress.watch(helpers, until)
    finally:
        dismiss(helpers)


def _packs_rows(study: Study) -> bool:
    """Whether its trainings share a GPU as those of series and of language do."""
    return models.entry(study.variants[0].model.name).kind in ("series", "language")


def judge_of(store: Store, study: Study) -> Callable[[Cell], Callable[[Sequence[float]], bool]]:
    """What ends a trial of the study early."""
    if study.tuning is None:
        return never
    tuning = study.tuning

    def judge(cell: Cell) -> Callable[[Sequence[float]], bool]:
        base, variant = study.base(cell.label["base"]), study.variant(cell.label["variant"])
        ended, _ = finished_trials(store, study, base, variant)
        return pruner(tuning, settings_of(tuning, cell.run), ended)

    return judge


def _start_helpers(wish: Wish, until: float, on_gpu: bool) -> Sequence[Any]:
    """Processes for what needs no GPU; on a CPU for everything, where there are several."""
    count = wish.workers if on_gpu or wish.workers > 1 else 0
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // max(count, 1) - (1 if on_gpu else 0))
    limit = until - time.monotonic()
    helpers = [
        context.Process(target=_help, args=(wish.store, limit, False if on_gpu else None, threads))
        for _ in range(count)
    ]
    for helper in helpers:
        helper.start()
    return helpers


def _help(path: Path, limit: float, by_gradient: bool | None, threads: int) -> None:
    torch.set_num_threads(threads)
    store = Store(path)
    study, parent = stored_study(store), multiprocessing.parent_process()

    def after(cell: Cell, state: str, record: dict[str, Any]) -> None:
        decide(store, study, (cell.label["base"], cell.label["variant"]) if cell.group else ("", ""))
        # Nobody looks at this process any more when the one that began it was killed.
        if parent is not None and not parent.is_alive():
            raise StoppedError(None, "")

    try:
        work_on_cpu(store, time.monotonic() + limit, after, by_gradient, wait=True, judge=judge_of(store, study))
    except StoppedError:
        return
    finally:
        store.close()


class Progress:
    """A line for every finished cell, with the time that is left of the whole study."""

    def __init__(self, store: Store, study: Study, wish: Wish, console: Console) -> None:
        self.store, self.study, self.wish, self.console = store, study, wish, console
        self.known, self.seen = prepared_models(store), set[str]()
        self.seen = {cell.key for cell, state, _ in store.cells() if state in ("done", "failed")}

    def __call__(self, cell: Cell, state: str, record: dict[str, Any]) -> None:
        if cell.group:
            decide(self.store, self.study, (cell.label["base"], cell.label["variant"]))
        self.tell(cell, state, record)

    def tell(self, cell: Cell, state: str, record: dict[str, Any]) -> None:
        """One line about a finished cell."""
        self.seen.add(cell.key)
        n_left, left = self.left()
        if state == "failed":
            found = f"failed: {record['reason']}"
        elif "test" in record:
            found = f"{self.study.metric} {record['test'][self.study.metric]:.4f}"
        elif record.get("pruned"):
            found = "pruned"
        else:
            # The score is what is made small, such as what the top-1 lacks of one: not what people read.
            found = f"validation {self.study.metric} {record['val'][self.study.metric]:.4f}"
        about = (
            "" if not n_left else ", the time left is not known yet" if left is None else f", about {duration(left)}"
        )
        self.say(f"{len(self.seen)} done, {n_left} left{about}: {self._named(cell)}: {found}")

    def _named(self, cell: Cell) -> str:
        """A cell as a line calls it."""
        count = "" if self.study.tuning is None else f" of {self.study.tuning.count}"
        which = f"seed {cell.label['seed']}" if cell.trial is None else f"trial {cell.trial + 1}{count}"
        return f"{cell.label['base']}, {cell.label['variant']}, {which}"

    def left(self) -> tuple[int, float | None]:
        """Cells that are left, those among them that wait for trials, and seconds by the mean of their variant's.

        Before a variant's first training it is what its steps were measured to take.
        """
        spent: dict[str, list[float]] = defaultdict(list)
        counted: dict[tuple[str, str], int] = defaultdict(int)
        for cell, state, record in self.store.cells():
            if state in ("done", "failed"):
                counted[cell.label["base"], cell.label["variant"]] += 1
            if state == "done" and record:
                spent[cell.label["variant"]].append(record["seconds"])
        usual = statistics.fmean(each for found in spent.values() for each in found) if spent else None
        n_left, seconds, known = 0, 0.0, usual is not None
        for (base, variant), each in self.known.items():
            trials = self.study.tuning.count if self.study.tuning and each["by_gradient"] else 0
            n_open = max(0, trials + (self.study.seeds if each["by_gradient"] else 1) - counted[base, variant])
            n_left += n_open
            mine = spent.get(variant)
            guess = seconds_by_steps(self.study.base(base), each, self.wish.workers)
            known = known or guess is not None
            seconds += n_open * (statistics.fmean(mine) if mine else guess or usual or 0.0)
        return n_left, seconds / max(1, self.wish.workers) if known else None

    def watch(self, helpers: Sequence[Any], until: float) -> None:
        """Say what the helpers finish, until they end or the time is over."""
        while any(helper.is_alive() for helper in helpers) and time.monotonic() < until + GRACE:
            for helper in helpers:
                helper.join(0.5 / len(helpers))
            for cell, state, record in self.store.cells():
                if state in ("done", "failed") and cell.key not in self.seen and record is not None:
                    self.tell(cell, state, record)

    def first_word(self) -> None:
        """What there is to do."""
        n_left, left = self.left()
        about = "" if left is None or not n_left else f", about {duration(left)}"
        self.say(
            f"{self.study.question}\n{len(self.seen)} cells are done, {n_left} are left{about}, in {self.wish.store}"
        )

    def last_word(self, seconds: float) -> dict[str, int]:
        """What was done; how many cells are in which state."""
        counts, (n_left, _) = self.store.counts(), self.left()
        self.say(
            f"After {duration(seconds)}: {counts['done']} cells done, {counts['failed']} failed, {n_left} left; "
            f"everything is in {self.wish.store}"
        )
        return counts

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
