"""The order of the data: shuffled by seed and pass for training, every window exactly once for evaluation.

A data set has a length and gives whole batches: `windows[list_of_indices]`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from selectra.errors import ConfigError, DataError
from selectra.spec import Train
from selectra.train.parallel import World

T = TypeVar("T")


class Windows(Protocol):
    """What the loop asks of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> Any: ...


def _same(batch: T) -> T:
    return batch


def _load(windows: Windows, indices: Sequence[list[int]], workers: int) -> Iterator[Any]:
    # Its own generator: making a loader must not draw from the generator that dropout uses, or a resumed run differs.
    loader = DataLoader(
        cast(Dataset[Any], windows),
        batch_size=None,
        sampler=indices,
        collate_fn=_same,
        num_workers=workers,
        generator=torch.Generator(),
    )
    return iter(loader)


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
            yield from _load(self.windows, list(self.batches)[skip:], self.workers)
            epoch, skip = epoch + 1, 0


def every_window_once(windows: Windows, batch_size: int, world: World, workers: int = 0) -> Iterator[Any]:
    """This process's share of all windows, in order; the shares overlap nowhere and miss nothing."""
    mine = range(world.rank, len(windows), world.size)
    return _load(windows, list(BatchSampler(mine, batch_size, drop_last=False)), workers)


class Passes:
    """All training windows in batches, once for each time that they are asked for."""

    def __init__(self, windows: Windows, batch_size: int, device: torch.device) -> None:
        self.windows, self.batch_size, self.device = windows, batch_size, device

    def __iter__(self) -> Iterator[Any]:
        for batch in every_window_once(self.windows, self.batch_size, World()):
            yield batch.to(self.device)
