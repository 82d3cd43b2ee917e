"""Times Mamba-2's recurrence on a GPU: our forms, the authors' Triton kernels where importable, and Mamba's scan.

    python results/ssd_gpu.py --out ssd.json [--tiny]

Each form is first held to the float64 form at the same size: all results by their norms. A time is the median between
device events after a warm-up; peak memory is what a call takes beyond its arguments. Training is forward and backward.
"""

import functools
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from selectra.mixers import S6, SSD
from selectra.ops import selective_scan
from selectra.ops.gated_norm import gated_norm
from selectra.ops.ssd import cuda, ssd

NAMES = ("y", "x", "dt", "A", "B", "C")
# batch, length, heads, head width, states.
CASES = {"b1 l32768": (1, 32768), "b8 l2048": (8, 2048)}
Call = Callable[[list[Tensor]], Tensor]
CHUNK_LENGTH = cuda.chunk_length


def drawn(batch: int, length: int, heads: int, p: int, n: int, device: str) -> list[Tensor]:
    """x, dt, A, B, C as a block of Mamba-2 has them: x, B and C parts of one bfloat16 tensor."""
    wide = torch.randn(batch, length, heads * p + 2 * n, device=device, dtype=torch.bfloat16)
    x, B, C = wide.split([heads * p, n, n], -1)
    dt = torch.exp(torch.empty(batch, length, heads, device=device).uniform_(-6.9, -2.3))
    A = -torch.empty(heads, device=device).uniform_(1, 16)
    return [x.unflatten(-1, (heads, p)), dt, A, B.unsqueeze(2), C.unsqueeze(2)]


def forms(n: int) -> Iterator[tuple[str, Call]]:
    """What is timed, by name."""
    for backend in ("loop", "portable"):
        if backend in ssd.backends:
            yield backend, functools.partial(_ours, backend, None)
    for q in (32, 64, 128):
        yield f"cuda, chunks of {q}", functools.partial(_ours, "cuda", q)
    if importlib.util.find_spec("mamba_ssm") is None:
        return
    theirs = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    yield "mamba_ssm, chunks of 256", lambda given: theirs(*given, 256)


def _ours(backend: str, q: int | None, given: list[Tensor]) -> Tensor:
    # The backward asks once more, at once.
    cuda.chunk_length = CHUNK_LENGTH if q is None else (lambda call: q)
    with ssd.using(backend):
        return ssd(*given)[0]  # pyright: ignore[reportCallIssue]


def results(call: Call, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [x.detach().requires_grad_() for x in given]
    y = call(leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def timed(work: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median milliseconds and peak MiB of a call."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    once = time.perf_counter() - begun
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    count = max(3, min(50, int(seconds / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events[:-1]:
        event.record()
        work()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)), peak


def measured(call: Call, given: list[Tensor], truth: list[Tensor] | None, dy: Tensor, seconds: float) -> dict[str, Any]:
    """Errors and times of one form."""
    found: dict[str, Any] = {}
    if truth is not None:
        got = results(call, given, dy)
        found["errors"] = {
            name: float(f"{((g.double() - t).norm() / t.norm()).item():.2e}")
            for name, g, t in zip(NAMES, got, truth, strict=True)
        }
        del got
    with torch.no_grad():
        found["forward_ms"], found["forward_mib"] = timed(lambda: call(given), seconds)
    found["training_ms"], found["training_mib"] = timed(lambda: results(call, given, dy), seconds)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def mamba_scan(given: list[Tensor], heads: int, p: int) -> tuple[Call, list[Tensor]]:
    """Mamba's scan of as many channels with 16 states."""
    x, *_ = given
    batch, length = x.shape[:2]
    u, delta = (torch.randn(batch, length, heads * p, device=x.device, dtype=x.dtype) for _ in range(2))
    A = -torch.rand(heads * p, 16, device=x.device)
    B, C = (torch.randn(batch, length, 16, device=x.device, dtype=x.dtype) for _ in range(2))
    return lambda tensors: selective_scan(*tensors, delta_softplus=True), [u, delta, A, B, C]  # pyright: ignore[reportCallIssue]


def profile(call: Call, given: list[Tensor], dy: Tensor) -> list[dict[str, Any]]:
    """Where the time of a forward and backward goes, by kernel."""
    results(call, given, dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        results(call, given, dy)
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    return [{"kernel": row.key[:110], "calls": row.count, "us": round(row.device_time_total)} for row in rows[:24]]


def blocks(batch: int, length: int, d_model: int, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Whole blocks of Mamba-2 by the operators' backends, and Mamba's, in autocast."""
    kinds = [("portable", "portable"), ("cuda", "portable"), ("cuda", "cuda")]
    if "loop" in ssd.backends:
        kinds.insert(0, ("loop", "portable"))
    x = torch.randn(batch, length, d_model, device=device, requires_grad=True)
    torch.manual_seed(1)
    dy = torch.randn(batch, length, d_model, device=device)
    made = S6(d_model).to(device), SSD(d_model, 128, d_head=min(64, 2 * d_model)).to(device)
    for name, block in zip(("S6, 16 states", "SSD, 128 states"), made, strict=True):
        for of_ssd, of_norm in kinds if isinstance(block, SSD) else [("cuda", "cuda")]:

            def forward(block: Any = block) -> Tensor:
                with torch.autocast(x.device.type, torch.bfloat16):
                    return block(x)

            def train(forward: Any = forward) -> None:
                forward().backward(dy.to(torch.bfloat16))

            row: dict[str, Any] = {"block": name, "ssd": of_ssd, "gated_norm": of_norm, "l": length, "b": batch}
            with ssd.using(of_ssd), gated_norm.using(of_norm):
                with torch.no_grad():
                    row["forward_ms"], row["forward_mib"] = timed(forward, seconds)
                row["training_ms"], row["training_mib"] = timed(train, seconds)
            yield row


def main(
    out: Annotated[Path, typer.Option(help="Where the record goes.")],
    tiny: Annotated[bool, typer.Option(help="A small size, to try the script.")] = False,
    device: Annotated[str, typer.Option()] = "cuda",
    seconds: Annotated[float, typer.Option(help="Of calls behind each time.")] = 0.12,
) -> None:
    """Measure and write after each form."""
    heads, p = (4, 8) if tiny else (24, 64)
    record: dict[str, Any] = {"what": "ssd", "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    record["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    record |= {"d_inner": heads * p, "d_head": p, "type": "bfloat16", "rows": []}
    for n in (64, 128):
        for label, (batch, length) in CASES.items():
            torch.manual_seed(0)
            given = drawn(batch, length // 64 if tiny else length, heads, p, n, device)
            dy = torch.randn(given[0].shape, device=device)
            with ssd.using("portable"):
                doubles = [x.double() for x in given]
                truth = results(lambda tensors: ssd(*tensors)[0], doubles, dy.double())  # pyright: ignore[reportCallIssue]
            del doubles
            for name, call in forms(n):
                row = {"case": label, "d_state": n, "form": name} | measured(call, given, truth, dy, seconds)
                record["rows"].append(row)
                out.write_text(json.dumps(record, indent=1))
                typer.echo(json.dumps(row))
            del truth
            if n == 64:
                call, scanned = mamba_scan(given, heads, p)
                row = {"case": label, "d_state": 16, "form": "selective_scan"}
                record["rows"].append(row | measured(call, scanned, None, dy.flatten(2), seconds))
                typer.echo(json.dumps(record["rows"][-1]))
            if label == "b1 l32768":
                record[f"profile {label} {n}"] = profile(functools.partial(_ours, "cuda", 64), given, dy)
                typer.echo("\n".join(map(str, record[f"profile {label} {n}"])))
            out.write_text(json.dumps(record, indent=1))
    cuda.chunk_length = CHUNK_LENGTH
    for batch, length in CASES.values():
        for row in blocks(batch, length // 64 if tiny else length, heads * p // 2, device, seconds):
            record["rows"].append(row)
            out.write_text(json.dumps(record, indent=1))
            typer.echo(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
