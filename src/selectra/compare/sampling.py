"""Time and power of something that is done over and over: warmed up, synchronised, the device never idle in between."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from selectra.compare.energy import Counter, Power

WARM_CALLS, LEAST_CALLS = 2, 3
# A call that takes longer is warmed up and timed once, unless there is time for more.
SLOW = 1.0
# Seconds between the first and the last step of the energy counter that a power is taken from.
LEAST_COVERED = 0.28


@dataclass(frozen=True)
class Sample:
    """What one call takes.

    `ms` is the median of the times between the ends of two calls in a row, `lower` and `upper` are the quartiles;
    `host_ms` is how long the host needs to begin a call, which is what limits small models; `peak_mb` is the most
    memory that was taken on a GPU, weights and all else included; `joules` and `watts` are of the whole device.
    """

    ms: float
    lower: float
    upper: float
    calls: int
    host_ms: float
    peak_mb: float | None
    joules: float | None
    watts: float | None

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return asdict(self)


def sample(call: Callable[[], object], device: torch.device, seconds: float, counter: Counter) -> Sample:
    """Measure a call.

    Args:
        call: On a GPU it may return before the device has done it.
        seconds: How long at the least, after the warm-up.
        counter: Of the device's energy.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    slow = False
    for _ in range(WARM_CALLS):
        began = time.perf_counter()
        call()
        _wait(device)
        slow = time.perf_counter() - began > SLOW
        if slow:
            break
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None
    with Power(counter) as power:
        times, host = (_on_gpu if on_gpu else _on_host)(call, seconds, power, 1 if slow else LEAST_CALLS)
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if times[1:] else 3 * times
    # Over a shorter time a step that is dated a little wrong weighs too much.
    watts = power.watts if power.covered >= LEAST_COVERED else None
    joules = None if watts is None else watts * statistics.fmean(times)
    return Sample(1e3 * median, 1e3 * lower, 1e3 * upper, len(times), 1e3 * host, peak, joules, watts)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on_gpu(call: Callable[[], object], seconds: float, power: Power, least: int) -> tuple[list[float], float]:
    """Seconds between the ends of calls, by events: the next call is always begun before the last one ends."""
    ends, host = [torch.cuda.Event(enable_timing=True)], []
    call()
    ends[0].record()
    began = time.perf_counter()
    while _go_on(time.perf_counter() - began, seconds, len(ends) > least, power):
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
        ends[-2].synchronize()
    ends[-1].synchronize()
    times = [before.elapsed_time(after) / 1e3 for before, after in pairwise(ends)]
    return times, statistics.median(host)


def _go_on(passed: float, seconds: float, enough: bool, power: Power) -> bool:
    """Whether to measure on: for so long, so many calls, and until the counter of energy has moved for long enough."""
    covered = not power.counter.there or power.covered >= LEAST_COVERED or passed >= 3 * seconds + 2 * LEAST_COVERED
    return passed < seconds or not enough or not covered


def _on_host(call: Callable[[], object], seconds: float, power: Power, least: int) -> tuple[list[float], float]:
    times: list[float] = []
    began = time.perf_counter()
    while _go_on(time.perf_counter() - began, seconds, len(times) >= least, power):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times, statistics.median(times)


def idle_watts(device: torch.device, counter: Counter, seconds: float) -> float | None:
    """Power of the device while it has nothing to do, for comparison."""
    if not counter.there:
        return None
    _wait(device)
    with Power(counter) as power:
        time.sleep(seconds)
    return power.watts
