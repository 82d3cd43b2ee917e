"""Times on the device itself: by events on a GPU, with the launches queued ahead, so that the host's time is not in it.

Contenders take turns inside a round; each call of a contender takes the next of its input sets, so that none finds
its inputs in the cache because the call before read them.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A sample lasts about as long, in seconds, and holds at most so many calls.
SAMPLE_SECONDS, MOST_CALLS = 4e-4, 16
LEAST_ROUNDS, MOST_ROUNDS = 7, 60
COPY_BYTES = 1 << 28

Run = Callable[[int], object]


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one call over the rounds: the median, both quartiles, the fastest, and how many rounds."""

    median: float
    lower: float
    upper: float
    fastest: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """From the seconds of each round."""
        times = sorted(1e3 * t for t in seconds)
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
        return cls(median, lower, upper, times[0], len(times))


class Stopwatch:
    """Measures device time.

    Args:
        device: Where the work runs; on a CPU the clock of the host is taken.
        copy_bytes: Size of the copies that keep a GPU busy while work is queued, and that clear its cache.
    """

    def __init__(self, device: torch.device, copy_bytes: int = COPY_BYTES) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self.copy_seconds = self._measure_copy()

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a device-to-device copy, read and written ones together."""
        return 2 * self._source.nbytes / self.copy_seconds

    def busy(self, seconds: float) -> None:
        """Give a GPU copies to do for at least `seconds`, one at the least."""
        if self.cuda:
            for _ in range(1 + int(seconds / self.copy_seconds)):
                self.copy()

    def copy(self) -> Tensor:
        """One large copy on the device."""
        return self._target.copy_(self._source)

    def seconds(self, work: Callable[[], object], ahead: float = 0.0) -> Callable[[], float]:
        """Do the work; the answer gives its seconds when asked, which waits for the device.

        Args:
            ahead: Seconds of other work that the device gets first, while the host queues this.
        """
        if not self.cuda:
            start = time.perf_counter()
            work()
            passed = time.perf_counter() - start
            return lambda: passed
        self.busy(ahead)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        first.record(stream)
        work()
        last.record(stream)

        def passed_on_device() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1e3

        return passed_on_device

    def _measure_copy(self) -> float:
        for _ in range(3):
            self.copy()
        # The default stands in while there is nothing measured to wait for.
        self.copy_seconds = 1e-4
        # Several in a row, so that the launch of the first does not count.
        times = [self.seconds(lambda: [self.copy() for _ in range(4)], 2e-4)() for _ in range(11 if self.cuda else 3)]
        return statistics.median(times) / 4

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


class _Contender:
    """One thing to time, and how many of its calls make a sample."""

    def __init__(self, run: Run, watch: Stopwatch) -> None:
        self._run, self._next = run, 0
        self.times: list[float] = []
        for _ in range(2):
            self._once()
        watch.synchronize()
        # The host's time alone, to know how long the device must be kept busy.
        start = time.perf_counter()
        self._once()
        host = time.perf_counter() - start
        watch.synchronize()
        device = watch.seconds(self._once, 2 * host)()
        self.calls = max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / max(device, 1e-9))))
        self.ahead = 1.5 * host * self.calls
        self.device_seconds = device

    def _once(self) -> None:
        self._run(self._next)
        self._next += 1

    def sample(self) -> None:
        """A few calls in a row."""
        for _ in range(self.calls):
            self._once()


def time_in_turn(runs: Mapping[str, Run], seconds: float, watch: Stopwatch) -> dict[str, Spread]:
    """Time every contender once a round until `seconds` are over, within `LEAST_ROUNDS` and `MOST_ROUNDS`.

    Args:
        runs: By name, a function that is given the number of its call and takes the input set of that number.
    """
    contenders = {name: _Contender(run, watch) for name, run in runs.items()}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_ROUNDS or (time.perf_counter() < end and rounds < MOST_ROUNDS):
        pending: list[tuple[_Contender, Callable[[], float]]] = []
        for contender in contenders.values():
            pending.append((contender, watch.seconds(contender.sample, contender.ahead)))
        for contender, passed in pending:
            contender.times.append(passed() / contender.calls)
        rounds += 1
    return {name: Spread.of(contender.times) for name, contender in contenders.items()}


def host_microseconds(run: Callable[[], Any], watch: Stopwatch, calls: int = 50, rounds: int = 15) -> float:
    """The host's time for one call, in microseconds: the median of rounds, with the device idle before each."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(rounds):
        watch.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    watch.synchronize()
    return 1e6 * statistics.median(times)
