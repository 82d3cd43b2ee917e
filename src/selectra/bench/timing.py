"""Times of several contenders, taken in turn in one run, so that a noisy machine is noisy to all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the rounds, the fastest, and how many rounds there were."""

    median: float
    fastest: float
    rounds: int


def interleaved(
    contenders: Mapping[str, Callable[[], object]], seconds: float, device: torch.device, least_rounds: int = 3
) -> dict[str, Timing]:
    """Time every contender once a round, in the same order, until `seconds` are over.

    The first call of each is a warm-up, whose time, maybe that of a compiler, tells nothing. A contender that is much
    faster than the slowest runs several times in a round, so that its time is not lost in the clock's grain; one whose
    second call outlasts `seconds` has no other.
    """
    for run in contenders.values():
        _seconds(run, 1, device)
    second = {name: _seconds(run, 1, device) for name, run in contenders.items()}
    slow = {name for name, t in second.items() if t > seconds}
    longest = max(min(t, seconds) for t in second.values())
    repeats = {name: max(1, min(200, int(longest / 10 / max(t, 1e-6)))) for name, t in second.items()}
    times: dict[str, list[float]] = {name: [second[name]] if name in slow else [] for name in contenders}
    end = time.perf_counter() + seconds
    rounds = 0
    while slow != set(contenders) and (rounds < least_rounds or time.perf_counter() < end):
        for name, run in contenders.items():
            if name not in slow:
                times[name].append(_seconds(run, repeats[name], device))
        rounds += 1
    return {name: Timing(statistics.median(t), min(t), len(t)) for name, t in times.items()}


def paired(contenders: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Time two contenders in turn on the CPU; besides their times the median of the rounds' ratios, second over first.

    A contender whose single call outlasts `seconds` is timed in its first call and once more.
    """
    device = torch.device("cpu")
    first = {name: _seconds(run, 1, device) for name, run in contenders.items()}
    slow = max(first.values()) > seconds
    quick = first if slow else {name: _seconds(run, 1, device) for name, run in contenders.items()}
    repeats = {name: max(1, min(50, int(max(quick.values()) / 3 / max(t, 1e-6)))) for name, t in quick.items()}
    times: dict[str, list[float]] = {name: [t] if slow else [] for name, t in first.items()}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < (2 if slow else 5) or (not slow and time.perf_counter() < end):
        for name, run in contenders.items():
            times[name].append(_seconds(run, repeats[name], device))
    rounds = [second / one for one, second in zip(*times.values(), strict=True)]
    found: dict[str, Any] = {name: asdict(Timing(statistics.median(t), min(t), len(t))) for name, t in times.items()}
    return found | {"ratio": statistics.median(rounds)}


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
