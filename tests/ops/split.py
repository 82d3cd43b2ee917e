"""Several gloo processes that share sequences: what each computes, and how it is put together again."""

import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing
from torch.multiprocessing.spawn import start_processes

# Processes are copies of one that has loaded all this, not new ones that load it each.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["tests.ops.split", "selectra.mixers", "selectra.models"]
)


def together(n: int, work: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """What `work(*args)` returns in each of n processes of one gloo group, in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_start, (n, folder, timeout, work, args), n, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(n)]


def _start(rank: int, n: int, folder: str, timeout: float, work: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=timedelta(seconds=timeout)
    )
    torch.save(work(*args), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def cuts(length: int, n: int, seed: int) -> list[int]:
    """n + 1 borders of parts of a sequence; parts of no length among them."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, length + 1, (n - 1,), generator=generator).sort().values.tolist()
    return [0, *inner, length]


def parts(x: Tensor, borders: Sequence[int]) -> list[Tensor]:
    return [x[:, start:end] for start, end in pairwise(borders)]
