"""Times the scans of ViM2's channel mixers on a GPU, by the kernels for short sequences and by those for all others.

    python results/short_scans_gpu.py --out short.json [--batch 512]

The calls are those of a training step of `vim2_cifar10` in bfloat16, kept with their tensors as they lie in memory.
Both kinds of kernels are held to the portable form in float64 on a part of the sequences. A time is the median between
device events, the kinds in turn; then whole training steps, and where their time goes by kernel.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from selectra import models
from selectra.ops import selective_scan
from selectra.ops.selective_scan import cuda, short
from selectra.ops.selective_scan.call import ScanCall
from selectra.recipes.cifar10 import vim2_cifar10
from selectra.registry import models as registered

# Importing them registers the models.
assert models
# Kinds of kernels: whether short ones are taken, and up to how many steps these keep all states.
KINDS = {"wide": (False, 0), "short": (True, 12), "short, in segments": (True, 0)}


def take(kind: str) -> None:
    """Let the next calls run on a kind of kernels."""
    short.TAKEN, short.WHOLE = KINDS[kind]
    cuda.forward_plans.clear()
    cuda.backward_plans.clear()


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step."""

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def calls_of(step: Callable[[], None]) -> list[tuple[ScanCall, Tensor, int]]:
    """The short calls of a step, of each shape one: call, gradient of the output, and how many there are."""
    found: dict[Any, list[Any]] = {}
    original = cuda.backward_at_once

    def spy(call: ScanCall, dy: Tensor, *rest: Any) -> Any:
        key = (tuple(call.u.shape), call.A.shape[1], call.reverse)
        if cuda.is_short(call):
            # A view of the same memory, which later gradients must not overwrite.
            kept = call._replace(
                **{name: x.detach() for name in ("u", "delta", "z") if (x := getattr(call, name)) is not None}
            )
            found.setdefault(key, [kept, dy.clone(), 0])[2] += 1
        return original(call, dy, *rest)

    cuda.backward_at_once = spy
    try:
        step()
    finally:
        cuda.backward_at_once = original
    return [tuple(row) for row in found.values()]


def errors(call: ScanCall, dy: Tensor, rows: int = 64) -> dict[str, float]:
    """All results of the first sequences by their norms against the portable form in float64."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = {
        name: x if name in ("A", "D", "delta_bias") else x[:rows]
        for name in names
        if (x := getattr(call, name)) is not None
    }
    taken, short.FEWEST_ROWS = short.FEWEST_ROWS, 1
    try:
        found = []
        for backend, double in (("cuda", False), ("portable", True)):
            leaves = {name: (x.double() if double else x.detach()).requires_grad_() for name, x in given.items()}
            with selective_scan.using(backend):
                y = selective_scan(**leaves, delta_softplus=call.delta_softplus, reverse=call.reverse)
            found.append([y, *torch.autograd.grad(y, list(leaves.values()), dy[:rows].to(y.dtype))])
    finally:
        short.FEWEST_ROWS = taken
    got, want = found
    return {
        name: float(f"{((g.double() - t).norm() / t.norm()).item():.1e}")
        for name, g, t in zip(("y", *given), got, want, strict=True)
    }


def timed(work: Callable[[], object], count: int) -> float:
    """Median milliseconds."""
    for _ in range(2):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events[:-1]:
        event.record()
        work()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def scans(call: ScanCall, dy: Tensor, count: int) -> dict[str, Any]:
    """Errors and times of one call by kind."""
    row: dict[str, Any] = {"u": list(call.u.shape), "n": call.A.shape[1], "reverse": call.reverse}
    for kind in (*KINDS, *KINDS):
        take(kind)
        if f"{kind}: errors" not in row:
            row[f"{kind}: errors"] = errors(call, dy)
        _, _, kept = cuda.forward(call, True)
        assert kept is not None
        for name, work in (
            ("forward_ms", lambda: cuda.forward(call, True)),
            ("backward_ms", lambda kept=kept: cuda.backward(call, dy, None, kept)),
        ):
            # The better of two turns.
            key = f"{kind}: {name}"
            row[key] = round(min(row.get(key, 1e9), timed(work, count)), 4)
    return row


def profile(step: Callable[[], None]) -> list[dict[str, Any]]:
    """Where a step's time goes."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    return [{"kernel": row.key[:90], "calls": row.count, "us": round(row.device_time_total)} for row in rows[:22]]


def main(
    out: Annotated[Path, typer.Option(help="Where the record goes.")],
    batch: Annotated[int, typer.Option()] = 512,
    count: Annotated[int, typer.Option(help="Calls behind a time.")] = 10,
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """Measure, and write after each part."""
    run = vim2_cifar10()
    torch.manual_seed(0)
    facts = {"n_classes": 10, "img_size": 32, "in_channels": 3}
    model = registered.build(run.model, facts).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    x, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    step = step_of(model, optimizer, x, labels)
    record: dict[str, Any] = {"what": "short scans", "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    record["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    record |= {"model": str(run.model), "batch": batch, "parameters": sum(p.numel() for p in model.parameters())}

    def keep(**parts: Any) -> None:
        record.update(parts)
        out.write_text(json.dumps(record, indent=1))
        typer.echo(json.dumps(parts))

    take("short")
    step()
    calls = calls_of(step)
    for index, (call, dy, times) in enumerate(calls):
        keep(**{f"scan {index}": {"calls of a step": times} | scans(call, dy, count)})
    calls.clear()
    for turn in (1, 2):
        for kind in KINDS:
            take(kind)
            step()
            torch.cuda.reset_peak_memory_stats()
            step_ms = round(timed(step, count), 2)
            keep(**{f"step, {kind}, turn {turn}": {"ms": step_ms, "mib": torch.cuda.max_memory_allocated() >> 20}})
    for kind in ("wide", "short"):
        take(kind)
        keep(**{f"profile, {kind}": (rows := profile(step))})
        typer.echo("\n".join(map(str, rows)))


if __name__ == "__main__":
    typer.run(main)
