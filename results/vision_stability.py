"""Train image models of every published width, 500 steps in bfloat16 and in float16: does anything become NaN?

    python results/vision_stability.py --out results

Each model is trained at its paper's peak learning rate, reached within 50 steps and kept, with AdamW and without any
clipping of gradients, under autocast: once in bfloat16, once in float16 with PyTorch's scaler of losses. Widths are as
published; depths are cut to fit the time (isotropic models to 6 blocks, stages to 1, 1, 2 and 1), so that sizes which
differ by depth alone are one row. Images are small: patterns of ten classes with noise. A row is stable where the loss
of every step and every parameter at the end are finite, and where in float16 at most 5 % of the steps were skipped by
the scaler, which starts at 65,536 and halves until gradients fit.
"""

import datetime
import itertools
import json
import math
import multiprocessing
import queue
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import selectra.models  # noqa: F401
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.record import environment

WARM_UP, WEIGHT_DECAY, CLASSES, BANK, SEED = 50, 0.05, 10, 512, 0
MOST_SKIPPED = 0.05
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
console = Console(width=150)


@dataclass(frozen=True)
class Job:
    """One training."""

    model: str
    precision: str
    lr: float
    pixels: int
    batch: int
    cut: dict[str, Any]
    """Arguments that make the model shallow."""
    graph: bool = True
    """Whether its step can be captured in a CUDA graph, which saves the host's time."""


STAGES, BLOCKS = {"depths": (1, 1, 2, 1)}, {"depth": 6}
# Of Vim's sizes S has a rate of its own in the paper; the others' papers have one for all.
ISOTROPIC = {
    "vim": (("tiny", "small", "base", "tiny_stride8", "small_stride8", "base_stride8"), 1e-3, {"img_size": 128}),
    "videomamba": (("tiny", "small", "middle", "base"), 1e-3, {"img_size": 128}),
    "rsmamba": (("base", "large", "huge"), 5e-4, {"img_size": 128}),
}
PYRAMIDS = {
    "vmamba": (("tiny", "base", "tiny_s2l5", "base_s2l15", "tiny_s1l8", "base_s1l20"), 1e-3),
    "vim2": (("tiny", "base"), 1e-3),
    "simba": (
        tuple(f"{s}{m}" for s, m in itertools.product(("small", "base", "large"), ("", "_mlp", "_monarch"))),
        1e-3,
    ),
}


def all_jobs() -> list[Job]:
    """Every width in both precisions, large ones first, so that none is begun late."""
    found = []
    for precision in PRECISIONS:
        for family, (sizes, lr, facts) in ISOTROPIC.items():
            # RSMamba draws an order of tokens in every step, which a graph would keep.
            graph = family != "rsmamba"
            found += [Job(f"{family}_{size}", precision, lr, 128, 16, BLOCKS | facts, graph) for size in sizes]
        for family, (sizes, lr) in PYRAMIDS.items():
            found += [Job(f"{family}_{size}", precision, lr, 64, 16, STAGES) for size in sizes]
    return sorted(found, key=lambda job: (job.graph, "base" not in job.model and "large" not in job.model))


class Training:
    """A model, its data and its step, all on one device."""

    def __init__(self, job: Job, steps: int, device: torch.device) -> None:
        torch.manual_seed(SEED)
        model = models.build(Spec(job.model, n_classes=CLASSES, **job.cut), {})
        assert isinstance(model, nn.Module)
        self.job, self.device, self.model = job, device, model.to(device)
        cuda = device.type == "cuda"
        self.lr = torch.zeros((), device=device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=WEIGHT_DECAY, fused=cuda, capturable=cuda
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=job.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        self.x, self.target = patterns(job.pixels, device)
        self.losses, self.place = torch.full((steps,), math.nan, device=device), torch.zeros(1, device=device).long()

    def step(self) -> None:
        """Forward, backward, AdamW, and the loss noted; nothing waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        chosen = torch.randint(BANK, (self.job.batch,), device=self.device)
        with torch.autocast(self.device.type, PRECISIONS[self.job.precision]):
            loss = F.cross_entropy(self.model(self.x[chosen]), self.target[chosen])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.index_copy_(0, self.place, loss.detach().float().reshape(1))
        self.place.add_(1)

    def run(self) -> None:
        """All steps: the first ones launch by launch, the others from a graph where that can be."""
        steps, first = len(self.losses), 4
        replay = self.step
        for i in range(steps):
            self.lr.fill_(self.job.lr * min(1.0, (i + 1) / WARM_UP))
            if i == first and self.job.graph and self.device.type == "cuda":
                replay = self._captured()
            if i < first and self.device.type == "cuda":
                self._aside()
            else:
                replay()

    def _aside(self) -> None:
        """On another stream, as capturing asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def _captured(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def patterns(pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images of ten classes, each a smooth pattern under noise."""
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.randn(CLASSES, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, (pixels, pixels), mode="bilinear", align_corners=False)
    target = torch.randint(CLASSES, (BANK,), generator=generator)
    noise = torch.randn(BANK, 3, pixels, pixels, generator=generator)
    return (smooth[target] + noise).to(device), target.to(device)


def train(job: Job, steps: int, device: torch.device) -> dict[str, Any]:
    """Train, and say whether everything stayed finite."""
    start = time.perf_counter()
    training = Training(job, steps, device)
    training.run()
    losses = training.losses.cpu()
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    broken = [name for name, p in training.model.named_parameters() if not p.isfinite().all()]
    taken = max((int(s["step"]) for s in training.optimizer.state.values()), default=0)
    skipped = steps - taken
    return {
        **asdict(job),
        "depth": job.cut.get("depths", job.cut.get("depth")),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": steps,
        "first loss": losses[:10].mean().item(),
        "last loss": losses[-10:].mean().item(),
        "largest loss": losses.max().item(),
        "first step that is not finite": bad[0] if bad else None,
        "parameters that are not finite": broken,
        "skipped by the scaler": skipped,
        "last scale": training.scaler.get_scale() if job.precision == "fp16" else None,
        "stable": not bad and not broken and skipped <= MOST_SKIPPED * steps,
        "seconds": time.perf_counter() - start,
    }


def worker(jobs: Any, results: Any, steps: int, device: str, end: float) -> None:
    """Train what is left until nothing is, or until the time is over."""
    torch.set_num_threads(1)
    while time.time() < end:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            return
        try:
            results.put(train(job, steps, torch.device(device)))
        except (RuntimeError, ValueError) as error:
            results.put({**asdict(job), "stable": False, "problem": f"{type(error).__name__}: {error}"[:500]})


def main(
    out: Annotated[Path, typer.Option(help="Folder for the record.")],
    steps: Annotated[int, typer.Option(help="Steps of every training.")] = 500,
    workers: Annotated[int, typer.Option(help="Processes side by side.")] = 12,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cuda",
    only: Annotated[str, typer.Option(help="Only models whose name holds this.")] = "",
    graphs: Annotated[bool, typer.Option(help="Capture steps in CUDA graphs, which saves the host's time.")] = True,
    seconds: Annotated[float, typer.Option(help="After so many seconds nothing is begun any more.")] = 3600,
    earlier: Annotated[Path | None, typer.Option(help="A record to go on with: what it has is not done again.")] = None,
) -> None:
    """Train all and write the record, after every one."""
    console.print("Set PYTHONPATH or install selectra first; the record is written as trainings end.", style="dim")
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    chosen = [replace(job, graph=job.graph and graphs) for job in all_jobs() if only in job.model]
    before = [] if earlier is None else json.loads(earlier.read_text())["rows"]
    wanted = {(job.model, job.precision): job for job in chosen}
    kept = [row for row in before if row.get("steps") == steps and wanted.pop((row["model"], row["precision"]), None)]
    left = list(wanted.values())
    for job in left:
        jobs.put(job)
    hardware = environment()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    record: dict[str, Any] = {"command": f"python {' '.join(sys.argv)}", "date": date}
    record |= {"environment": hardware, "seed": SEED, "what": (__doc__ or "").partition("\n")[0]}
    record |= {} if earlier is None else {"goes on with": earlier.name, "rows of it": len(kept)}
    record["rows"] = kept
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", (hardware["hardware"]["gpus"] or [hardware["hardware"]["processor"]])[0].lower())
    path = out / f"vision_stability_{name}_{date}.json"
    end = time.time() + seconds
    arguments = (jobs, results, steps, device, end)
    processes = [context.Process(target=worker, args=arguments) for _ in range(min(workers, len(left)))]
    for process in processes:
        process.start()
    while len(record["rows"]) < len(chosen):
        try:
            record["rows"].append(results.get(timeout=1))
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
            continue
        record["begun, of all"] = [len(record["rows"]), len(chosen)]
        path.write_text(json.dumps(record, indent=1) + "\n")
    for process in processes:
        process.join()
    console.print(table(record))
    console.print(f"{sum(row['stable'] for row in record['rows'])} of {len(chosen)} stable; written to {path}")


def table(record: dict[str, Any]) -> Table:
    """One line a training."""
    found = Table("model", "depth", "parameters", "precision", "rate", "loss", "skipped", "scale", "seconds", "")
    for row in sorted(record["rows"], key=lambda row: (row["model"], row["precision"])):
        if "problem" in row:
            found.add_row(row["model"], "", "", row["precision"], *[""] * 5, row["problem"])
            continue
        loss = f"{row['first loss']:.2f} to {row['last loss']:.2f}"
        scale = "" if row["last scale"] is None else f"{row['last scale']:,.0f}"
        middle = [f"{row['parameters']:,}", row["precision"], f"{row['lr']:.0e}", loss]
        words = "stable" if row["stable"] else f"NOT: {row['parameters that are not finite'][:3]}"
        ends = [str(row["skipped by the scaler"]), scale, f"{row['seconds']:.1f}", words]
        found.add_row(row["model"], str(row["depth"]), *middle, *ends)
    return found


if __name__ == "__main__":
    typer.run(main)
