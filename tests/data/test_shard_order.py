"""The order of shards: every sample once, the same batches whoever reads them."""

import numpy as np
import pytest

from selectra.data.shard_order import Pass, check_lanes
from selectra.errors import ConfigError, DataError

COUNTS = np.array([13, 1, 0, 40, 7, 22])


def samples(order: Pass, batch: int, rank: int = 0) -> list[tuple[int, int]]:
    """What a process's part of a batch holds, as shard and number."""
    turn, wanted = order.share(batch, rank)
    lanes = {across: order.lane(turn, across) for across, _ in wanted}
    return [order.place(lanes[a].first + int(lanes[a].order[i])) for a, i in wanted]


@pytest.mark.parametrize("batch_size", [1, 5, 8, 83, 200])
@pytest.mark.parametrize("lanes", [(1, 1), (4, 2), (8, 4)])
def test_a_pass_is_every_sample_once(batch_size, lanes):
    order = Pass(COUNTS, batch_size, lanes, 30, seed=1, epoch=2)
    batches = [samples(order, i) for i in range(order.batches)]
    found = sorted(sample for batch in batches for sample in batch)
    assert found == [(s, i) for s, count in enumerate(COUNTS) for i in range(count)]
    assert all(0 < len(batch) <= batch_size for batch in batches)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("batch_size", [8, 16])
def test_processes_share_the_batches_of_one(size, batch_size):
    alone = Pass(COUNTS, batch_size, (8, 4), 30, 1, 0)
    shared = Pass(COUNTS, batch_size, (8, 4), 30, 1, 0, size)
    if batch_size > size:
        assert alone.batches == shared.batches
    for i in range(shared.batches):
        parts = [samples(shared, i, rank) for rank in range(size)]
        assert all(parts)
        if batch_size > size:
            assert sorted(each for part in parts for each in part) == sorted(samples(alone, i))
            assert max(map(len, parts)) <= batch_size // size
    everything = [each for i in range(shared.batches) for rank in range(size) for each in samples(shared, i, rank)]
    assert len(everything) == len(set(everything)) == COUNTS.sum()


def test_a_lane_belongs_to_one_process_and_is_given_in_order():
    order = Pass(COUNTS, 12, (4, 2), 30, 1, 0, 2)
    given: dict[tuple[int, int], list[int]] = {}
    for i in range(order.batches):
        for rank in range(2):
            turn, wanted = order.share(i, rank)
            for across, number in wanted:
                assert across % 2 == rank
                given.setdefault((turn, across), []).append(number)
    for (turn, across), numbers in given.items():
        assert numbers == list(range(len(order.lane(turn, across).order)))


def test_the_order_is_of_the_seed_and_the_pass():
    def line(seed, epoch):
        order = Pass(COUNTS, 8, (4, 2), 40, seed, epoch)
        return [each for i in range(order.batches) for each in samples(order, i)]

    assert line(1, 0) == line(1, 0)
    assert len({tuple(line(*each)) for each in ((1, 0), (1, 1), (2, 0))}) == 3


def test_a_lane_is_shuffled_within_its_distance():
    order = Pass(np.array([4000]), 10, (2, 1), 200, 0, 0)
    lane = order.lane(0, 1).order
    assert sorted(lane) == list(range(2000))
    held = [np.setdiff1d(np.arange(lane[: i + 1].max() + 1), lane[: i + 1]).size for i in range(0, 2000, 37)]
    assert 50 < max(held) <= 100
    assert np.abs(lane - np.arange(2000)).mean() > 20


def test_lanes_must_divide():
    check_lanes((8, 4), 4, 2, 8, 100)
    with pytest.raises(ConfigError, match=r"data\.lanes=8,4: the first must be a multiple of the processes \(3\)"):
        check_lanes((8, 4), 3, 0, 9, 100)
    with pytest.raises(ConfigError, match=r"the second of train\.workers \(3\)"):
        check_lanes((8, 4), 1, 3, 9, 100)
    with pytest.raises(DataError, match="3 samples in batches of 4 are too few for 4 processes"):
        check_lanes((8, 4), 4, 0, 4, 3)
