"""`selectra bench block_parts`: where a residual block's time goes, and what the norm and the projections gain."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from selectra.bench import norms, parts
from selectra.bench.block_table import norms_table, parts_table
from selectra.bench.events import Run, Stopwatch, time_in_turn
from selectra.bench.modules import Subject, check, seeded
from selectra.bench.parts import BlockSize
from selectra.errors import BackendError
from selectra.layers.norm import PreNorm
from selectra.ops import add_norm
from selectra.train.record import environment

SEED = 0
SIZES = (BlockSize("lm", 8, 2048, 1024), BlockSize("vim-t", 128, 197, 192), BlockSize("small", 8, 512, 1024))
SMALL = (2, 71, 64)
# In float32, of the largest entry.
NORM_AT_MOST = 1e-5


def bench_block_parts(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    sizes: tuple[BlockSize, ...] = SIZES,
    norm_sizes: tuple[norms.NormSize, ...] = norms.SIZES,
) -> dict[str, Any]:
    """Check, then time; returns the record.

    Raises:
        BackendError: Something is wrong; nothing is timed then.
    """
    with seeded(SEED, device):
        x = torch.randn(SMALL, device=device)
        block = parts.residual_block(SMALL[-1]).to(device)
        gate = {"block": check("the block", Subject(block, x, lambda module, x: torch.add(*module(x))))}
        gate |= {kind: _check_norm(kind, device) for kind in ("rms", "layer")}
        watch = Stopwatch(device)
        record: dict[str, Any] = {
            "benchmark": "block_parts",
            "what": "a residual block (sum and norm, S6) in bfloat16, stream in float32: the GPU's time of its parts "
            "by PyTorch's profiler, of the whole by events; sum and norm alone beside PyTorch's",
            "environment": environment(),
            "device": str(device),
            "seeds": {"weights and inputs": SEED},
            "seconds for each measurement": seconds,
            "copy, bytes a second": watch.bandwidth,
            "gate": gate,
            "rows": [],
            "norms": [],
        }
        for size in sizes:
            record["rows"] += _rows(size, seconds, watch)
            save(record)
        for size in norm_sizes:
            record["norms"].append(_norm_row(size, seconds, watch))
            save(record)
    for table in (parts_table, norms_table):
        console.print(table(record), highlight=False, soft_wrap=True)
    return record


def _check_norm(kind: Any, device: torch.device) -> float:
    """The operator that this device gets against the reference in float64: the worst error."""
    tensors = [torch.randn(*shape, device=device) for shape in ((37, 96), (37, 96), (96,), (96,))]
    grads = tuple(torch.randn(37, 96, device=device) for _ in range(2))

    def results(double: bool) -> list[torch.Tensor]:
        leaves = [(t.double() if double else t).detach().requires_grad_() for t in tensors]
        x, residual, weight, bias = leaves
        outputs = add_norm(x, residual, weight, bias, kind=kind)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(outputs[0]) for g in grads])]

    got = results(False)
    with add_norm.using("reference"):
        want = results(True)
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
    if not worst <= NORM_AT_MOST:
        raise BackendError(f"add_norm is wrong, nothing is timed: off by {worst:.1e}, allowed {NORM_AT_MOST:.0e}.")
    return worst


def _rows(size: BlockSize, seconds: float, watch: Stopwatch) -> list[dict[str, Any]]:
    """The block with PyTorch's backward of its projections, and as it is."""
    device, shape = watch.device, (size.batch, size.length, size.d_model)
    x, residual = torch.randn(shape, device=device, dtype=torch.bfloat16), torch.randn(shape, device=device)
    blocks = {"joined": parts.joined(_block(size, device)), "in place": _block(size, device)}
    rows: list[dict[str, Any]] = [{**size._asdict(), "backward": name} for name in blocks]
    makers = {"forward": parts.forward_of, "training": parts.training_of}
    runs = {kind: {name: make(block, x, residual) for name, block in blocks.items()} for kind, make in makers.items()}
    spreads = {
        kind: time_in_turn({name: _each(run) for name, run in of.items()}, seconds, watch) for kind, of in runs.items()
    }
    # Last: a profiler slows the host from then on.
    for row, (name, block) in zip(rows, blocks.items(), strict=True):
        for kind in makers:
            row[kind] = {"ms": asdict(spreads[kind][name]), "parts_ms": parts.parts(block, runs[kind][name])}
    return rows


def _each(run: Callable[[], object]) -> Run:
    """Whatever the number of the call."""
    return lambda call: run()


def _block(size: BlockSize, device: torch.device) -> PreNorm:
    return parts.residual_block(size.d_model).to(device, torch.bfloat16)


def _norm_row(size: norms.NormSize, seconds: float, watch: Stopwatch) -> dict[str, Any]:
    sets = norms.input_sets(size, watch.device)
    steps = norms.steps(size.kind)
    row: dict[str, Any] = {**size._asdict(), "stream": str(size.stream).removeprefix("torch.")}
    row["floor"] = norms.floors(size, watch)
    for kind, make in (("forward", norms.forward_of), ("training", norms.training_of)):
        spreads = time_in_turn({name: make(step, sets) for name, step in steps.items()}, seconds, watch)
        row[kind] = {name: asdict(spread) for name, spread in spreads.items()}
    return row
