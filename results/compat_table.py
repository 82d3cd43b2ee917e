"""The tables of docs/compat.md, from the records.

python results/compat_table.py results/compat_cpu_*.json results/compat_gpu_*.json
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

SIDES = ("mamba_ssm", "selectra.compat")


def main(records: Annotated[list[Path], typer.Argument(help="Records of both scripts.")]) -> None:
    """Print both tables as Markdown."""
    for path in records:
        record = json.loads(path.read_text())
        rows = repositories(record) if "rows" in record else steps(record)
        sys.stdout.write("\n".join(rows) + "\n\n")


def repositories(record: dict[str, Any]) -> list[str]:
    """One line a model: what works, what was needed, how far from stored outputs, seconds."""
    lines = [
        "| repository, class | forward, backward | loss, 20 steps | stored official runs: output, gradients | "
        "ms a step | what was needed besides |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    for row in record["rows"]:
        name = f"{row['repository']} {row['commit'][:7]}, {row['class']}"
        needed = "; ".join(row["needed"]) or "nothing"
        if "failed" in row:
            lines.append(f"| {name} | fails: {row['failed']} | | | | {needed} |")
            continue
        works = f"{'yes' if row['forward'] else 'no'}, {'yes' if row['backward'] else 'no'}"
        losses = f"{row['loss_before']:.3g} → {row['loss_after']:.3g}"
        cells = (name, works, losses, stored(row), f"{1000 * row['step_seconds']:.0f}", needed)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def stored(row: dict[str, Any]) -> str:
    """The worst of a model's fixtures."""
    runs = row.get("golden", {}).values()
    if not runs:
        return "none there"
    worst = {key: max(run[key] for run in runs if run[key] is not None) for key in ("output_error", "gradient_error")}
    within = sum(run["within_tolerance"] for run in runs)
    return f"{within} of {len(runs)} equal: {worst['output_error']:.0e}, {worst['gradient_error']:.0e}"


def steps(record: dict[str, Any]) -> list[str]:
    """One line a training step."""
    lines = [
        "| training step | mamba_ssm's kernels, ms | selectra.compat, ms | times as fast | the GPU's own time, ms | "
        "times | forward alone | float32: output, gradients apart |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for job in record["jobs"]:
        step, forward = job["milliseconds"], job["forward_milliseconds"]
        apart, (theirs, ours) = job["differences"]["float32"], (job["kernels_ms"][side]["all"] for side in SIDES)
        cells = (
            job["job"],
            f"{step['mamba_ssm']:.2f}",
            f"{step['selectra.compat']:.2f}",
            f"{job['times_as_fast']:.2f}",
            f"{theirs:.2f} / {ours:.2f}",
            f"{theirs / ours:.2f}",
            f"{forward['mamba_ssm'] / forward['selectra.compat']:.2f}",
            f"{apart['output']:.0e}, {apart['gradients']:.0e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
