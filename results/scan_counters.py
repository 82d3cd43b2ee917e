"""One forward and one backward of six of the benchmarked shapes, for NVIDIA's profiler to count.

python results/scan_counters.py --command   # prints the command that made scan_counters_h100_*.txt
"""

import shlex
import sys
from typing import Annotated

import torch
import typer

from selectra.bench.shapes import CASES
from selectra.ops.selective_scan import cuda
from selectra.ops.selective_scan.call import prepare

TAGS = ("lm", "lm-long", "ss2d-n16", "lm-fp32", "lm-n64", "lm-n4")
STALLS = [
    "wait",
    "not_selected",
    "mio_throttle",
    "dispatch_stall",
    "short_scoreboard",
    "barrier",
    "math_pipe_throttle",
    "long_scoreboard",
]
METRICS = [
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed_pipe_xu.sum",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "smsp__warps_active.avg.per_cycle_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    *(f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in STALLS),
]


def main(
    command: Annotated[bool, typer.Option("--command", help="Only print how the profiler is called.")] = False,
) -> None:
    """Run the kernels once each; inputs are those of `selectra bench scan`, seed 0."""
    if command:
        of_profiler = ["ncu", "--clock-control", "none", "-k", "regex:scan_", "--metrics", ",".join(METRICS), "--csv"]
        sys.stdout.write(shlex.join([*of_profiler, "python", "results/scan_counters.py"]) + "\n")
        return
    device = torch.device("cuda")
    for case in CASES:
        if case.tag not in TAGS:
            continue
        call = prepare(**case.arguments(device), delta_softplus=True)  # pyright: ignore[reportArgumentType]
        y, _, kept = cuda.forward(call, True)
        assert kept is not None
        dfinal = torch.zeros(call.u.shape[0], *call.A.shape, device=device)
        cuda.backward(call, torch.randn_like(y), dfinal, kept)
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
