"""Random calls of the compiled CPU kernels against the float64 reference: shapes, strides, dtypes and flags by a seed.

    python results/fuzz_cpu.py --count 10000 --seed 0 --out results

Each case is one call, forward and backward, of `selective_scan` or `causal_conv1d` (every third), in float32, bfloat16
or float64, on one of the builds that this processor runs, on one to three threads. The truth is the reference in
float64 on the same rounded inputs; an error is the largest difference over the truth's largest number. Exits with 1
where a case is beyond its tolerance.
"""

import importlib
import platform
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor

from selectra.ops import causal_conv1d, selective_scan
from selectra.ops.native.library import library

sys.path.insert(0, str(Path(__file__).parents[1]))
cases: Any = importlib.import_module("tests.ops.cases")

# Of an output and of a gradient. bfloat16 results are rounded once, to 8 bits, from float32.
TOLERANCES = {
    torch.float64: (cases.FLOAT64, 10 * cases.FLOAT64),
    torch.float32: (cases.FLOAT32_OUTPUT, cases.FLOAT32_GRADIENT),
    torch.bfloat16: (2.0**-8 + cases.FLOAT32_OUTPUT, 2.0**-8 + cases.FLOAT32_GRADIENT),
}
# Of a sum of rounded numbers, in tolerances of one.
SUMMED = 16


class Drawn(NamedTuple):
    """One random call."""

    seed: int
    name: str
    case: Any
    dtype: torch.dtype
    build: int
    threads: int


def draw(seed: int, builds: list[int]) -> Drawn:
    """The call of a seed."""
    rng = random.Random(f"cpu {seed}")
    name = "causal_conv1d" if seed % 3 == 0 else "selective_scan"
    case = cases.conv_case(seed) if name == "causal_conv1d" else cases.scan_case(seed)
    dtype = rng.choice(list(TOLERANCES))
    if dtype == torch.bfloat16:
        case.tensors = {key: rounded(tensor) for key, tensor in case.tensors.items()}
    return Drawn(seed, name, case, dtype, rng.choice(builds), rng.choice([1, 1, 2, 3]))


def rounded(tensor: Tensor) -> Tensor:
    """The nearest numbers in bfloat16, as float64 with the same strides."""
    once = tensor[:, :1] if cases.is_constant_in_time(tensor) else tensor
    kept = torch.empty_strided(once.size(), once.stride(), dtype=tensor.dtype).copy_(once.bfloat16())
    return kept.expand_as(tensor)


def errors(drawn: Drawn) -> Iterator[tuple[str, float, float]]:
    """Name, relative error and tolerance of every output and gradient."""
    op: Any = {"selective_scan": selective_scan, "causal_conv1d": causal_conv1d}[drawn.name]
    with op.using("reference"):
        truth = cases.run(op, drawn.case, torch.float64, drawn.dtype)
    library().build = drawn.build
    torch.set_num_threads(drawn.threads)
    with op.using("cpu"):
        found = cases.run(op, drawn.case, drawn.dtype)
    torch.set_num_threads(1)
    for got, want, tolerance in zip(found, truth, TOLERANCES[drawn.dtype], strict=True):
        for name, exact in want.items():
            # Of a tensor that is constant in time autograd adds the gradients of all steps up, each rounded before.
            summed = drawn.dtype == torch.bfloat16 and cases.is_constant_in_time(drawn.case.tensors.get(name))
            yield name, relative_error(name, got[name], exact, want), tolerance * (SUMMED if summed else 1)


def relative_error(name: str, got: Tensor, exact: Tensor, all_exact: dict[str, Tensor]) -> float:
    """The largest difference over the truth's largest number; infinite where a result is not finite."""
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return float("inf")
    if not exact.numel():
        return 0.0
    scale = exact.abs().max().item()
    if name == "delta_bias" and all_exact["delta"].numel():
        # It is the sum of delta's gradients and may cancel to nothing.
        scale = max(scale, all_exact["delta"].abs().max().item())
    return (got.double() - exact).abs().max().item() / (scale or 1.0)


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
    for drawn in (draw(each, builds) for each in range(seed, seed + count)):
        number[drawn.name, found.isas[drawn.build]] += 1
        for name, error, tolerance in errors(drawn):
            key = (drawn.name, drawn.dtype, name)
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
