"""The order of the data: shuffled by seed and pass for training, every window exactly once for evaluation.

A data set has a length and gives whole batches, `windows[list_of_indices]`, or it is a `Stream`.
"""

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, IterableDataset, get_worker_info

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

    def counts(self, position: int) -> bool: ...

    def start_at(self, position: int) -> Iterator[Any]: ...


def training_order(windows: Windows | Stream, train: Train, world: World) -> Order:
    """The order of a split's batches: a stream has its own."""
    if isinstance(windows, Stream):
        return StreamOrder(windows, train, world)
    return TrainingOrder(windows, train, world)


def agreed(batch: Any, world: World) -> Any:
    """A share of a batch, with what it has to know of the others' shares; all processes ask for that together."""
    return batch.agreed(world.most) if world.size > 1 and hasattr(batch, "agreed") else batch


def part_of(batch: Any, world: World) -> Any:
    """This process's part of every sequence of a batch, where they are split; else the batch.

    Raises:
        ConfigError: The batch cannot be split so.
    """
    if not world.split:
        return batch
    if not hasattr(batch, "along_length"):
        raise ConfigError(
            f"parallel.kind is 'length', which is for language models; a {type(batch).__name__} is not split so."
        )
    return batch.along_length(world.rank, world.size)


class TrainingOrder:
    """Batches of this process, pass after pass, from any position on.

    There is one order of batches, which depends on the seed and the pass alone, and every process takes its share of
    each: together they train on the batches of a single process, whatever their number, and nothing is dropped or seen
    twice. Shares differ by one window at most; where a pass's last batch has fewer windows than there are processes,
    those without a share are handed the batch's first window, which `counts` says is not theirs.
    """

    def __init__(self, windows: Windows, train: Train, world: World) -> None:
        if len(windows) < 1:
            raise DataError("the training split has no windows.")
        if train.batch_size < world.size:
            raise ConfigError(
                f"train.batch_size is {train.batch_size} over all processes, and there are {world.size}; "
                f"take at least {world.size}, and best a multiple of it."
            )
        self.windows, self.workers, self.world = windows, train.workers, world
        self.limit = train.load_timeout
        # Of one process: shares are taken from whole batches.
        self.sampler = DistributedSampler(
            cast(Dataset[Any], windows), num_replicas=1, rank=0, shuffle=True, seed=train.seed, drop_last=False
        )
        self.batches = BatchSampler(self.sampler, train.batch_size, drop_last=False)

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self.batches)

    def counts(self, position: int) -> bool:
        """Whether what `start_at` hands out at this position is this process's own."""
        short = position % len(self) == len(self) - 1
        size = len(self.windows) - (len(self) - 1) * self.batches.batch_size if short else self.batches.batch_size
        return self.world.rank < size

    def _shares(self) -> list[list[Any]]:
        shares = []
        for batch in self.batches:
            least, more = divmod(len(batch), self.world.size)
            begin, end = (rank * least + min(rank, more) for rank in (self.world.rank, self.world.rank + 1))
            # What mixes examples needs of each the one that follows in the batch: at most one beyond the share.
            mixes = getattr(self.windows, "mixes", False)
            items = list(zip(batch, [*batch[1:], batch[0]], strict=True)) if mixes else batch
            shares.append(items[begin:end] or items[:1])
        return shares

    def start_at(self, position: int) -> Iterator[Any]:
        """All batches after the first `position`, without end; who prepares them stays from pass to pass."""
        in_passes = _InPasses(self.windows, self.sampler.seed)
        # Here, because processes that prepare batches begin with what this one has.
        in_passes.turn(position // len(self))
        return load(in_passes, self._shares_from(position), self.workers, self.limit)

    def _shares_from(self, position: int) -> Iterator[tuple[int, list[Any]]]:
        epoch, skip = divmod(position, len(self))
        while True:
            self.sampler.set_epoch(epoch)
            yield from ((epoch, share) for share in self._shares()[skip:])
            epoch, skip = epoch + 1, 0


class _InPasses:
    """A split by number of pass and list of numbers, told which pass comes: views may differ from pass to pass."""

    def __init__(self, windows: Windows, seed: int) -> None:
        self.windows, self.seed = windows, seed
        self.now: int | None = None

    def turn(self, epoch: int) -> None:
        """This pass comes next."""
        if epoch != self.now and hasattr(self.windows, "at_pass"):
            self.windows.at_pass(epoch, self.seed)  # pyright: ignore[reportAttributeAccessIssue]
        self.now = epoch

    def __getitem__(self, item: tuple[int, list[Any]]) -> Any:
        epoch, indices = item
        self.turn(epoch)
        return self.windows[indices]


def of_each(batch_size: int, world: World) -> int:
    """How many windows of such a batch over all processes each takes at once where nothing is learned from them."""
    return max(1, batch_size // world.size)


def every_window_once(
    windows: Windows | Stream, batch_size: int, world: World, workers: int = 0, limit: float = 0.0
) -> Iterator[Any]:
    """This process's share of all windows; the shares overlap nowhere and miss nothing.

    Args:
        batch_size: Of this process.
        workers: Processes that prepare them, each of a stream a part of it.
        limit: Seconds that a wait for those may take; 0 for no limit.
    """
    if isinstance(windows, Stream):
        return load(_Once(windows, batch_size, (world.rank, world.size)), None, workers, limit, windows)
    mine = range(world.rank, len(windows), world.size)
    return load(windows, list(BatchSampler(mine, batch_size, drop_last=False)), workers, limit)


class _Once(IterableDataset[Any]):
    """One process's share of a stream; a loader's worker makes a part of it."""

    def __init__(self, windows: Stream, batch_size: int, share: tuple[int, int]) -> None:
        super().__init__()
        self.windows, self.batch_size, self.share = windows, batch_size, share

    def __iter__(self) -> Iterator[Any]:
        worker, (rank, size) = get_worker_info(), self.share
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self.windows.once(self.batch_size, (rank * parts + part, size * parts))


class Passes:
    """All training windows in batches, once for each time that they are asked for."""

    def __init__(self, windows: Windows, batch_size: int, device: torch.device) -> None:
        self.windows, self.batch_size, self.device = windows, batch_size, device

    def __iter__(self) -> Iterator[Any]:
        for batch in every_window_once(self.windows, self.batch_size, World()):
            yield batch.to(self.device)
