"""Several processes, started by torchrun: who am I, sums over all, and a model wrapped from outside."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from selectra.errors import ConfigError
from selectra.ops.length_parallel import same_split
from selectra.spec import Parallel


@dataclass(frozen=True)
class World:
    """The processes of this training: this one's number, how many there are, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; with one process the tensor itself."""
        if self.size == 1:
            return tensor
        # gloo works on CPU tensors and nccl on CUDA ones.
        total = tensor.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, item: Any) -> list[Any]:
        """Every process's item, in order of rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        distributed.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            distributed.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `train.device` means.

    Raises:
        ConfigError: PyTorch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'train.device' is {name!r}; allowed are 'auto', 'cpu', 'cuda', 'cuda:1', ...") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"'train.device' is {name!r}, and PyTorch finds {torch.cuda.device_count()} CUDA devices.")
    return device


@contextlib.contextmanager
def joined(parallel: Parallel, device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started, for the length of the block; alone without torchrun.

    Raises:
        ConfigError: `parallel.kind` does not fit the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel.kind == "ddp" and "WORLD_SIZE" not in os.environ:
        raise ConfigError("parallel.kind is 'ddp', and this is a single process; start it with torchrun.")
    if parallel.kind == "none" and size > 1:
        raise ConfigError(f"torchrun started {size} processes, and parallel.kind is 'none'; take 'ddp' or 'auto'.")
    if size == 1:
        yield World(device=pick_device(device))
        return
    place = pick_device(device, int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=parallel.timeout))
    try:
        yield World(distributed.get_rank(), size, place)
    finally:
        distributed.destroy_process_group()


def wrap(model: nn.Module, world: World, compiled: bool = False) -> nn.Module:
    """The model as the loop calls it: compiled if asked for, gradients averaged over processes where there are several.

    Its parameters and their names stay those of `model`, which is what is measured and saved.
    """
    wrapped = cast(nn.Module, torch.compile(model)) if compiled else model
    if world.size == 1:
        return wrapped
    return DistributedDataParallel(wrapped, device_ids=[world.device] if world.device.type == "cuda" else None)


@contextlib.contextmanager
def recomputed(model: Any, wanted: bool) -> Iterator[None]:
    """Inside the block a training model's blocks keep their inputs alone and compute the rest again for gradients.

    Dropped paths and units are drawn alike both times, so that results are those without.

    Raises:
        ConfigError: The model does not say what its blocks are.
    """
    if wanted and not hasattr(model, "blocks"):
        raise ConfigError(f"{type(model).__name__} does not say what its blocks are; leave train.recompute off.")
    blocks = list(model.blocks()) if wanted else []
    for block in blocks:
        again = partial(_without_statistics, block)
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=lambda again=again: (contextlib.nullcontext(), _as_before(again())),
        )
    try:
        yield
    finally:
        for block in blocks:
            # The class's own comes back.
            del block.forward


def _as_before(again: contextlib.AbstractContextManager[None]) -> contextlib.AbstractContextManager[None]:
    """`again`, and sequences split as they are at this moment, also where backward comes after the split's block."""
    return _both(again, same_split())


@contextlib.contextmanager
def _both(*blocks: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        yield


@contextlib.contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Inside the block batch norms note statistics in copies: what they see there they have seen already."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def wait_for_gradients(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Exchange gradients between processes only in the last of several accumulated batches."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
