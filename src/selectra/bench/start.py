"""What first use costs: the first call in a fresh process, with no compiled kernels on the disk and with them there.

The clock starts when everything is imported and the device has done some work, and stops when the device is done.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from selectra.bench.scan_table import markdown
from selectra.bench.shapes import Case
from selectra.errors import BackendError
from selectra.mixers.s6 import S6
from selectra.ops import selective_scan
from selectra.ops.cuda import cache
from selectra.train.record import environment

CASE = Case("start", 2, 256, 512)
WIDTH, LENGTH = 128, 512
ROUNDS = 5
# Seconds for a first call, kernels compiled; more is a compiler or a driver that hangs.
LIMIT = 600.0
# Forked from a process that has imported this and never touched a GPU.
METHOD = "forkserver"

Record = dict[str, Any]
Save = Callable[[Record], None]
Prepared = Callable[[], Any]


def bench_start(device: torch.device, console: Console, save: Save, rounds: int = ROUNDS) -> Record:
    """Time first and second uses of every kind of call; returns the record."""
    record: Record = {
        "benchmark": "start",
        "what": "seconds of the first call of a fresh process, medians; first without compiled kernels, then with them",
        "environment": environment(),
        "device": str(device),
        "rounds": rounds,
        "rows": [],
    }
    for name in PREPARE:
        pairs = []
        for _ in range(rounds):
            # A folder that is new: nothing in it is compiled yet.
            with tempfile.TemporaryDirectory() as folder:
                pairs.append([in_fresh_process(name, str(device), folder) for _ in range(2)])
        (first, kernels), (later, _) = ([*zip(*runs, strict=True)] for runs in zip(*pairs, strict=True))
        row = {"call": name, "kernels": kernels[0], "first_seconds": first, "later_seconds": later}
        record["rows"].append(row)
        save(record)
    console.print(start_table(record), highlight=False, soft_wrap=True)
    return record


def in_fresh_process(name: str, device: str, folder: str) -> tuple[float, int]:
    """Seconds of the first call, and the compiled kernels on the disk after it."""
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(first_call, name, device, folder).result(LIMIT)
        except TimeoutError as error:
            # The pool would wait for it.
            for process in multiprocessing.active_children():
                process.kill()
            raise BackendError(f"the first call of '{name}' on {device} did not end within {LIMIT:g} s") from error


def first_call(name: str, device: str, folder: str) -> tuple[float, int]:
    """As `in_fresh_process`, in this one."""
    os.environ[cache.FOLDER_VARIABLE] = str(Path(folder).absolute())
    where = torch.device(device)
    run = PREPARE[name](where)
    # Context, random numbers, the library of matrix products and what `backward` imports when it is given a gradient
    # (torch.fx's symbolic shapes, some 480 modules) are torch's own first use.
    square = torch.randn(64, 64, device=where, requires_grad=True)
    product = F.linear(square, square)
    product.backward(torch.ones_like(product))
    product.sum().item()
    begun = time.perf_counter()
    run()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - begun, cache.count()


def start_table(record: Record) -> str:
    """By kind of call: kernels, and the medians."""
    rows = [
        [row["call"], str(row["kernels"]), *(f"{median(row[f'{use}_seconds']):.3f}" for use in ("first", "later"))]
        for row in record["rows"]
    ]
    return markdown(["first call", "files of kernels", "on a clean machine, s", "later, s"], rows)


def _scan(device: torch.device, backward: bool) -> Prepared:
    arguments: dict[str, Any] = CASE.arguments(device)
    leaves: dict[str, Any] = {k: v if v is None else v.requires_grad_(backward) for k, v in arguments.items()}

    def run() -> None:
        y = selective_scan(**leaves, delta_softplus=True)
        if backward:
            y.backward(torch.ones_like(y))

    return run


def _block(device: torch.device) -> Prepared:
    block = S6(WIDTH).to(device, torch.bfloat16)
    x: Tensor = torch.randn(2, LENGTH, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        y = block(x)
        y.backward(torch.ones_like(y))

    return run


PREPARE: dict[str, Callable[[torch.device], Prepared]] = {
    "scan, forward": lambda device: _scan(device, False),
    "scan, forward and backward": lambda device: _scan(device, True),
    "S6 block, forward and backward": _block,
}
