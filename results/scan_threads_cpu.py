"""The compiled scan on a CPU by number of threads, forward and backward, by turns in one process.

    python results/scan_threads_cpu.py --out results

Each number is the median of ratios of neighbouring calls: one thread's time over that of so many.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from selectra.ops import selective_scan
from selectra.train.record import environment

SHAPES = ((8, 384, 196, 16), (1, 768, 1024, 16), (1, 256, 4096, 16), (1, 16, 65536, 16), (8, 384, 196, 1))
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def leaves(batch: int, d: int, length: int, n: int) -> dict[str, Any]:
    """A full call: softplus, bias, skip and gate."""
    torch.manual_seed(0)
    shapes = ((batch, length, d), (batch, length, d), (d, n), (batch, length, n), (batch, length, n), (d,))
    found = dict(zip(NAMES, (torch.randn(*shape) for shape in (*shapes, (batch, length, d), (d,))), strict=True))
    found["A"] = -found["A"].exp()
    return {name: x.requires_grad_() for name, x in found.items()}


def passes(inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The forward without gradient, and the backward alone."""
    y: Any = selective_scan(**inputs, delta_softplus=True)
    grad = torch.ones_like(y)

    def forward() -> Any:
        with torch.no_grad():
            return selective_scan(**inputs, delta_softplus=True)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(y, list(inputs.values()), grad, True)}


def seconds(call: Callable[[], Any], threads: int) -> float:
    """Of one call on so many threads."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main(
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("results"),
    rounds: Annotated[int, typer.Option(help="Calls of each.")] = 60,
    threads: Annotated[int, typer.Option(help="Beside one.")] = 2,
) -> None:
    """Measure, print and write."""
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        row: dict[str, Any] = {"shape (b, d, l, n)": shape}
        for name, call in passes(leaves(*shape)).items():
            times = [[seconds(call, count) for count in (1, threads)] for _ in range(rounds)][3:]
            row[name] = {
                "one thread, ms": 1000 * statistics.median(one for one, _ in times),
                f"{threads} threads, ms": 1000 * statistics.median(many for _, many in times),
                "ratio": statistics.median(one / many for one, many in times),
                "ratio of the fastest": min(one for one, _ in times) / min(many for _, many in times),
            }
        rows.append(row)
        typer.echo(f"{shape}: " + ", ".join(f"{kind} {row[kind]['ratio']:.2f}" for kind in ("forward", "backward")))
    now = datetime.now(UTC)
    command = f"python results/scan_threads_cpu.py --rounds {rounds} --threads {threads}"
    record = {
        "benchmark": "scan_threads_cpu",
        "device": "cpu",
        "command": command,
        "date": f"{now:%Y-%m-%d}",
        "seed": 0,
        "load after": os.getloadavg(),
        **environment(),
        "rows": rows,
    }
    many = "threads" if threads == 2 else f"{threads}-threads"
    path = out / f"scan-{many}-two-core-xeon-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
