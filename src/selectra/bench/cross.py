"""`selectra bench cross`: scans along routes through a grid in one call, against what is done without."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from selectra.bench import gate
from selectra.bench.events import Run, Stopwatch, time_in_turn
from selectra.bench.peers import error_of
from selectra.bench.scan_table import markdown, ms
from selectra.bench.shapes import DTYPES
from selectra.errors import BackendError
from selectra.ops import cross_scan, selective_scan
from selectra.ops.cross_scan.call import BACK, DOWN, ROUTES
from selectra.train.record import environment

SEED = 0
ALL, PAIR = ("right", "left", "down", "up"), ("right", "left")
# Grids for the gate, odd and even.
SMALL = ((2, 5, 7), (1, 8, 16))
# What the others, which round more often, may differ.
OTHERS_AT_MOST = 3e-2

Arguments = dict[str, Tensor]


class CrossCase(NamedTuple):
    """Sizes of one measurement; `d` channels in every direction; softplus, step bias and skip are always there."""

    tag: str
    b: int
    h: int
    w: int
    d: int
    n: int
    routes: tuple[str, ...] = ALL
    gate: bool = False
    dtype: str = "bf16"

    def arguments(self, device: torch.device, seed: int = SEED) -> Arguments:
        """Random inputs as they stand in a block: u and gate shared by all routes."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

        dtype, k, grid = DTYPES[self.dtype], len(self.routes), (self.b, self.h, self.w)
        found = {"u": normal(*grid, self.d, dtype=dtype), "delta": normal(*grid, k, self.d, dtype=dtype)}
        found |= {name: normal(*grid, k, self.n, dtype=dtype) for name in ("B", "C")}
        found |= {"A": -normal(k, self.d, self.n).exp(), "D": normal(k, self.d)}
        found["delta_bias"] = normal(k, self.d) - 3
        if self.gate:
            found["z"] = normal(*grid, self.d, dtype=dtype)
        return found


CASES = (
    CrossCase("vmamba-s1", 64, 56, 56, 192, 1),
    CrossCase("vmamba-s2", 64, 28, 28, 384, 1),
    CrossCase("vmamba-s3", 64, 14, 14, 768, 1),
    CrossCase("ss2d-n16", 32, 56, 56, 192, 16),
    CrossCase("vim-t", 128, 1, 197, 384, 16, PAIR, gate=True),
    CrossCase("vim-s-1248", 8, 1, 6085, 384, 16, PAIR, gate=True),
)
# On a CPU: batches and grids that it takes in milliseconds, in float32 as it is used there.
CPU_CASES = (
    CrossCase("grid-28", 2, 28, 28, 192, 1, dtype="fp32"),
    CrossCase("grid-28-n16", 2, 28, 28, 192, 16, dtype="fp32"),
    CrossCase("grid-28-bf16", 2, 28, 28, 192, 1),
    CrossCase("vmamba-s1", 1, 56, 56, 192, 1, dtype="fp32"),
    CrossCase("vmamba-s3", 2, 14, 14, 768, 1, dtype="fp32"),
    CrossCase("vim-t", 2, 1, 197, 384, 16, PAIR, gate=True, dtype="fp32"),
    CrossCase("vim-t-1024", 1, 1, 1024, 384, 16, PAIR, gate=True, dtype="fp32"),
)
# For trying the benchmark out.
TINY_CASES = (CrossCase("tiny", 1, 3, 5, 8, 1), CrossCase("tiny-pair", 2, 1, 9, 8, 4, PAIR, gate=True))


class Contender:
    """One way to compute the sum over the routes, with leaves of its own.

    Args:
        arguments: As `CrossCase.arguments` gives them.
        routes: Names of the routes.
    """

    def __init__(self, arguments: Arguments, routes: tuple[str, ...]) -> None:
        self.routes = routes
        self.leaves = {name: x.detach().requires_grad_() for name, x in self.prepared(arguments).items()}

    def prepared(self, arguments: Arguments) -> Arguments:
        """The arguments as this contender's projections would give them."""
        return arguments

    def y(self) -> Tensor:
        """The output (b, h, w, d)."""
        return cross_scan(**self.leaves, delta_softplus=True, routes=self.routes)  # pyright: ignore[reportArgumentType]

    def forward(self) -> Tensor:
        """Without gradient."""
        with torch.no_grad():
            return self.y()

    def train(self, dy: Tensor) -> tuple[Tensor, ...]:
        """Forward, and the gradients of all leaves."""
        return torch.autograd.grad(self.y(), list(self.leaves.values()), dy)


class Copies(Contender):
    """u (and the gate) copied into every route's order, one grouped scan, its outputs put back and added.

    delta, B and C come in the routes' orders, since their projections read the copies.
    """

    def prepared(self, arguments: Arguments) -> Arguments:
        """As one sequence of groups of channels."""
        found = dict(arguments)
        for name in ("delta", "B", "C"):
            own = [_walked(arguments[name][:, :, :, i], route) for i, route in enumerate(self.routes)]
            stacked = torch.stack(own, 2)
            found[name] = stacked.flatten(2) if name == "delta" else stacked
        return found | {name: found[name].flatten(0, 1) for name in ("A", "D", "delta_bias")}

    def y(self) -> Tensor:
        """Copy, scan, put back, add."""
        leaves = self.leaves
        grid = leaves["u"].shape[1:3]
        u, z = (
            None if x is None else torch.stack([_walked(x, route) for route in self.routes], 2).flatten(2)
            for x in (leaves["u"], leaves.get("z"))
        )
        assert u is not None
        delta, A, B, C, D = (leaves[name] for name in ("delta", "A", "B", "C", "D"))
        y = selective_scan(u, delta, A, B, C, D, z, leaves["delta_bias"], True)
        ys = y.unflatten(2, (len(self.routes), -1))
        return sum_of([_put_back(ys[:, :, i], route, grid) for i, route in enumerate(self.routes)])


class OneByOne(Contender):
    """One scan a route: both ways by `reverse`; walks by columns share one transposed copy of u and of the gate.

    delta, B and C come by rows or by columns, as projections of u and of its copy give them.
    """

    def prepared(self, arguments: Arguments) -> Arguments:
        """A tensor of its own for every route."""
        found = {name: arguments[name] for name in ("u", "z") if name in arguments}
        for i, route in enumerate(self.routes):
            for name in ("delta", "B", "C"):
                found[f"{name}{i}"] = _by_rows_or_columns(arguments[name][:, :, :, i], route).contiguous()
            found |= {f"{name}{i}": arguments[name][i] for name in ("A", "D", "delta_bias")}
        return found

    def y(self) -> Tensor:
        """A scan after the other."""
        leaves, grid = self.leaves, self.leaves["u"].shape[1:3]
        wide = {kind: {} for kind in (0, DOWN)}
        for route in self.routes:
            for name in ("u", "z"):
                kind = ROUTES[route] & DOWN
                if name in leaves and name not in wide[kind]:
                    wide[kind][name] = _by_rows_or_columns(leaves[name], route)
        sums: dict[int, Tensor] = {}
        for i, route in enumerate(self.routes):
            kind = ROUTES[route] & DOWN
            delta, A, B, C, D, bias = (leaves[f"{name}{i}"] for name in ("delta", "A", "B", "C", "D", "delta_bias"))
            back = bool(ROUTES[route] & BACK)
            y = selective_scan(wide[kind]["u"], delta, A, B, C, D, wide[kind].get("z"), bias, True, reverse=back)
            sums[kind] = sums[kind] + y if kind in sums else y
        return sum_of([_put_back(y, "down" if kind else "right", grid) for kind, y in sums.items()])


CONTENDERS: dict[str, type[Contender]] = {"routes": Contender, "copies": Copies, "one by one": OneByOne}


def sum_of(ys: list[Tensor]) -> Tensor:
    """All of them added."""
    return sum(ys[1:], ys[0])


def _by_rows_or_columns(x: Tensor, route: str) -> Tensor:
    """(b, h, w, ...) as a sequence."""
    return (x.transpose(1, 2) if ROUTES[route] & DOWN else x).flatten(1, 2)


def _walked(x: Tensor, route: str) -> Tensor:
    """(b, h, w, ...) as the sequence of a route."""
    along = _by_rows_or_columns(x, route)
    return along.flip(1) if ROUTES[route] & BACK else along


def _put_back(y: Tensor, route: str, grid: tuple[int, ...]) -> Tensor:
    """The sequence of a route as (b, h, w, d)."""
    height, width = grid
    y = y.flip(1) if ROUTES[route] & BACK else y
    return y.unflatten(1, (width, height)).transpose(1, 2) if ROUTES[route] & DOWN else y.unflatten(1, (height, width))


def bench_cross(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    cases: tuple[CrossCase, ...] = CASES,
) -> dict[str, Any]:
    """Check, then time forward and training step of all contenders; returns the record.

    Raises:
        BackendError: Results are wrong; nothing is timed then.
    """
    started = time.perf_counter()
    gated = {case.tag: check(case, device) for case in cases}
    watch = Stopwatch(device)
    record: dict[str, Any] = {
        "benchmark": "cross",
        "what": "scans along routes, added: forward without gradient, and forward with all gradients, "
        + ("by events" if watch.cuda else "wall clock, in turn"),
        "environment": environment(),
        "device": str(device),
        "seeds": {"inputs": SEED, "gate": gate.SEED},
        "seconds for each measurement": seconds,
        "gate": gated,
        "rows": [],
    }
    if not watch.cuda:
        record["load before"] = os.getloadavg()
    for case in cases:
        record["rows"].append(measure(case, seconds, watch))
        record["seconds"] = time.perf_counter() - started
        if not watch.cuda:
            record["load after"] = os.getloadavg()
        save(record)
    console.print(cross_table(record), highlight=False, soft_wrap=True)
    return record


def check(case: CrossCase, device: torch.device) -> dict[str, float]:
    """The operator on small grids against its reference in float64: the worst error of y and of each gradient.

    Raises:
        BackendError: It is wrong, or another contender computes something else.
    """
    worst: dict[str, float] = {}
    for batch, *grid in SMALL:
        height, width = (1, grid[0] * grid[1]) if case.h == 1 else grid
        # 29 or 32 channels.
        small = case._replace(b=batch, h=height, w=width, d=24 + grid[0])
        arguments = small.arguments(device, gate.SEED)
        dy = arguments["u"].flip(0, 1, 2)
        double = {name: x.cpu().double() for name, x in arguments.items()}
        with cross_scan.using("reference"):
            truth = _results(Contender(double, case.routes), dy.cpu().double())
        with gate.poisoned():
            got = _results(Contender(arguments, case.routes), dy)
        found = {name: error_of(got[name], value).largest for name, value in truth.items()}
        wrong = gate.problems(found, case.dtype)
        if wrong:
            raise BackendError(f"cross_scan is wrong at {case.tag}, nothing is timed: {'; '.join(wrong)}.")
        worst = {name: gate.worse(worst.get(name, 0.0), error) for name, error in found.items()}
        for name in ("copies", "one by one"):
            other = _results(CONTENDERS[name](arguments, case.routes), dy)
            error = gate.worse(*(error_of(other[what], truth[what]).largest for what in ("y", "du")))
            if not error <= OTHERS_AT_MOST:
                raise BackendError(f"'{name}' computes something else at {case.tag} ({error:.1e}).")
    return worst


def _results(contender: Contender, dy: Tensor) -> dict[str, Tensor]:
    grads = zip(contender.leaves, contender.train(dy), strict=True)
    return {"y": contender.forward(), **{f"d{name}": grad for name, grad in grads}}


def measure(case: CrossCase, seconds: float, watch: Stopwatch) -> dict[str, Any]:
    """One row of the record."""
    arguments = case.arguments(watch.device)
    dy = torch.randn_like(arguments["u"])
    contenders = {name: make(arguments, case.routes) for name, make in CONTENDERS.items()}
    forward: Mapping[str, Run] = {name: lambda _, c=c: c.forward() for name, c in contenders.items()}
    training: Mapping[str, Run] = {name: lambda _, c=c: c.train(dy) for name, c in contenders.items()}
    row = case._asdict() | {"backend": cross_scan.backend_for(**contenders["routes"].leaves, routes=case.routes)}
    for kind, runs in (("forward", forward), ("training", training)):
        row[kind] = {name: asdict(spread) for name, spread in time_in_turn(runs, seconds, watch).items()}
    if watch.cuda:
        row["peak_bytes"] = {name: _peak(c, dy, watch) for name, c in contenders.items()}
    return row


def _peak(contender: Contender, dy: Tensor, watch: Stopwatch) -> int:
    """Bytes beyond what lies there before, at the peak of a training step."""
    watch.synchronize()
    torch.cuda.reset_peak_memory_stats(watch.device)
    before = torch.cuda.memory_allocated(watch.device)
    contender.train(dy)
    watch.synchronize()
    return torch.cuda.max_memory_allocated(watch.device) - before


def cross_table(record: dict[str, Any]) -> str:
    """One line a shape: milliseconds of every contender, and the others' over ours."""
    columns = ["shape", "B, H x W, k, D, N"]
    for kind in ("forward", "training"):
        columns += [f"{kind}, ms: routes", "copies", "ratio", "one by one", "ratio"]
    rows = []
    for row in record["rows"]:
        cells = [row["tag"], f"{row['b']}, {row['h']} x {row['w']}, {len(row['routes'])}, {row['d']}, {row['n']}"]
        for kind in ("forward", "training"):
            ours, *others = (row[kind][name]["median"] for name in CONTENDERS)
            cells.append(ms(ours))
            for other in others:
                cells += [ms(other), f"{other / ours:.2f}"]
        rows.append(cells)
    return markdown(columns, rows, left=2)
