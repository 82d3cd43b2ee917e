"""How time and memory of token mixers and channel mixers grow with the length and with the channels."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selectra.bench.events import Run, Stopwatch, time_in_turn
from selectra.bench.modules import Subject, check, plain, seeded
from selectra.bench.vision_steps import peak_bytes, rows_named
from selectra.mixers import S6, Bidirectional, CrossScan2d, EinFFT, SelectiveChannel
from selectra.models.vim2 import GridChannels
from selectra.models.vmamba import UngatedCrossScan2d

SEED, BATCH = 0, 8
LENGTHS = tuple(2**i for i in range(10, 17))
CHANNELS = tuple(2**i for i in range(6, 13))
# Channels that are one step of the selective channel mixer, as in ViM2, and tokens while channels grow.
GROUP, TOKENS = 16, 8192
# A CPU takes narrow mixers, one sequence and float32, so that 65,536 positions are done in a second.
CPU_BATCH, CPU_TOKENS = 1, 256
LEAST, MOST = 0.9, 1.1
KINDS = ("forward_ms", "training_ms", "memory_bytes")


class Growth(NamedTuple):
    """A mixer, what grows, and how mixer and input's shape follow from that."""

    mixer: str
    of: str
    """"tokens" or "channels": what it mixes."""
    against: str
    """"length" or "channels"."""
    make: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]


def _line(batch: int, d_model: int) -> Callable[[int], tuple[int, ...]]:
    return lambda length: (batch, length, d_model)


def _grid(batch: int, d_model: int) -> Callable[[int], tuple[int, ...]]:
    def shape(length: int) -> tuple[int, ...]:
        height = 2 ** (int(math.log2(length)) // 2)
        return (batch, height, length // height, d_model)

    return shape


def studies(cuda: bool) -> tuple[Growth, ...]:
    """What is measured on a GPU, or on a CPU."""
    batch, tokens = (BATCH, TOKENS) if cuda else (CPU_BATCH, CPU_TOKENS)
    # Widths of token mixers on lines and on grids, of channel mixers inside and out, of EinFFT.
    line, grid, outer, inner, spectral = (192, 96, 384, 768, 320) if cuda else (32, 16, 32, 64, 64)
    by_channels = (
        Growth("SelectiveChannel", "channels", "channels", lambda _: SelectiveChannel(GROUP, expand=1),
               lambda c: (tokens, c // GROUP, GROUP)),
        Growth("EinFFT", "channels", "channels", EinFFT, lambda c: (batch, tokens // batch, c)),
        Growth("S6", "tokens", "channels", S6, lambda c: (batch, tokens // batch, c)),
        Growth("CrossScan2d, N = 16", "tokens", "channels", CrossScan2d, lambda c: (batch, 8, tokens // batch // 8, c)),
    )  # fmt: skip
    return (
        Growth("S6", "tokens", "length", lambda _: S6(line), _line(batch, line)),
        Growth("Bidirectional", "tokens", "length", lambda _: Bidirectional(line), _line(batch, line)),
        Growth("CrossScan2d, N = 16", "tokens", "length", lambda _: CrossScan2d(grid), _grid(batch, grid)),
        Growth("CrossScan2d, N = 1", "tokens", "length", lambda _: UngatedCrossScan2d(grid), _grid(batch, grid)),
        Growth("SelectiveChannel", "channels", "length", lambda _: GridChannels(outer, inner, GROUP, 16),
               _grid(batch, outer)),
        Growth("EinFFT", "channels", "length", lambda _: EinFFT(spectral), _line(batch, spectral)),
        *by_channels,
    )  # fmt: skip


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "S6": (lambda: S6(32), (2, 71, 32)),
    "Bidirectional": (lambda: Bidirectional(32), (2, 71, 32)),
    "CrossScan2d, N = 16": (lambda: CrossScan2d(16), (2, 5, 7, 16)),
    "CrossScan2d, N = 1": (lambda: UngatedCrossScan2d(16), (2, 5, 7, 16)),
    "SelectiveChannel": (lambda: GridChannels(24, 48, GROUP, 16), (2, 5, 7, 24)),
    "EinFFT": (lambda: EinFFT(32), (2, 71, 32)),
}


def measure(
    into: dict[str, Any], seconds: float, watch: Stopwatch, save: Callable[[], None], only: str | None = None
) -> None:
    """Check every mixer, then time each along its axis and fit the slopes of the upper half."""
    into["wanted slope"] = [LEAST, MOST]
    into["gate"] = {}
    with seeded(SEED, watch.device), torch.backends.cudnn.flags(allow_tf32=False):
        for name, (make, shape) in SMALL.items():
            x = torch.randn(shape, device=watch.device)
            into["gate"][name] = check(name, Subject(make().to(watch.device), x, plain))
    into["rows"] = []
    into["memory"] = "peak of a training step" if watch.cuda else "kept for the backward"
    named = {f"{study.mixer} {study.against}": study for study in studies(watch.cuda)}
    for study in rows_named(only, named):
        points = LENGTHS if study.against == "length" else CHANNELS
        row = {"mixer": study.mixer, "of": study.of, "against": study.against, "points": []}
        into["rows"].append(row)
        for value in points:
            row["points"].append(_point(study, value, seconds, watch))
        row["slopes"] = slopes(row["points"])
        save()
        if watch.cuda:
            torch.cuda.empty_cache()


def _point(study: Growth, value: int, seconds: float, watch: Stopwatch) -> dict[str, Any]:
    with seeded(SEED, watch.device):
        module = study.make(value).to(watch.device)
        x = torch.randn(study.shape(value), device=watch.device, dtype=torch.bfloat16 if watch.cuda else torch.float32)
    forward, training = _steps_of(module, x)
    runs: dict[str, Run] = {"forward": lambda _: forward(), "training": lambda _: training()}
    spreads = time_in_turn(runs, seconds, watch)
    found = {"value": value, "shape": list(x.shape)}
    found |= {f"{kind}_ms": spread.median for kind, spread in spreads.items()}
    return found | {
        "spread": {kind: vars(spread) for kind, spread in spreads.items()},
        "memory_bytes": peak_bytes(training, watch.device) if watch.cuda else kept_bytes(module, x),
    }


def _steps_of(module: nn.Module, x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    x.requires_grad_()
    leaves = [x, *module.parameters()]

    def forward() -> object:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return module(x)

    def training() -> object:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            y = module(x)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return forward, training


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward leaves for the backward beside input and parameters, in whole storages."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    return sum(found.values())


def slopes(points: list[dict[str, Any]]) -> dict[str, float]:
    """Of time and memory against what grows, in logarithms, by least squares over the upper half of the points."""
    upper = points[len(points) // 2 :]
    return {kind: slope([point["value"] for point in upper], [point[kind] for point in upper]) for kind in KINDS}


def slope(x: list[float], y: list[float]) -> float:
    """The exponent e of y = c x^e that fits best."""
    xs, ys = [math.log(value) for value in x], [math.log(value) for value in y]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - mx) * (b - my) for a, b in zip(xs, ys, strict=True)) / sum((a - mx) ** 2 for a in xs)
