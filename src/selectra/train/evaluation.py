"""A task's metrics over a split."""

from contextlib import nullcontext

import torch
from torch import nn

from selectra.tasks.task import Evaluator, Task
from selectra.train.batches import Windows, every_window_once, of_each, part_of
from selectra.train.depth import training_mode
from selectra.train.loader import naming_ended
from selectra.train.parallel import World
from selectra.train.precision import Precision, autocast
from selectra.train.sharding import gathered


def evaluate(
    model: nn.Module,
    task: Task,
    windows: Windows,
    batch_size: int,
    world: World | None = None,
    precision: Precision = "float32",
    evaluator: Evaluator | None = None,
    workers: int = 0,
    limit: float = 0.0,
) -> dict[str, float]:
    """The task's metrics on every window exactly once, whatever the batch size and the number of processes.

    Args:
        batch_size: Over all processes.
        evaluator: Of the task, for whoever asks it for more than the metrics; by default a fresh one.
        workers: Processes that prepare batches, of each process.
        limit: Seconds that a wait for those may take; 0 for no limit.

    Raises:
        StalledError: A process did not prepare a batch in time, or it has ended.
    """
    world = world or World(device=next((p.device for p in model.parameters()), torch.device("cpu")))
    evaluator, was_training, readers = evaluator or task.evaluator(), model.training, world.readers
    model.eval()
    # Processes may have unequally many batches.
    whole_weights = gathered(model) if world.sharded else nullcontext()
    with whole_weights, autocast(world.device, precision), naming_ended(workers):
        for batch in every_window_once(windows, of_each(batch_size, readers), readers, workers, limit):
            evaluator.update(model, part_of(batch.to(world.device), world))
    if was_training:
        training_mode(model)
    evaluator.reduce(world.gather)
    return evaluator.compute()
