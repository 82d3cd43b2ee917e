"""`selectra bench stream`: a token through a 12-block Mamba and through a Transformer with its cache, by position."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from selectra.bench.modules import seeded
from selectra.bench.stack import SEED, StackStudy, new_record, small_stacks, stacks_of
from selectra.bench.stack_table import stream_table
from selectra.bench.timing import Timing
from selectra.errors import BackendError

# Positions that a prefill takes at once.
CHUNK = 4096
STEP_AT_MOST = 1e-4
# Tokens in a row of one contender: those that bring the weights back into the cache, and those that are timed.
WARM, TIMED = 30, 20
WHAT = (
    "one token of one sequence, float32, wall clock: single steps, in bursts of one contender after the other, the "
    "first steps of a burst left out; ratio: median of the bursts' ratios"
)


def bench_stream(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    study: StackStudy | None = None,
) -> dict[str, Any]:
    """Check, then time a token by its position; returns the record.

    Raises:
        BackendError: Something is wrong; nothing is timed then.
    """
    study = study or StackStudy()
    with seeded(SEED, device):
        gate = _check_steps(small_stacks(), torch.randn(1, 37, 32))
        stacks = stacks_of(study)
        record = new_record("stream", WHAT, stacks, study, device, seconds, gate)
        for position in study.positions:
            record["rows"].append(_row(stacks, position, study.d_model, seconds))
            record["load after"] = os.getloadavg()
            save(record)
    console.print(stream_table(record), highlight=False, soft_wrap=True)
    return record


def _check_steps(stacks: dict[str, Any], x: Tensor) -> dict[str, float]:
    """Position by position against the whole: the worst error."""
    mamba, transformer = stacks["mamba"], stacks["transformer"]
    states, caches = mamba.init_state(1), transformer.cache(x.shape[1])
    pieces = x.split(1, dim=1)
    got = {
        "mamba": [mamba.step(piece, states) for piece in pieces],
        "transformer": [transformer.step(piece, caches, t) for t, piece in enumerate(pieces)],
    }
    found = {}
    for name, steps in got.items():
        with torch.no_grad():
            want = stacks[name](x)
        found[name] = ((torch.cat(steps, 1) - want).abs().max() / want.abs().max()).item()
        if not found[name] <= STEP_AT_MOST:
            raise BackendError(f"{name} is wrong step by step, nothing is timed: off by {found[name]:.1e}.")
    return found


def _row(stacks: dict[str, Any], position: int, d_model: int, seconds: float) -> dict[str, Any]:
    mamba, transformer = stacks["mamba"], stacks["transformer"]
    states, before = mamba.init_state(1), torch.randn(1, position, d_model)
    for chunk in before.split(CHUNK, dim=1):
        states = mamba.prefill(chunk, states)
    caches, x = transformer.cache(position + 1), torch.randn(1, 1, d_model)
    runs = {"mamba": lambda: mamba.step(x, states), "transformer": lambda: transformer.step(x, caches, position)}
    return {"position": position, **_bursts(runs, seconds)}


def _bursts(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    ratios = []
    end = time.perf_counter() + seconds
    while len(ratios) < 2 or time.perf_counter() < end:
        burst = {name: _burst(run) for name, run in runs.items()}
        for name, found in burst.items():
            times[name] += found
        one, other = (median(found) for found in burst.values())
        ratios.append(other / one)
    timings = {name: asdict(Timing(median(found), min(found), len(found))) for name, found in times.items()}
    return {**timings, "ratio": median(ratios)}


def _burst(run: Callable[[], object]) -> list[float]:
    for _ in range(WARM):
        run()
    found = []
    for _ in range(TIMED):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found
