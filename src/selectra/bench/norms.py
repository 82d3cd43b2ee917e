"""Sum and norm of the residual stream: ours beside PyTorch's, eager and compiled."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selectra.bench.events import Run, Stopwatch
from selectra.ops import add_norm

INPUT_SETS = 3


class NormSize(NamedTuple):
    """What is normalised: bfloat16 onto a stream of another type, maybe."""

    rows: int
    width: int
    kind: Literal["rms", "layer"]
    stream: torch.dtype


SIZES = (
    NormSize(8 * 2048, 1024, "rms", torch.float32),
    NormSize(8 * 2048, 1024, "rms", torch.bfloat16),
    NormSize(8 * 2048, 2048, "rms", torch.float32),
    NormSize(64 * 3136, 96, "layer", torch.float32),
    NormSize(128 * 197, 384, "rms", torch.float32),
)

Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def plain(kind: str) -> Step:
    """As one would write it with PyTorch's functions; the norm takes the stream as it is."""

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x + residual
        weight, bias = weight.to(total.dtype), None if bias is None else bias.to(total.dtype)
        if kind == "layer":
            y = F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5)
        else:
            y = F.rms_norm(total, total.shape[-1:], weight, 1e-5)
        return y.to(x.dtype), total

    return run


def ours(kind: Literal["rms", "layer"]) -> Step:
    """This package's operator."""
    return lambda x, residual, weight, bias: add_norm(x, residual, weight, bias, kind=kind)


def steps(kind: Literal["rms", "layer"]) -> dict[str, Step]:
    """By name."""
    # One function is compiled for a few kinds of calls only.
    torch.compiler.reset()
    return {"eager": plain(kind), "compiled": torch.compile(plain(kind), dynamic=False), "ours": ours(kind)}


def input_sets(size: NormSize, device: torch.device) -> list[dict[str, Any]]:
    """Several, so that none is in the cache."""
    sets: list[dict[str, Any]] = []
    for _ in range(INPUT_SETS):
        shape = (size.rows, size.width)
        x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        residual = torch.randn(shape, device=device, dtype=size.stream, requires_grad=True)
        weight = torch.ones(size.width, device=device, dtype=torch.bfloat16, requires_grad=True)
        bias = None if size.kind == "rms" else torch.zeros_like(weight, requires_grad=True)
        dy, dtotal = torch.randn_like(x).detach(), torch.randn_like(residual).detach()
        sets.append({"inputs": (x, residual, weight, bias), "grads": (dy, dtotal)})
    return sets


def forward_of(step: Step, sets: list[dict[str, Any]]) -> Run:
    """Forward without gradient."""

    def run(call: int) -> object:
        with torch.no_grad():
            return step(*sets[call % len(sets)]["inputs"])

    return run


def training_of(step: Step, sets: list[dict[str, Any]]) -> Run:
    """Forward and backward."""

    def run(call: int) -> object:
        chosen = sets[call % len(sets)]
        leaves = [leaf for leaf in chosen["inputs"] if leaf is not None]
        return torch.autograd.grad(step(*chosen["inputs"]), leaves, chosen["grads"])

    return run


def floors(size: NormSize, watch: Stopwatch) -> dict[str, float]:
    """Milliseconds that the bytes take at a copy's bandwidth: what must be read and written, once."""
    numbers, stream = size.rows * size.width, size.stream.itemsize
    forward = numbers * (2 + stream + 2 + stream)
    # Stream, both gradients; gradients of x and, where its type differs, of the stream.
    backward = numbers * (stream + 2 + stream + 2 + (stream if stream != 2 else 0))
    return {"forward": 1e3 * forward / watch.bandwidth, "training": 1e3 * (forward + backward) / watch.bandwidth}
