"""Random calls of the compiled CPU kernels against the float64 reference: shapes, strides, dtypes and flags by a seed.

    python results/fuzz_cpu.py --count 10000 --seed 0 --out results

Each case is one call, forward and backward, of `cross_scan` (every fifth), `causal_conv1d` (every third of the others)
or `selective_scan`, in float32, bfloat16 or float64, on one of the builds that this processor runs, on one to three
threads. The truth is the reference in float64 on the same rounded inputs; an error is the largest difference over the
truth's largest number. Exits with 1 where a case is beyond its tolerance. Not compared are bfloat16 gradients that
autograd adds up over time.
"""

import importlib
import platform
import re
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from selectra.ops.native.library import library

sys.path.insert(0, str(Path(__file__).parents[1]))
calls: Any = importlib.import_module("tests.ops.cpu_calls")
cross_calls: Any = importlib.import_module("tests.ops.cross_calls")


def processor() -> str:
    """Its name, as /proc/cpuinfo says it where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def main(
    count: Annotated[int, typer.Option(help="Cases.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the first case; the others follow.")] = 0,
    out: Annotated[Path, typer.Option(help="The record goes into this folder.")] = Path("results"),
) -> None:
    """Compare `count` random calls with the reference and write the record."""
    console = Console(highlight=False)
    torch.set_num_threads(1)
    found = library()
    builds = [build for build, runs in enumerate(found.runs) if runs]
    worst: dict[tuple[str, torch.dtype, str], tuple[float, float, int]] = {}
    number: dict[tuple[str, str], int] = defaultdict(int)
    wrong, begun = [], time.perf_counter()
    for each in range(seed, seed + count):
        of_routes = each % 5 == 0
        which = cross_calls if of_routes else calls
        drawn = which.draw(each, builds)
        op = "cross_scan" if of_routes else drawn.name
        number[op, found.isas[drawn.build]] += 1
        for name, error, tolerance in which.errors(drawn):
            key = (op, drawn.dtype, name)
            worst[key] = max(worst.get(key, (0.0, 0.0, 0)), (error, tolerance, drawn.seed))
            if not error <= tolerance:
                wrong.append(f"case {drawn.seed}, {found.isas[drawn.build]}, {drawn.dtype}: {name} off by {error:.2e}")
    name = processor()
    lines = [
        f"python results/fuzz_cpu.py --count {count} --seed {seed}",
        f"{name}; torch {torch.__version__}; {datetime.now(UTC):%Y-%m-%d}; {time.perf_counter() - begun:.0f} s",
        ", ".join(f"{op} on {isa}: {n} cases" for (op, isa), n in sorted(number.items())),
        f"{len(wrong)} results beyond their tolerance",
        *wrong,
        "largest error, relative to the truth's largest number:",
        *(
            f"{op:15} {str(dtype)[6:]:9} {tensor:14} {error:.2e} (allowed {tolerance:.1e}, case {case})"
            for (op, dtype, tensor), (error, tolerance, case) in sorted(worst.items(), key=str)
        ),
    ]
    hardware = re.sub(r"\W+", "_", name).strip("_").lower()
    file = out / f"fuzz_cpu_{hardware}_{datetime.now(UTC):%Y-%m-%d}.txt"
    file.write_text("\n".join(lines) + "\n")
    console.print("\n".join(lines))
    console.print(f"{file} written")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
