"""Times of several contenders, taken in turn in one run, so that a noisy machine is noisy to all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

    A contender that is much faster than the slowest runs several times in a round, so that its time is not lost in
    the clock's grain.
    """
    once = {name: _seconds(run, 1, device) for name, run in contenders.items()}
    once = {name: _seconds(run, 1, device) for name, run in contenders.items()}
    repeats = {name: max(1, min(200, int(max(once.values()) / 10 / max(t, 1e-6)))) for name, t in once.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(len(t) for t in times.values()) < least_rounds:
        for name, run in contenders.items():
            times[name].append(_seconds(run, repeats[name], device))
    return {name: Timing(statistics.median(t), min(t), len(t)) for name, t in times.items()}


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
