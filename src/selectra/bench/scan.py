"""`selectra bench scan` on a CPU: the scan's backends beside other packages' ways to compute it, and its limit."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selectra.bench import check
from selectra.bench.cpu_limit import limit_table, measure_limits
from selectra.bench.shapes import Case
from selectra.bench.timing import Timing, interleaved
from selectra.errors import BackendError
from selectra.ops import native, selective_scan
from selectra.train.record import environment


class Shape(NamedTuple):
    """Sizes of one measurement."""

    b: int
    d: int
    l: int
    n: int


# The last differ from the first in the state size alone.
SHAPES = (
    Shape(8, 384, 196, 16),
    Shape(1, 768, 1024, 16),
    Shape(1, 256, 4096, 16),
    *(Shape(8, 384, 196, n) for n in (1, 4, 64)),
)
FLAGS: dict[str, Any] = {"delta_softplus": True}
# Of each tensor's maximum, in float32: what other packages may differ from ours.
PEERS_AT_MOST = 1e-4

Scan = Callable[..., Any]


class Contender(NamedTuple):
    """One way to compute the scan."""

    run: Scan
    channels_first: bool = False
    longest: int | None = None
    """Beyond this length it is left out: the time or memory of its training step grows with the square of it."""


def bench_scan(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    shapes: tuple[Shape, ...] | None = None,
) -> dict[str, Any]:
    """Check, then time forward and training step of every backend and installed peer; returns the record.

    Where the compiled kernels run, the record's "limits" holds their times below autograd, what this machine does of
    the work that they are made of, and the least times that follow; see `cpu_limit`.

    Args:
        seconds: Time for each measurement; see `interleaved`.
        save: Is given the record so far after every shape.

    Raises:
        BackendError: A backend's results are wrong; nothing is timed then.
    """
    contenders = {name: Contender(_ours(name)) for name in _backends(device)} | _peers(device)
    _gate(contenders, device)
    record: dict[str, Any] = {
        "benchmark": "scan",
        "what": "one call of the selective scan with softplus, step bias, skip and gate, float32",
        "environment": environment(),
        "peers": {name: version(name) for name in ("mambapy", "transformers") if _installed(name)},
        "instruction set": native.status().isa,
        "load before": os.getloadavg(),
        "device": str(device),
        "seconds for each measurement": seconds,
        "rows": [],
        "limits": [],
    }
    for shape in shapes or SHAPES:
        running = {name: c for name, c in contenders.items() if c.longest is None or shape.l <= c.longest}
        rows = _measure(shape, running, seconds, device)
        record["rows"] += rows
        if "cpu" in contenders:
            record["limits"].append(measure_limits(Case("scan", *shape, dtype="fp32"), seconds))
        record["load after"] = os.getloadavg()
        save(record)
        _show(rows, shape, console)
        for name in contenders.keys() - running.keys():
            console.print(f"{name} is left out: its training step would take minutes at this length")
    if record["limits"]:
        console.print(limit_table(record), highlight=False, soft_wrap=True)
    return record


def _backends(device: torch.device) -> list[str]:
    """Backends that take a call on this device, fastest first, and the reference."""
    arguments = check.scan_arguments(1, 4, 2, 2, device)
    return [name for name, reason in selective_scan.explain(**arguments, **FLAGS).items() if reason == "ok"]


def _gate(contenders: dict[str, Contender], device: torch.device) -> None:
    """Backends against the float64 reference, then other packages against the first backend."""
    small = check.scan_arguments(2, 33, 71, 16, device)
    for name in contenders.keys() & selective_scan.backends.keys():
        wrong = check.problems(check.errors(selective_scan, name, small, FLAGS))
        if wrong:
            raise BackendError(f"selective_scan on {name} is wrong, nothing is timed: {'; '.join(wrong)}.")
    first, *others = (name for name in contenders)
    want = _outcome(contenders[first], small)
    for name in others:
        for got, truth in zip(_outcome(contenders[name], small), want, strict=True):
            error = ((got - truth).abs().max() / truth.abs().max()).item()
            if not error <= PEERS_AT_MOST:
                raise BackendError(
                    f"{name} computes something else (off by {error:.1e}); the comparison would be void."
                )


def _outcome(contender: Contender, arguments: check.Arguments) -> list[Tensor]:
    """y and every gradient, channels last."""
    own = _own_layout(contender, arguments)
    y = contender.run(**own)
    found = [y, *torch.autograd.grad(y.square().sum(), list(own.values()))]
    return [x.transpose(1, 2) if contender.channels_first and x.dim() == 3 else x for x in found]


def _own_layout(contender: Contender, arguments: check.Arguments) -> check.Arguments:
    """The same values as a contender wants them to lie in memory, so that nobody pays for a copy."""
    if not contender.channels_first:
        return arguments
    return {
        name: value.detach().transpose(1, 2).contiguous().requires_grad_() if value.dim() == 3 else value
        for name, value in arguments.items()
    }


def _ours(backend: str) -> Scan:
    def run(**arguments: Tensor) -> Any:
        with selective_scan.using(backend):
            return selective_scan(**arguments, **FLAGS)

    return run


def _measure(
    shape: Shape, contenders: dict[str, Contender], seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    arguments = check.scan_arguments(shape.b, shape.d, shape.l, shape.n, device)

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
        runs = {name: make(c.run, _own_layout(c, arguments)) for name, c in contenders.items()}
        for name, timing in interleaved(runs, seconds, device).items():
            timings.setdefault(name, {})[kind] = timing
    return [
        {"shape": shape._asdict(), "name": name, **{kind: asdict(timing) for kind, timing in found.items()}}
        for name, found in timings.items()
    ]


def _show(rows: list[dict[str, Any]], shape: Shape, console: Console) -> None:
    best = rows[0]
    table = Table(title=f"b={shape.b} d={shape.d} l={shape.l} n={shape.n}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("forward, ms", f"/ {best['name']}", "training, ms", f"/ {best['name']}"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for kind in ("forward", "training"):
            cells += [f"{row[kind]['median'] * 1e3:.2f}", f"{row[kind]['median'] / best[kind]['median']:.1f}"]
        table.add_row(row["name"], *cells)
    console.print(table)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _peers(device: torch.device) -> dict[str, Contender]:
    """Other packages' scans that are installed."""
    found: dict[str, Contender] = {}
    if _installed("mambapy"):
        found["mambapy pscan"] = Contender(_mambapy(device))
    if _installed("transformers"):
        found["transformers loop"] = Contender(_transformers(), channels_first=True, longest=512)
    return found


def _mambapy(device: torch.device) -> Scan:
    """mambapy's parallel scan, as its block calls it."""
    mamba = importlib.import_module("mambapy.mamba")
    # Only the method is used, which reads nothing of the block but its class.
    block = mamba.MambaBlock(mamba.MambaConfig(d_model=8, n_layers=1)).to(device)

    def run(**a: Tensor) -> Tensor:
        delta = F.softplus(a["delta"] + a["delta_bias"])
        return block.selective_scan(a["u"], delta, a["A"], a["B"], a["C"], a["D"]) * F.silu(a["z"])

    return run


def _transformers() -> Scan:
    """transformers' path without kernels: a loop over the length."""
    scan = importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan

    def run(**a: Tensor) -> Tensor:
        return scan(a["u"], a["delta"], a["A"], a["B"], a["C"], a["D"], a["z"], a["delta_bias"], delta_softplus=True)

    return run
