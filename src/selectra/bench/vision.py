"""`selectra bench vision`: image models' training against others' kernels, against attention, and their mixers' growth.

Four parts, each checked before it is timed: `training`, `attention`, `growth` and `einfft`.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from selectra.bench import vision_attention, vision_einfft, vision_growth, vision_training
from selectra.bench.events import Stopwatch
from selectra.bench.peers import versions
from selectra.bench.vision_table import vision_table
from selectra.errors import ConfigError
from selectra.spec import nearest
from selectra.train.record import environment

SEED = 0
Save = Callable[[], None]
# Each fills its own entry of the record and saves as it goes.
PARTS: dict[str, Callable[[dict[str, Any], float, Stopwatch, Save, str | None], None]] = {
    "training": vision_training.measure,
    "attention": vision_attention.measure,
    "growth": vision_growth.measure,
    "einfft": vision_einfft.measure,
}
ON_CPU = ("growth", "einfft")


def bench_vision(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    parts: str | None = None,
) -> dict[str, Any]:
    """Check, then time; returns the record.

    Args:
        parts: Names of the parts, separated by commas; without, all. Of `training` and `attention` one row can be
            asked for: `training:vim_tiny`, `attention:1248`.

    Raises:
        BackendError: Something is wrong, or a package that a part needs is not there; the part is not timed then.
        ConfigError: A part is unknown, or the device is no GPU.
    """
    chosen = dict.fromkeys(PARTS) if parts is None else _chosen(parts)
    if device.type != "cuda" and set(chosen) - set(ON_CPU):
        raise ConfigError(
            f"this runs on {device}, and of `bench vision` {' and '.join(ON_CPU)} can: give --tags {','.join(ON_CPU)}."
        )
    started = time.perf_counter()
    record: dict[str, Any] = {
        "benchmark": "vision",
        "what": "image models and their mixers: wall clock and the GPU's own time by events under bfloat16 autocast; "
        "on a CPU float32",
        "environment": environment(),
        "device": str(device),
        "peers": versions(),
        "seeds": {"weights and inputs": SEED},
        "seconds for each measurement": seconds,
        "seconds": {},
    }
    watch = Stopwatch(device)

    def keep() -> None:
        record["seconds"][name] = time.perf_counter() - started
        save(record)

    for name, only in chosen.items():
        record[name] = {}
        PARTS[name](record[name], seconds, watch, keep, only)
        keep()
    console.print(vision_table(record), highlight=False, soft_wrap=True)
    return record


def _chosen(parts: str) -> dict[str, str | None]:
    """The parts, each with the only row that is asked for."""
    found: dict[str, str | None] = {}
    for word in parts.split(","):
        name, _, only = word.strip().partition(":")
        if name not in PARTS:
            raise ConfigError(
                f"there is no part '{name}' of `bench vision`; there are {', '.join(PARTS)}.{nearest(name, PARTS)}"
            )
        found[name] = only or None
    return found
