"""`selectra bench block_parts` on a CPU: the share of each part of an S6 block, from PyTorch's profiler."""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from selectra.bench.modules import Subject, backends, check, forward_of, plain, seeded, training_of
from selectra.bench.parts import COPIES, PRODUCTS, product_part
from selectra.bench.stack_table import cpu_parts_table
from selectra.bench.timing import interleaved
from selectra.mixers import S6
from selectra.ops import native
from selectra.train.record import environment

SEED, CALLS = 0, 20
WHOLE = "the whole call"
OURS = {"selectra::selective_scan": "scan", "selectra::causal_conv1d": "conv"}
PARTS = ("in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj", "copies", "elementwise and Python")


class Size(NamedTuple):
    """A block and its input."""

    d_model: int
    length: int
    batch: int = 1


SIZES = tuple(Size(d_model, length) for d_model in (192, 384) for length in (196, 1024))


def bench_cpu_parts(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    sizes: tuple[Size, ...] = SIZES,
) -> dict[str, Any]:
    """Check, then time; returns the record.

    Raises:
        BackendError: The block is wrong; nothing is timed then.
    """
    with seeded(SEED, device):
        gate = check("the block", Subject(S6(32), torch.randn(2, 37, 32), plain))
        record: dict[str, Any] = {
            "benchmark": "block_parts_cpu",
            "what": "an S6 block in float32: the time of its parts by PyTorch's profiler, of the whole by the clock",
            "environment": environment(),
            "instruction set": native.status().isa,
            "load before": os.getloadavg(),
            "device": str(device),
            "seeds": {"weights and inputs": SEED},
            "seconds for each measurement": seconds,
            "gate": {"block": gate},
            "rows": [],
        }
        for size in sizes:
            record["rows"].append(_row(size, seconds, device))
            record["load after"] = os.getloadavg()
            save(record)
    console.print(cpu_parts_table(record), highlight=False, soft_wrap=True)
    return record


def _row(size: Size, seconds: float, device: torch.device) -> dict[str, Any]:
    mixer = S6(size.d_model)
    subject = Subject(mixer, torch.randn(size.batch, size.length, size.d_model), plain)
    row: dict[str, Any] = {**size._asdict(), "backends": backends(subject)}
    for kind, make in (("forward", forward_of), ("training", training_of)):
        run = make(subject)
        timing = interleaved({kind: run}, seconds, device)[kind]
        row[kind] = {"timing": asdict(timing), "parts_ms": cpu_parts(mixer, run)}
    return row


def cpu_parts(mixer: S6, run: Callable[[], object], calls: int = CALLS) -> dict[str, float]:
    """Milliseconds of each part, medians over the calls, so that what other processes take away hardly counts."""
    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(calls):
            with record_function(WHOLE):
                run()
    events = list(found.events() or [])
    wholes = [event.time_range for event in events if event.name == WHOLE]
    named = [(event.time_range, part) for event in events if (part := _outermost_part(event, mixer)) is not None]
    each = [_times(whole, named) for whole in wholes]
    times: dict[str, float] = {part: statistics.median(times[part] for times in each) for part in PARTS}
    return times | {"all": sum(times.values())}


def _times(whole: Any, named: Sequence[tuple[Any, str]]) -> dict[str, float]:
    """Milliseconds of the parts of one call."""
    times: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for span, part in named:
        if whole.start <= span.start and span.end <= whole.end:
            times[part] += span.elapsed_us() / 1e3
    times[PARTS[-1]] = whole.elapsed_us() / 1e3 - sum(times.values())
    return times


def _part(event: FunctionEvent, mixer: S6) -> str | None:
    """Which part PyTorch's operator belongs to."""
    own = next((part for start, part in OURS.items() if event.name.startswith(start)), None)
    if own is not None:
        return own
    if event.name in COPIES:
        return "copies"
    return product_part(event, mixer) if event.name in PRODUCTS else None


def _outermost_part(event: FunctionEvent, mixer: S6) -> str | None:
    """The part, unless the operator was called by one that has a part itself."""
    part, parent = _part(event, mixer), event.cpu_parent
    while part is not None and parent is not None:
        if _part(parent, mixer) is not None:
            return None
        parent = parent.cpu_parent
    return part
