"""Do a study's trainings of image models packed on a GPU; every one is stored as it ends.

What comes of a cell is what the plain loop makes of it: the same weights to begin with, the same views of the same
images, the same evaluations, of which the best one's weights are scored on the test part, and trials pruned alike. As
`on_device_images` says, batches go on over the end of a pass.
"""

from math import isnan
from typing import Any

import torch

from selectra.compare.cells import Cell
from selectra.compare.on_device_images import refusal
from selectra.compare.packed_images import Job, Library, Training, work_packed
from selectra.compare.store import Store
from selectra.compare.study import Study
from selectra.compare.worker import CURABLE, Judge, OnDone, facts_of, load, never
from selectra.data.images import HeldImages
from selectra.registry import models
from selectra.train.job import typed


def packs_images(study: Study) -> bool:
    """Whether a study is of image models whose trainings can lie on a GPU with their images."""
    if models.entry(study.variants[0].model.name).kind != "image":
        return False
    runs = [typed(study.run(base, variant, 0)) for base in study.bases for variant in study.variants]
    return all(refusal(run) is None for run in runs) and all(load(typed(base).data).in_memory for base in study.bases)


def work_on_images(
    store: Store, device: torch.device, packed: int, until: float, on_done: OnDone, judge: Judge = never
) -> None:
    """Do the cells that belong on a GPU, `packed` at a time; at the limit those in flight are given back.

    Args:
        until: Moment of `time.monotonic` after which no cell is begun or finished.
        on_done: Called with every finished cell.
        judge: What ends a trial early.
    """
    library = Library(device, load)

    def take() -> Job | None:
        cell = store.take(True)
        if cell is None:
            return None
        return Job(cell, typed(cell.run), None if cell.trial is None else judge(cell))

    def finish(cell: Cell, state: str, record: dict[str, Any]) -> None:
        if store.finish(cell, record, state):
            on_done(cell, state, record)

    def done(training: Training) -> None:
        finish(training.job.key, *result_of(training, packed))

    def failed(job: Job, error: Exception) -> None:
        finish(job.key, "failed", {**job.key.label, "reason": str(error), CURABLE: True})

    with store.beating():
        work_packed(library, packed, take, done, until, failed, finish=False)


def result_of(training: Training, packed: int) -> tuple[str, dict[str, Any]]:
    """A cell's state and record."""
    cell, done, parts = training.job.key, training.on_device, training.parts
    windows = HeldImages(parts.train, None)
    record = facts_of(cell, training.parameters, windows, len(parts.test), training.device, packed)
    scores = [training.task.score(each) for each in training.history]
    record |= {"history": scores, "score": min(scores, default=None), "seconds": done.seconds}
    bad = (~done.losses[: done.done].isfinite()).nonzero()
    if len(bad) or any(isnan(score) for score in scores):
        step = int(bad[0]) + 1 if len(bad) else done.done
        return "failed", {**cell.label, "reason": f"diverged: the loss or the score at step {step} is no number"}
    if training.pruned:
        return "done", {**record, "pruned": True}
    record |= {"val": training.val, "best_step": training.best_step, "steps": done.done, "backends": done.backends}
    if cell.trial is None:
        # The one look at the test part, with the weights that validation chose.
        record["test"] = training.measure(parts.test)
    return "done", record
