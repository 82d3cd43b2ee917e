"""Training on one GPU and on two of a host: `python results/scale_gpu.py --out results` (two H200s, 200 s).

Weak scaling: the library's own training step (loss, DistributedDataParallel, clipping, AdamW, the exchange of sums; all
of it but evaluations and files) on one GPU and on two, with as many examples for each; the time of one over the time of
two is to be at least 0.95, for Vim-S at 224 px and for TSM2. Examples are random and lie on the device.

FSDP2: a Mamba language model of at least 10 billion parameters, 20 steps of AdamW with weights and moments in float32
on bytes of this repository's texts; the loss has to fall. Weights are made in parts, blocks computed again in backward,
products in bfloat16. On two GPUs alone: weights, gradients and moments are 16 bytes a parameter.

Every part runs in two fresh processes, of which the first trains alone before; the record is written after each
training. Where a part fails the record has what every process raised, the first in time first. A rehearsal on a CPU:
`python results/scale_gpu.py --device cpu --tiny --out DIR`. docs/scaling.md says how programs start on a cluster.
"""

import contextlib
import datetime
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

import selectra.models  # noqa: F401
from selectra.data.image_views import ImageBatch
from selectra.data.text import TextFile
from selectra.data.windows import SeriesBatch
from selectra.registry import models
from selectra.spec import Optim, Parallel, Run, Spec, Train
from selectra.tasks import Classification, Forecasting, Language
from selectra.train.batches import TrainingOrder, Windows
from selectra.train.depth import training_mode
from selectra.train.parallel import World, joined, recomputed
from selectra.train.progress import Clock, Display
from selectra.train.record import Record, environment
from selectra.train.state import State
from selectra.train.steps import Steps
from selectra.train.stop import StopFlag

ROOT = Path(__file__).parents[1]
console = Console(width=150)


class Same:
    """One batch again and again, on the device: what is measured is the training."""

    def __init__(self, make: Any, device: torch.device, count: int = 100_000) -> None:
        self.make, self.device, self.count, self.made = make, device, count, {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Sequence[int]) -> Any:
        if len(indices) not in self.made:
            self.made[len(indices)] = self.make(len(indices)).to(self.device)
        return self.made[len(indices)]


class Noted(Record):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__(None)
        self.steps: list[dict[str, Any]] = []

    def write(self, event: str, **values: Any) -> None:
        """Keep steps."""
        if event == "step":
            self.steps.append(values)


def steps_of(model: Any, task: Any, windows: Windows, run: Run, world: World) -> list[dict[str, Any]]:
    """The library's training steps, without evaluations and files."""
    order = TrainingOrder(windows, run.train, world)
    if not world.sharded:
        model.to(world.device)
    state, record = State(model, run, order, None, world), Noted()
    display = Display(None, Clock(state.steps, state.steps, (1, 0)), run.name, False)
    with recomputed(model, run.train.recompute):
        training_mode(model)
        loop = Steps(state, task, order, None, record, display, StopFlag())
        for _ in range(state.steps):
            loop.one_step()
    return record.steps


def images(n: int) -> ImageBatch:
    """Random images."""
    return ImageBatch(torch.randn(n, 3, 224, 224), torch.randint(1000, (n,)))


def series(n: int) -> SeriesBatch:
    """Random windows of as many series as the electricity data has."""
    x, y = torch.randn(n, 512, 321), torch.randn(n, 96, 321)
    return SeriesBatch(x, torch.ones_like(x, dtype=torch.bool), y, torch.ones_like(y, dtype=torch.bool))


def weak(name: str, world: World, tiny: bool) -> dict[str, Any]:
    """Seconds a step of one model, as many examples for each process whatever their number."""
    if name == "vim_small":
        spec, each, task, windows = Spec(name), 256, Classification(), Same(images, world.device)
        facts: dict[str, Any] = {"n_classes": 1000, "in_channels": 3, "img_size": (224, 224)}
        task.n_classes = 1000
        small: dict[str, Any] = {"d_model": 16, "depth": 1}
    else:
        spec, each, task, windows = Spec(name, dropout=0.0), 256, Forecasting(), Same(series, world.device)
        facts, small = {"seq_len": 512, "horizon": 96, "n_series": 321}, {}
    if tiny:
        spec, each = spec.replace(**small), 2
    steps = 3 if tiny else 40
    train = Train(steps=steps, batch_size=each * world.size, precision="bfloat16", device=world.device.type)
    run = Run(model=spec, data=Spec("random"), task=Spec("task"), optim=Optim(lr=1e-4), train=train, name=name)
    torch.manual_seed(0)
    found = steps_of(models.build(spec, facts), task, windows, run, world)
    times = [step["seconds"] for step in found[steps // 3 :]]
    return {"examples each": each, "seconds": times, "median seconds": statistics.median(times)}


def large(world: World, tiny: bool) -> dict[str, Any]:
    """A language model over all processes, its weights in parts."""
    sizes = {"d_model": 32, "depth": 2} if tiny else {"d_model": 5120, "depth": 64}
    seq_len, batch, steps = (64, 2, 3) if tiny else (2048, 2, 20)
    text = "\n".join(path.read_text() for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(text)
        data = TextFile(path=str(path), seq_len=seq_len, shares=(1.0, 0.0, 0.0))
    # Rows of the usual vocabulary; the text has bytes.
    spec = Spec("mamba_lm_base", vocab_size=50_280, **sizes)
    train = Train(
        steps=steps, batch_size=batch * world.size, precision="bfloat16", recompute=True, device=world.device.type
    )
    optim = Optim(lr=1e-4, warmup_steps=min(5, steps), betas=(0.9, 0.95), weight_decay=0.1)
    run = Run(model=spec, data=Spec("text"), task=Spec("language"), optim=optim, train=train,
              parallel=Parallel(kind="fsdp2", in_parts=True), name="large")  # fmt: skip
    with torch.device("meta"):
        model = models.build(spec, {"seq_len": seq_len})
    count = sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    found = steps_of(model, Language(), data.windows("train"), run, world)
    row = {"parameters": count, **sizes, "tokens a step": batch * world.size * seq_len,
           "losses": [step["loss"] for step in found], "norms": [step["norm"] for step in found],
           "seconds a step": [step["seconds"] for step in found], "seconds": time.perf_counter() - start,
           "falls": found[-1]["loss"] < found[0]["loss"]}  # fmt: skip
    if world.device.type == "cuda":
        row["GiB of each GPU"] = world.gather(torch.cuda.max_memory_allocated() / 2**30)
    return row


def note(path: Path, part: str, key: str, row: dict[str, Any]) -> None:
    """Put a row into the record; both of a model's rows give its weak scaling."""
    record = json.loads(path.read_text())
    rows = record["parts"].setdefault(part, {})
    rows[key] = row
    one, two = (rows.get(n, {}).get("median seconds") for n in ("1", "2"))
    if one and two:
        rows["weak scaling"] = one / two
    path.write_text(json.dumps(record, indent=1) + "\n")


@contextlib.contextmanager
def raised_in(folder: Path, rank: int) -> Iterator[None]:
    """Inside the block what a process raises is written at once, before it leaves the others, who may then end it."""
    try:
        yield
    except Exception:
        file = folder / f"{rank}.json"
        if not file.exists():
            found = {"process": rank, "at": time.time(), "traceback": traceback.format_exc()}
            # Under its name only once it is whole.
            part = folder / f"{rank}.part"
            part.write_text(json.dumps(found))
            part.rename(file)
        raise


def problems(folder: Path) -> list[dict[str, Any]]:
    """What processes have raised, the first in time first, and how long after that the others did."""
    found = sorted((json.loads(file.read_text()) for file in folder.glob("*.json")), key=lambda each: each["at"])
    return [
        {"process": each["process"], "seconds later": each["at"] - found[0]["at"], "traceback": each["traceback"]}
        for each in found
    ]


def worker(rank: int, n: int, port: int, path: Path, kind: str, tiny: bool, part: str, raised: Path) -> None:
    """One process: one part; the first one alone before, while the others wait."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port),
                   "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}  # fmt: skip
    # Without multicast memory of the switch, which some hosts do not offer.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    sharded = part == "large"
    parallel = Parallel(kind="fsdp2" if sharded else "ddp", timeout=100)
    with raised_in(raised, rank), joined(parallel, kind) as world, raised_in(raised, rank):
        (run_large if sharded else run_weak)(world, path, tiny, part)


def run_large(world: World, path: Path, tiny: bool, part: str) -> None:
    """The large model. Before it comes a tiny one: what would fail fails at once."""
    rows = [("large tiny", lambda: large(world, True))] + ([] if tiny else [(part, lambda: large(world, False))])
    for name, run in rows:
        row = run()
        if world.first:
            note(path, name, str(world.size), row)


def run_weak(world: World, path: Path, tiny: bool, part: str) -> None:
    """One model in the first process alone, then in all."""
    if world.first:
        note(path, part, "1", weak(part, World(device=world.device), tiny))
    world.wait()
    row = weak(part, world, tiny)
    if world.first:
        note(path, part, str(world.size), row)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the record.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Models for a rehearsal.")] = False,
    part: Annotated[list[str] | None, typer.Option(help="vim_small, tsm2_base, large.")] = None,
) -> None:
    """Measure, print and write."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = out / f"scale_{device}{'_tiny' if tiny else ''}_{date}.json"
    parts = part or ["vim_small", "tsm2_base", "large"]
    command = f"python results/scale_gpu.py --device {device}{' --tiny' if tiny else ''} --out {out.name}"
    record: dict[str, Any] = {
        "command": command,
        "date": date,
        **environment(),
        "target weak scaling": 0.95,
        "parts": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for index, each in enumerate(parts):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as raised:
            try:
                arguments = (2, 29_600 + index, path, device, tiny, each, Path(raised))
                start_processes(worker, arguments, 2, start_method="spawn")
            except (ProcessRaisedException, ProcessExitedException) as error:
                # Of a process that the system ended, this alone says so.
                problem = {"processes": problems(Path(raised)), "launcher": str(error).strip().splitlines()[0]}
                record = json.loads(path.read_text()) | {f"problem of {each}": problem}
                path.write_text(json.dumps(record, indent=1) + "\n")
                for one in problem["processes"]:
                    console.print(f"process {one['process']}, {one['seconds later']:.3f} s after the first:")
                    console.print(one["traceback"], markup=False, highlight=False)
                console.print(problem["launcher"], markup=False)
        found = {name: row for name, row in json.loads(path.read_text())["parts"].items() if name.startswith(each)}
        console.print(f"{time.perf_counter() - start:.0f} s", found or f"{each}: nothing")
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
