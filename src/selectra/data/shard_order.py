"""The order in which a pass reads shards: by seed and pass alone, whatever the processes and workers are.

All samples, shards shuffled, are one line, cut into lanes. Each lane is read from its beginning to its end by one
process and one worker, shuffled within a short distance, and batches take from lanes in turn. As many lanes as there
may ever be processes and workers are there always; who reads them changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from selectra.errors import ConfigError, DataError

Numbers = Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class Lane:
    """A piece of the line, and the order in which its samples are given.

    Args:
        first: Place of its first sample in the line.
        order: Places within the lane, each once; a sample is given at most the shuffle's length after it is read.
    """

    first: int
    order: Numbers


class Pass:
    """One pass over all samples, in batches.

    Args:
        counts: Samples of every shard.
        batch_size: Samples of a batch at most, over all processes.
        lanes: Lanes that one batch takes from (shared among processes), and sets of them (shared among workers), which
            batches take in turn.
        shuffle: Samples that all lanes together hold back to mix them.
        seed: Of the order.
        epoch: Number of the pass.
        size: Processes.
    """

    def __init__(
        self,
        counts: Numbers,
        batch_size: int,
        lanes: tuple[int, int],
        shuffle: int,
        seed: int,
        epoch: int,
        size: int = 1,
    ) -> None:
        self.n, self.batch_size, (self.across, self.turns) = int(counts.sum()), batch_size, lanes
        self.batches = n_batches(self.n, batch_size, size)
        self.size, self.key = size, [seed, epoch]
        self.distance = max(shuffle // (self.across * self.turns), 1)
        self.shards: Numbers = np.random.default_rng(self.key).permutation(len(counts))
        self.starts: Numbers = np.concatenate([[0], np.cumsum(counts[self.shards])])
        # Batches of each set of lanes, and the places in the line where sets begin.
        self.uses = [len(range(turn, self.batches, self.turns)) for turn in range(self.turns)]
        self.bounds = [self.n * sum(self.uses[:turn]) // self.batches for turn in range(self.turns + 1)]

    def place(self, position: int) -> tuple[int, int]:
        """The shard, and the sample in it, at a place of the line."""
        at = int(np.searchsorted(self.starts, position, "right")) - 1
        return int(self.shards[at]), position - int(self.starts[at])

    def lane(self, turn: int, across: int) -> Lane:
        """One lane of one set."""
        length = self.bounds[turn + 1] - self.bounds[turn]
        sizes = [len(range(each, length, self.across)) for each in range(self.across)]
        draw = np.random.default_rng([*self.key, 1 + turn * self.across + across])
        places = np.arange(sizes[across])
        return Lane(
            self.bounds[turn] + sum(sizes[:across]),
            np.argsort(places + self.distance * draw.random(len(places)), kind="stable"),
        )

    def share(self, batch: int, rank: int = 0) -> tuple[int, list[tuple[int, int]]]:
        """One process's part of a batch: the set of lanes, and of each sample the lane and its number there."""
        turn, use = batch % self.turns, batch // self.turns
        length, uses = self.bounds[turn + 1] - self.bounds[turn], self.uses[turn]
        taken = range(length * use // uses, length * (use + 1) // uses)
        mine = [place for place in taken if place % self.size == rank]
        return turn, [(place % self.across, place // self.across) for place in mine]


def n_batches(n: int, batch_size: int, size: int) -> int:
    """Batches of a pass: none is larger than asked for, and all are alike, so that no process is left without samples.

    With one sample of a batch for each process some hold two, where the samples do not divide evenly.
    """
    count = -(-n // batch_size)
    return count if n // max(count, 1) >= size else max(n // batch_size, 1)


def check_lanes(lanes: tuple[int, int], size: int, workers: int, batch_size: int, n: int) -> None:
    """Refuse what would leave lanes shared, or processes without samples.

    Raises:
        ConfigError: Lanes do not divide among processes or workers.
        DataError: There are fewer samples than processes.
    """
    across, turns = lanes
    if across < 1 or turns < 1 or across % size or turns % max(workers, 1):
        raise ConfigError(
            f"data.lanes={across},{turns}: the first must be a multiple of the processes ({size}), the second of "
            f"train.workers ({workers}). The order depends on the lanes: choose them for the most processes and "
            "workers that this training may ever have."
        )
    if batch_size < size or n < size:
        raise DataError(f"{n} samples in batches of {batch_size} are too few for {size} processes.")
