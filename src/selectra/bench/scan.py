"""`selectra bench scan`: the selective scan's backends beside other packages' ways to compute it, in one run."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selectra.bench import check
from selectra.bench.timing import Timing, interleaved
from selectra.errors import BackendError
from selectra.ops import selective_scan
from selectra.train.record import environment


class Shape(NamedTuple):
    """Sizes of one measurement."""

    b: int
    d: int
    l: int
    n: int


SHAPES = {
    "cpu": (Shape(8, 384, 196, 16), Shape(1, 768, 1024, 16), Shape(1, 256, 4096, 16)),
    "cuda": (Shape(8, 2048, 2048, 16), Shape(128, 384, 197, 16)),
}
# The reference runs where its loop over the length can be waited for.
LONGEST_REFERENCE = 4096
FLAGS: dict[str, Any] = {"delta_softplus": True}
PEERS_AT_MOST = 1e-4

Scan = Callable[..., Any]


def bench_scan(
    device: torch.device, seconds: float, shapes: tuple[Shape, ...] | None, console: Console
) -> dict[str, Any]:
    """Check, then time forward and training step of every backend and installed peer; returns the record.

    Raises:
        BackendError: A backend's results are wrong; nothing is timed then.
    """
    backends = _backends(device)
    _gate(backends, device)
    rows = []
    for shape in shapes or SHAPES.get(device.type, SHAPES["cpu"]):
        arguments = check.scan_arguments(shape.b, shape.d, shape.l, shape.n, device)
        names = [name for name in backends if name != "reference" or shape.l <= LONGEST_REFERENCE]
        contenders = {name: (_ours(name), arguments) for name in names}
        contenders |= _peers(arguments, device)
        rows += _measure(shape, contenders, seconds, device)
        _show(rows[-len(contenders) :], shape, console)
    return {
        "benchmark": "scan",
        "what": "one call of the selective scan with softplus, step bias, skip and gate, float32",
        "environment": environment(),
        "peers": {name: _version(name) for name in ("mambapy", "transformers") if _installed(name)},
        "device": str(device),
        "rows": rows,
    }


def _backends(device: torch.device) -> list[str]:
    """Backends that take a call on this device, fastest first, and the reference."""
    arguments = check.scan_arguments(1, 4, 2, 2, device)
    return [name for name, reason in selective_scan.explain(**arguments, **FLAGS).items() if reason == "ok"]


def _gate(backends: list[str], device: torch.device) -> None:
    arguments = check.scan_arguments(2, 33, 71, 16, device)
    for backend in backends:
        wrong = check.problems(check.errors(selective_scan, backend, arguments, FLAGS))
        if wrong:
            raise BackendError(f"selective_scan on {backend} is wrong, nothing is timed: {'; '.join(wrong)}.")


def _ours(backend: str) -> Scan:
    def run(**arguments: Tensor) -> Any:
        with selective_scan.using(backend):
            return selective_scan(**arguments, **FLAGS)

    return run


def _measure(
    shape: Shape, contenders: dict[str, tuple[Scan, dict[str, Tensor]]], seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    def forward(scan: Scan, arguments: dict[str, Tensor]) -> Callable[[], object]:
        detached = {name: value.detach() for name, value in arguments.items()}

        def run() -> object:
            return scan(**detached)

        return run

    def training(scan: Scan, arguments: dict[str, Tensor]) -> Callable[[], object]:
        leaves = list(arguments.values())
        gradient = torch.ones_like(scan(**arguments))

        def run() -> object:
            return torch.autograd.grad(scan(**arguments), leaves, gradient)

        return run

    timings: dict[str, dict[str, Timing]] = {}
    for kind, make in (("forward", forward), ("training", training)):
        runs = {name: make(scan, arguments) for name, (scan, arguments) in contenders.items()}
        for name, timing in interleaved(runs, seconds, device).items():
            timings.setdefault(name, {})[kind] = timing
    return [
        {"shape": shape._asdict(), "name": name, **{kind: asdict(timing) for kind, timing in found.items()}}
        for name, found in timings.items()
    ]


def _show(rows: list[dict[str, Any]], shape: Shape, console: Console) -> None:
    best = rows[0]
    table = Table(title=f"b={shape.b} d={shape.d} l={shape.l} n={shape.n}", title_justify="left")
    for column in ("", "forward, ms", "training step, ms", f"times {best['name']}: forward", "training"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        milliseconds = [f"{row[kind]['median'] * 1e3:.2f}" for kind in ("forward", "training")]
        ratios = [f"{row[kind]['median'] / best[kind]['median']:.1f}" for kind in ("forward", "training")]
        table.add_row(row["name"], *milliseconds, *ratios)
    console.print(table)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(package: str) -> str:
    from importlib.metadata import version  # noqa: PLC0415

    return version(package)


def _peers(arguments: dict[str, Tensor], device: torch.device) -> dict[str, tuple[Scan, dict[str, Tensor]]]:
    """Other packages' scans that are installed, each on inputs in its own layout, checked against ours."""
    found: dict[str, tuple[Scan, dict[str, Tensor]]] = {}
    channels_first = {
        name: value.detach().transpose(1, 2).contiguous().requires_grad_() if value.dim() == 3 else value
        for name, value in arguments.items()
    }
    if _installed("mambapy"):
        found["mambapy pscan"] = (_mambapy(arguments), arguments)
    if _installed("transformers"):
        found["transformers loop"] = (_transformers, channels_first)
    with torch.no_grad():
        want = selective_scan(**arguments, **FLAGS)
        for name, (scan, own) in found.items():
            y = scan(**own)
            y = y.transpose(1, 2) if own is channels_first else y
            error = ((y - want).abs().max() / want.abs().max()).item()
            if not error <= PEERS_AT_MOST:
                raise BackendError(
                    f"{name} computes something else (off by {error:.1e}); the comparison would be void."
                )
    return found


def _mambapy(arguments: dict[str, Tensor]) -> Scan:
    """mambapy's parallel scan, as its block calls it."""
    from mambapy.mamba import MambaBlock, MambaConfig  # noqa: PLC0415

    d, n = arguments["A"].shape
    block = MambaBlock(MambaConfig(d_model=d, n_layers=1, d_state=n, expand_factor=1))

    def run(**a: Tensor) -> Tensor:
        delta = torch.nn.functional.softplus(a["delta"] + a["delta_bias"])
        y = block.selective_scan(a["u"], delta, a["A"], a["B"], a["C"], a["D"])
        return y * torch.nn.functional.silu(a["z"])

    return run


def _transformers(**a: Tensor) -> Tensor:
    """transformers' path without kernels: a loop over the length."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan  # noqa: PLC0415

    return mamba_selective_scan(
        a["u"], a["delta"], a["A"], a["B"], a["C"], a["D"], a["z"], a["delta_bias"], delta_softplus=True
    )
