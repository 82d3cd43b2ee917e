"""Random calls of the cross-scan on the compiled CPU kernels, and how far they are from the reference."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectra.ops import cross_scan
from selectra.ops.native.library import library
from tests.ops.cpu_calls import TOLERANCES, relative_error
from tests.ops.cross import ACTIVATIONS, ALL, drawn, results

GRIDS = [(1, 1), (1, 13), (13, 1), (7, 5), (2, 17), (17, 2), (4, 4), (5, 19), (33, 3)]


class CrossDrawn(NamedTuple):
    """One random call."""

    seed: int
    tensors: dict[str, Tensor]
    flags: dict[str, Any]
    dtype: torch.dtype
    build: int
    threads: int


def draw(seed: int, builds: list[int]) -> CrossDrawn:
    """The call of a seed: odd grids, routes in any number and order, strides, dtypes and flags."""
    rng = random.Random(f"cross {seed}")
    routes = tuple(rng.choice(ALL) for _ in range(rng.choice([1, 2, 2, 3, 4, 4, 5])))
    d, n = rng.choice([1, 2, 3, 5, 8, 11, 16, 17, 24, 35]), rng.choice([1, 2, 3, 4, 5, 8, 15, 16, 17, 33])
    dtype, softplus = rng.choice(list(TOLERANCES)), rng.random() < 0.6
    tensors = drawn(
        (rng.choice([1, 1, 2, 3]), *rng.choice(GRIDS)),
        len(routes),
        d,
        n,
        dtype=dtype,
        shared=rng.random() < 0.7,
        gate=rng.choice([None, "shared", "shared", "own"]),
        plain=rng.random() < 0.3,
        seed=seed,
    )
    if not softplus:
        # The step must be positive by itself.
        tensors["delta"] = (tensors["delta"].abs() * 0.25).to(dtype).double()
        tensors.pop("delta_bias", None)
    laid = {name: laid_out(x, rng) if name in ACTIVATIONS else x for name, x in tensors.items()}
    flags = {"routes": routes, "merge": rng.random() < 0.7, "delta_softplus": softplus}
    return CrossDrawn(seed, laid, flags, dtype, rng.choice(builds), rng.choice([1, 1, 2, 3]))


def laid_out(x: Tensor, rng: random.Random) -> Tensor:
    """The same numbers behind other strides."""
    kind = rng.choice(["as it is", "as it is", "channels first", "columns first", "part", "crop", "every second"])
    if kind == "channels first":
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if kind == "columns first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "part":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if kind == "crop":
        # Of a grid with two more rows and three more columns.
        wider = torch.cat([x, *[x[:, :, :1]] * 3], 2)
        return torch.cat([wider[:, :1], wider, wider[:, :1]], 1)[:, 1:-1, : x.shape[2]]
    if kind == "every second":
        return x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2]
    return x


def errors(call: CrossDrawn) -> Iterator[tuple[str, float, float]]:
    """Name, relative error and tolerance of the output and of every gradient."""
    with cross_scan.using("reference"):
        exact = results(cross_scan, call.tensors, torch.float64, **call.flags)
    library().build = call.build
    torch.set_num_threads(call.threads)
    with cross_scan.using("cpu"):
        found = results(cross_scan, call.tensors, call.dtype, **call.flags)
    torch.set_num_threads(1)
    of_output, of_gradient = TOLERANCES[call.dtype]
    for name, value in exact.items():
        yield name, relative_error(name, found[name], value, exact), of_output if name == "y" else of_gradient
