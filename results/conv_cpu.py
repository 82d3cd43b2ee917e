"""The short convolution with SiLU on a CPU: the compiled kernel beside PyTorch's conv1d and silu, by turns.

    OMP_NUM_THREADS=1 python results/conv_cpu.py --out results

PyTorch's is given channels last and channels first; the faster of both counts. Outputs and gradients are compared
before anything is timed.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from selectra.ops import causal_conv1d
from selectra.train.record import environment

SHAPES = ((8, 196, 384), (8, 196, 768), (1, 1024, 384), (1, 1024, 768), (1, 4096, 256))
TAPS = 4


def first(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's, its own layout within: (b, d, l)."""
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=TAPS - 1, groups=len(weight))[..., : x.shape[-1]])


def last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's on channels last."""
    return first(x.mT, weight, bias).mT


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The operator."""
    return causal_conv1d(x, weight, bias, "silu")


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def compare(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds of each, medians, forward and with all gradients."""
    batch, length, d = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(batch, length, d), torch.randn(d, TAPS), torch.randn(d)
    leaves = {"ours": x, "channels last": x, "channels first": x.mT.contiguous()}
    calls = {"ours": ours, "channels last": last, "channels first": first}
    results = {}
    for name, call in calls.items():
        inputs = [t.detach().clone().requires_grad_() for t in (leaves[name], weight, bias)]
        y = call(*inputs)
        grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
        found = (y, *grads)
        results[name] = [t.mT if name == "channels first" and t.dim() == 3 else t for t in found]
    for name in ("channels last", "channels first"):
        torch.testing.assert_close(results["ours"], results[name], rtol=1e-3, atol=1e-3)

    def training(name: str) -> Callable[[], Any]:
        inputs = [t.detach().clone().requires_grad_() for t in (leaves[name], weight, bias)]
        grad = torch.ones_like(leaves[name])
        return lambda: torch.autograd.grad(calls[name](*inputs), inputs, grad)

    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in calls} for kind in ("forward", "training")}
    steps = {name: training(name) for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with torch.no_grad():
                times["forward"][name].append(seconds(lambda call=call, name=name: call(leaves[name], weight, bias)))
            times["training"][name].append(seconds(steps[name]))
    row: dict[str, Any] = {"shape (b, l, d)": shape}
    for kind, found in times.items():
        medians = {name: 1000 * statistics.median(each[3:]) for name, each in found.items()}
        row[f"{kind}, ms"] = medians
        row[f"{kind}, ratio"] = min(medians["channels last"], medians["channels first"]) / medians["ours"]
    return row


def main(
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("results"),
    rounds: Annotated[int, typer.Option(help="Calls of each.")] = 200,
) -> None:
    """Compare, print and write."""
    rows = [compare(shape, rounds) for shape in SHAPES]
    record = {
        "benchmark": "conv_cpu",
        "device": "cpu",
        "command": f"python results/conv_cpu.py --rounds {rounds}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "seed": 0,
        "threads": torch.get_num_threads(),
        "load after": os.getloadavg(),
        **environment(),
        "rows": rows,
    }
    path = out / f"conv-two-core-xeon-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        typer.echo(
            f"{row['shape (b, l, d)']}: forward {row['forward, ratio']:.2f}, training {row['training, ratio']:.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
