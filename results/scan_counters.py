"""One forward and one backward of six of the benchmarked shapes, for NVIDIA's profiler to count.

python results/scan_counters.py --command           # prints the command to run; its output is COUNTS.csv
python results/scan_counters.py --counts COUNTS.csv  # prints the table of scan_counters_h100_*.txt
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
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


HEADS = ["time, us", "instructions", "issue %", "xu instructions", "xu %", "warps", "dram %", *STALLS]


def table(counts: Path) -> str:
    """One row a kernel, in the order in which they ran; a shape begins with its first forward kernel."""
    lines = counts.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    found = pd.read_csv(counts, skiprows=first, thousands=",")
    nanoseconds = found["Metric Unit"].isin(["ns", "nsecond"])
    found.loc[nanoseconds, "Metric Value"] = found.loc[nanoseconds, "Metric Value"].astype(float) / 1000
    kernels = found[["ID", "Kernel Name", "Grid Size"]].drop_duplicates("ID").set_index("ID")
    values = found.pivot(index="ID", columns="Metric Name", values="Metric Value")[METRICS].set_axis(HEADS, axis=1)
    values["instructions"] = values["instructions"].map("{:,.0f}".format)
    shown = kernels.rename(columns={"Kernel Name": "kernel", "Grid Size": "grid"}).join(
        values.drop(columns="xu instructions")
    )
    forward = shown["kernel"].isin(["scan_states", "scan_chain_forward", "scan_forward"])
    begins = (forward & ~forward.shift(fill_value=False)).cumsum()
    tags = [case.tag for case in CASES if case.tag in TAGS]
    shown.insert(0, "shape", [tags[i - 1] for i in begins])
    return shown.to_string(index=False, float_format="{:.2f}".format)


def main(
    command: Annotated[bool, typer.Option("--command", help="Only print how the profiler is called.")] = False,
    counts: Annotated[Path | None, typer.Option(help="Only print the table of what the profiler counted.")] = None,
) -> None:
    """Run the kernels once each; inputs are those of `selectra bench scan`, seed 0."""
    if counts is not None:
        sys.stdout.write(table(counts) + "\n")
        return
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
