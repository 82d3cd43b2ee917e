"""Reading shards: samples in the order of a pass, from any place on, with a bounded number held."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from selectra.data.download import Limits
from selectra.data.shard_index import DamagedShardError, Index, Sample, read_samples
from selectra.data.shard_order import Lane, Pass


class Read(NamedTuple):
    """A sample that was read, or why it was left out.

    Args:
        number: Its number among all samples of the index.
        sample: None where it was left out.
        reason: Why.
    """

    number: int
    sample: Sample | None
    reason: str = ""


class Reader:
    """Reads a part's shards.

    Args:
        index: The shards.
        limits: Of time for each sample.
        skip: Leave out what a damaged shard does not give, and say so; else it is an error.
    """

    def __init__(self, index: Index, limits: Limits, skip: bool) -> None:
        self.index, self.limits, self.skip = index, limits, skip
        self.bases = np.concatenate([[0], np.cumsum(index.counts)])

    def place(self, number: int) -> tuple[int, int]:
        """The shard of a sample, and its number there."""
        shard = int(np.searchsorted(self.bases, number, "right")) - 1
        return shard, number - int(self.bases[shard])

    def part(self, shard: int, first: int, count: int) -> Generator[Read, None, None]:
        """So many samples of a shard, as they lie in it.

        Raises:
            DataError: The shard is damaged or slow; with `skip` a damaged one's samples are given as left out.
        """
        samples, base = read_samples(self.index.shards[shard], first, self.limits), int(self.bases[shard]) + first
        done = 0
        try:
            # The count ends it: what lies behind is somebody else's.
            while done < count:
                sample = next(samples)
                yield Read(base + done, sample)
                done += 1
        except DamagedShardError as error:
            if not self.skip:
                raise
            for each in range(done, count):
                yield Read(base + each, None, str(error))
        finally:
            samples.close()

    def span(self, at: int, end: int) -> Iterator[Read]:
        """Samples from a number up to another, as they lie in the shards."""
        while at < end:
            shard, first = self.place(at)
            count = min(self.index.shards[shard].count - first, end - at)
            yield from self.part(shard, first, count)
            at += count


class LaneReader:
    """Gives a lane's samples one by one in their order.

    Samples that were given before `begin` are read over; reading begins at the first that is still to be given.

    Args:
        reader: Of the shards.
        order: The pass that the lane is of.
        lane: What is read.
        begin: How many samples were given before.
    """

    def __init__(self, reader: Reader, order: Pass, lane: Lane, begin: int) -> None:
        self.reader, self.order, self.lane, self.given = reader, order, lane, begin
        left = lane.order[begin:]
        self._wanted = set(left.tolist())
        self._held: dict[int, Read] = {}
        self._coming = self._from(int(left.min()) if len(left) else len(lane.order))

    def take(self) -> Read:
        """The next sample."""
        place = int(self.lane.order[self.given])
        while place not in self._held:
            at, read = next(self._coming)
            if at in self._wanted:
                self._held[at] = read
        self.given += 1
        return self._held.pop(place)

    def close(self) -> None:
        """Let go of the open shard."""
        self._coming.close()

    def _from(self, at: int) -> Generator[tuple[int, Read], None, None]:
        """The lane's samples from a place on, each with its place."""
        end = len(self.lane.order)
        while at < end:
            shard, first = self.order.place(self.lane.first + at)
            count = min(self.reader.index.shards[shard].count - first, end - at)
            for each, read in enumerate(self.reader.part(shard, first, count)):
                yield at + each, read
            at += count
