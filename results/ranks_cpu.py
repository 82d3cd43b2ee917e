"""The losses of four processes beside those of one, for every task: `python results/ranks_cpu.py --out results`.

The target: 4 gloo processes give the loss curve of one to 1e-6 over 50 steps. Every task's small model is trained by
`selectra train` alone, then by torchrun with DistributedDataParallel and with fully_shard (FSDP2). The batch of 18 does
not divide by four, and the last batch of a pass is shorter still. Nothing is dropped out: each process draws its own.
Detection has a row for every detector: their losses count images, positions, proposals and masks. Beside each task
stands what rounding alone does: one process again, its weights at the start moved to the next number of float32.
Differences are relative to the loss of one process; the record is written after every training.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file

from selectra.spec import Optim, Run, Spec, Train
from selectra.train.job import build, typed
from selectra.train.record import environment

RUNS = {
    "forecasting": (
        Spec("tsm2_smoke", dropout=0.0), Spec("series_file", seq_len=48, horizon=12), Spec("forecasting"),
        {"accumulate": 2},
    ),
    "classification": (
        Spec("vmamba_smoke", dims=(8, 16), depths=(1, 1), patch_size=2, d_state=2),
        Spec("images", crop=1, mixup=0.2), Spec("classification", label_smoothing=0.1), {},
    ),
    "language": (
        Spec("mamba_lm_smoke"), Spec("copying", length=16, examples=400, held_out=40), Spec("language"), {"ema": 0.9},
    ),
    "segmentation": (
        Spec(
            "upernet_smoke", dropout=0.0,
            backbone=Spec("vmamba_smoke", dims=(8, 16), depths=(1, 1), patch_size=4, d_state=2),
        ),
        Spec("masks", crop=32), Spec("segmentation", dice=0.5), {},
    ),
    "clip_classification": (
        Spec("videomamba_clip_smoke"), Spec("moving_shapes", n_frames=3, train=115, val=20, test=20),
        Spec("clip_classification"), {},
    ),
    **{
        name: (
            Spec(f"{name}_smoke", backbone=Spec("vmamba_smoke", dims=(8, 16), depths=(1, 1), patch_size=4, d_state=2)),
            Spec("objects", crop=32, zoom=(0.5, 1.0), flip=0.5, masks=name == "mask_rcnn"), Spec("detection"),
            {"accumulate": 2} if name == "fcos" else {},
        )
        for name in ("retinanet", "fcos", "faster_rcnn", "mask_rcnn")
    },
}  # fmt: skip
console = Console(width=150)


def run_of(task: str, steps: int) -> Run:
    """A small training, the same for every number of processes."""
    model, data, kind, more = RUNS[task]
    train = Train(steps=steps, batch_size=18, eval_every=steps, device="cpu", **more)
    # Gradients of detectors jump where boxes meet, so that rounding grows with what a step changes.
    optim = Optim(lr=1e-4 if kind.name == "detection" else 1e-3, warmup_steps=5)
    return Run(name=task, model=model, data=data, task=kind, optim=optim, train=train)


def trained(run: Run, processes: int, kind: str, folder: Path) -> list[dict[str, Any]]:
    """The record of a training."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.to_json())
    words = ["-m", "selectra", "train", str(folder / "run.json"), f"parallel.kind={kind}", "parallel.timeout=120"]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], env=environment, check=True, capture_output=True, timeout=1200)
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


def nudged(run: Run, folder: Path) -> Run:
    """The run from the same start, but for the last digit of every weight."""
    weights = build(typed(run)).model.state_dict()
    beyond = {name: torch.nextafter(w, w + 1) if w.is_floating_point() else w for name, w in weights.items()}
    path = folder / "weights.safetensors"
    save_file({name: weight.contiguous().clone() for name, weight in beyond.items()}, path)
    return run.model_copy(update={"train": run.train.model_copy(update={"pretrained": str(path)})})


def compared(one: list[dict[str, Any]], more: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest relative difference between two loss curves, and between the metrics at their ends."""
    found: dict[str, Any] = {}
    for event in ("step", "metrics"):
        pairs = list(zip(*([line for line in lines if line["event"] == event] for lines in (one, more)), strict=True))
        keys = ["loss", "norm"] if event == "step" else [k for k, v in pairs[0][0].items() if isinstance(v, float)]
        for key in keys:
            if key not in ("seconds", "lr"):
                worst = max(abs(b[key] - a[key]) / max(abs(a[key]), 1e-12) for a, b in pairs)
                found[key if event == "step" else f"validation {key}"] = worst
    found["processes"] = more[0]["processes"]
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder of the record.")],
    steps: Annotated[int, typer.Option(help="Of each training.")] = 50,
    most: Annotated[int, typer.Option(help="Processes.")] = 4,
    task: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
) -> None:
    """Train, compare, print and write."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    record: dict[str, Any] = {
        "command": f"python results/ranks_cpu.py --steps {steps} --most {most} --out {out.name}", "date": date,
        **environment(), "target": 1e-6, "tasks": {},
    }  # fmt: skip
    record["command"] += "".join(f" --task {name}" for name in task or ())
    path = out / f"ranks_cpu_{date}.json"
    for name in task or RUNS:
        run = run_of(name, steps)
        with tempfile.TemporaryDirectory() as text:
            one = trained(run, 1, "none", Path(text, "one"))
            losses = [line["loss"] for line in one if line["event"] == "step"]
            row: dict[str, Any] = {"model": run.model.to_json(), "first loss": losses[0], "last loss": losses[-1]}
            record["tasks"][name] = row
            for kind in ("ddp", "fsdp2", "rounding"):
                other = (nudged(run, Path(text)), 1, "none") if kind == "rounding" else (run, most, kind)
                row[kind] = compared(one, trained(*other, Path(text, kind)))
                row[kind]["within target"] = row[kind]["loss"] <= record["target"]
                out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")
                console.print(name, kind, row[kind])


if __name__ == "__main__":
    typer.run(main)
