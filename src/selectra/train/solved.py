"""Models that learn nothing by gradient: solved once, or only measured."""

import time

from selectra.tasks.task import Task
from selectra.train.batches import Passes, Windows
from selectra.train.evaluation import evaluate
from selectra.train.state import State


def solve(state: State, task: Task, train: Windows, val: Windows | None) -> None:
    """Models that learn nothing by gradient; every process sees all training windows."""
    began, find = time.monotonic(), getattr(state.model, "solve", None)
    if find is not None:
        find(Passes(train, state.run.train.batch_size, state.world.device))
    if val:
        given = state.run.train
        metrics = evaluate(
            state.model, task, val, given.batch_size, state.world, given.precision, workers=given.workers,
            limit=given.load_timeout,
        )  # fmt: skip
        state.note(metrics, task.score(metrics))
    state.keep()
    state.at.seconds = time.monotonic() - began
    state.at.stopped_by = "nothing to train" if find is None else "solved"
