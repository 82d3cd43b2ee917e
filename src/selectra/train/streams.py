"""Splits that are read as a stream, in an order of their own, and where a training is in it."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import IterableDataset

from selectra.spec import Train
from selectra.train.loader import load, taken
from selectra.train.parallel import World


@runtime_checkable
class Stream(Protocol):
    """A split that is read in an order of its own, which depends on the seed and the pass alone."""

    left_out: list[str]
    """Samples that could not be read and were left out."""

    def __len__(self) -> int: ...

    def batches_in_pass(self, batch_size: int, size: int, workers: int) -> int:
        """Batches of a pass for each of `size` processes, `batch_size` over all of them."""
        ...

    def one_pass(
        self, batch_size: int, share: tuple[int, int], seed: int, epoch: int, skip: int
    ) -> IterableDataset[Any]:
        """A process's batches of a pass, without the first ones; worker k of n makes every n-th of them."""
        ...

    def once(self, batch_size: int, share: tuple[int, int]) -> Iterator[Any]:
        """A process's part of all samples, each once."""
        ...


class StreamOrder:
    """Batches of this process out of a stream, pass after pass, from any position on."""

    def __init__(self, windows: Stream, train: Train, world: World) -> None:
        self.windows, self.train, self.share = windows, train, (world.rank, world.size)
        self._length = windows.batches_in_pass(train.batch_size, world.size, train.workers)

    def __len__(self) -> int:
        """Batches in one pass."""
        return self._length

    def counts(self, position: int) -> bool:
        """Whether what `start_at` hands out at this position is this process's own: always."""
        return True

    def start_at(self, position: int) -> Iterator[Any]:
        """All batches after the first `position`, without end."""
        epoch, skip = divmod(position, len(self))
        train = self.train
        while True:
            batches = self.windows.one_pass(train.batch_size, self.share, train.seed, epoch, skip)
            yield from load(batches, None, train.workers, train.load_timeout, self.windows)
            epoch, skip = epoch + 1, 0


def left_out(splits: Sequence[Any], world: World) -> list[str]:
    """The samples that any process left out of these splits since this was asked last; all of them must ask."""
    every = world.gather([name for split in splits for name in taken(split)])
    return [name for names in every for name in names]
