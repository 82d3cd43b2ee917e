"""The order of the data: shuffled by seed and pass for training, every window exactly once for evaluation.

A data set has a length and gives whole batches, `windows[list_of_indices]`, or it is a `Stream`.
"""

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch.utils.data import BatchSampler, Dataset, DistributedSampler

from selectra.errors import ConfigError, DataError
from selectra.spec import Train
from selectra.train.loader import load
from selectra.train.parallel import World
from selectra.train.streams import Stream, StreamOrder


class Windows(Protocol):
    """What the loop asks of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> Any: ...


class Order(Protocol):
    """What the loop asks of an order of training batches."""

    windows: Any

    def __len__(self) -> int: ...

    def start_at(self, position: int) -> Iterator[Any]: ...


def training_order(windows: Windows | Stream, train: Train, world: World) -> Order:
    """The order of a split's batches: a stream has its own."""
    if isinstance(windows, Stream):
        return StreamOrder(windows, train, world)
    return TrainingOrder(windows, train, world)


class TrainingOrder:
    """Batches of this process, pass after pass, from any position on.

    Every process sees its share of one order that depends on the seed and the pass alone, so that the processes
    together train on the same batches as one process would. Nothing is dropped within a pass, except windows (fewer
    than there are processes) that would leave processes with unequal counts.
    """

    def __init__(self, windows: Windows, train: Train, world: World) -> None:
        if len(windows) < max(world.size, 1):
            raise DataError(f"the training split has {len(windows)} windows; there must be at least {world.size}.")
        if train.batch_size % world.size:
            raise ConfigError(
                f"train.batch_size is {train.batch_size} over all processes, "
                f"which does not divide among {world.size}; take a multiple of {world.size}."
            )
        self.windows = windows
        self.workers = train.workers
        self.limit = train.load_timeout
        self.sampler = DistributedSampler(
            cast(Dataset[Any], windows),
            num_replicas=world.size,
            rank=world.rank,
            shuffle=True,
            seed=train.seed,
            drop_last=world.size > 1,
        )
        self.batches = BatchSampler(self.sampler, train.batch_size // world.size, drop_last=False)

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self.batches)

    def start_at(self, position: int) -> Iterator[Any]:
        """All batches after the first `position`, without end."""
        epoch, skip = divmod(position, len(self))
        while True:
            self.sampler.set_epoch(epoch)
            # A split whose views differ from pass to pass is told which one comes.
            if hasattr(self.windows, "at_pass"):
                self.windows.at_pass(epoch, self.sampler.seed)  # pyright: ignore[reportAttributeAccessIssue]
            yield from load(self.windows, list(self.batches)[skip:], self.workers, self.limit)
            epoch, skip = epoch + 1, 0


def every_window_once(windows: Windows | Stream, batch_size: int, world: World, workers: int = 0) -> Iterator[Any]:
    """This process's share of all windows, in order; the shares overlap nowhere and miss nothing."""
    if isinstance(windows, Stream):
        return windows.once(batch_size, (world.rank, world.size))
    mine = range(world.rank, len(windows), world.size)
    return load(windows, list(BatchSampler(mine, batch_size, drop_last=False)), workers)


class Passes:
    """All training windows in batches, once for each time that they are asked for."""

    def __init__(self, windows: Windows, batch_size: int, device: torch.device) -> None:
        self.windows, self.batch_size, self.device = windows, batch_size, device

    def __iter__(self) -> Iterator[Any]:
        for batch in every_window_once(self.windows, self.batch_size, World()):
            yield batch.to(self.device)
