"""Several processes, started by torchrun: who am I, sums over all, and a model wrapped from outside."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from selectra.errors import BackendError, ConfigError, RankError
from selectra.ops.length_parallel import computed_twice, length_parallel
from selectra.spec import Parallel
from selectra.train.stop import DeviceMemoryError, StalledError, StoppedError

# How gloo, NCCL and the store name the end or the silence of another process.
OTHERS_FAILED = re.compile(r"gloo|nccl|ProcessGroup|connection (closed|reset|refused)|timed? ?out|broken pipe", re.I)


@dataclass(frozen=True)
class World:
    """The processes of this training: this one's number, how many there are, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False
    """Whether each process holds a part of the weights (FSDP2) rather than all of them."""
    split: bool = False
    """Whether each process has a part of every sequence of every batch, rather than a part of the batch's examples."""
    files: Any = None
    """A group for checkpoints alone, on the CPU: they are written while the training goes on."""
    meshes: dict[str, Any] = field(default_factory=dict, compare=False)
    """By kind of device, all processes in one row; `sharding.mesh_of` makes them."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    @property
    def readers(self) -> World:
        """Among which examples are dealt out: this process alone where each has a part of all of them."""
        return World(device=self.device) if self.split else self

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; with one process the tensor itself."""
        return self._over_all(tensor, distributed.ReduceOp.SUM) if self.size > 1 else tensor

    def most(self, tensor: Tensor) -> Tensor:
        """The greatest numbers of all processes; with one process the tensor itself."""
        return self._over_all(tensor, distributed.ReduceOp.MAX) if self.size > 1 else tensor

    def _over_all(self, tensor: Tensor, how: Any) -> Tensor:
        # gloo works on CPU tensors and nccl on CUDA ones.
        total = tensor.to(self.device, copy=True)
        distributed.all_reduce(total, how)
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
    if name == "cuda" and torch.cuda.is_available():
        # Each of several processes has its own.
        return torch.device("cuda", local_rank)
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
    if parallel.kind in ("ddp", "fsdp2", "length") and "WORLD_SIZE" not in os.environ:
        raise ConfigError(f"parallel.kind is '{parallel.kind}', and this is a single process; start it with torchrun.")
    if parallel.kind == "none" and size > 1:
        raise ConfigError(f"torchrun started {size} processes, and parallel.kind is 'none'; take 'ddp' or 'auto'.")
    sharded = parallel.kind == "fsdp2"
    if size == 1 and not sharded:
        yield World(device=pick_device(device))
        return
    place = pick_device(device, int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    limit = timedelta(seconds=parallel.timeout)
    with _others_named(parallel.timeout):
        _meet("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", limit)
        try:
            files = distributed.new_group(backend="gloo", timeout=limit)
            yield World(distributed.get_rank(), size, place, sharded, parallel.kind == "length", files)
        finally:
            distributed.destroy_process_group()


def _meet(backend: str, limit: timedelta) -> None:
    """Make the group of all processes.

    Those that `torchrun --max-restarts` started again on one host must not find the addresses of those before them,
    which its store still has. On several hosts, whose counts of restarts may differ, torchrun has to be told to take a
    new store each time, as docs/scaling.md says.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        distributed.init_process_group(backend, timeout=limit)
        return
    store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
    store = distributed.PrefixStore(f"restart-{restarts}", store)  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)


@contextlib.contextmanager
def _others_named(timeout: float) -> Iterator[None]:
    """Inside the block an exchange that fails because of another process is a `RankError` in words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        own = isinstance(error, (RankError, BackendError, StoppedError, StalledError, DeviceMemoryError))
        if own or not (isinstance(error, distributed.DistError) or OTHERS_FAILED.search(str(error))):
            raise
        rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        reason = " ".join(str(error).split())[:200]
        raise RankError(
            f"process {rank} of {size} waited for the others, and one ended, failed or did not answer within "
            f"{timeout:g} s (parallel.timeout): {reason}. Look for the first error among the others' outputs. The last "
            "checkpoint is whole: the same command goes on from it, and `torchrun --max-restarts` calls it by itself."
        ) from error


def wrap(model: nn.Module, world: World, compiled: bool = False, fixed: bool = False) -> nn.Module:
    """The model as the loop calls it: compiled if asked for, gradients averaged over processes where there are several.

    Its parameters and their names stay those of `model`, which is what is measured and saved. A model that is sharded
    already (`sharding.shard`) averages its gradients itself.

    Args:
        compiled: Whether it is.
        fixed: Whether all steps add gradients in one order also on a GPU, as they do on a CPU.
    """
    wrapped = cast(nn.Module, torch.compile(model)) if compiled else model
    if world.size == 1 or world.sharded:
        return wrapped
    devices = [world.device] if world.device.type == "cuda" else None
    # A copy of every gradient on its way in and out would be hundreds of launches that nothing hides.
    parallel = DistributedDataParallel(wrapped, device_ids=devices, gradient_as_bucket_view=True)
    if fixed or world.device.type == "cpu":
        # After its first step it would put gradients in the order in which they came. From three processes on, a
        # gradient's place says who adds first, and a training that goes on has another first step.
        parallel.reducer._push_all_rebuilt_params()
        parallel.reducer._rebuild_buckets()
    return parallel


def split_along_length(world: World, timeout: float) -> contextlib.AbstractContextManager[Any]:
    """Inside the block the processes have parts of the same sequences, where the world says so.

    Gradients are averaged over processes, as those of parts of a batch are, by `wrap`'s model.
    """
    return length_parallel(timeout=timeout) if world.split else contextlib.nullcontext()


@contextlib.contextmanager
def recomputed(model: Any, wanted: bool) -> Iterator[None]:
    """Inside the block a training model's blocks keep their inputs alone and compute the rest again for gradients.

    Dropped paths and units are drawn alike both times, so that results are those without.

    Raises:
        ConfigError: The model does not say what its blocks are.
    """
    if wanted and not hasattr(model, "blocks"):
        raise ConfigError(f"{type(model).__name__} does not say what its blocks are; leave train.recompute off.")
    # Blocks of which the model calls other methods say so.
    calls = [(b, name) for b in (model.blocks() if wanted else ()) for name in getattr(b, "calls", ("forward",))]
    kept = [block.__dict__.get(name) for block, name in calls]
    for block, name in calls:
        again = partial(_without_statistics, block)
        call = partial(
            checkpoint,
            getattr(block, name),
            use_reentrant=False,
            context_fn=lambda again=again: _both_times(again()),
        )
        setattr(block, name, call)
    try:
        yield
    finally:
        for (block, name), before in zip(calls, kept, strict=True):
            # Otherwise the class's own comes back.
            delattr(block, name)
            if before is not None:
                setattr(block, name, before)


def _both_times(
    again: contextlib.AbstractContextManager[None],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """What goes around a block, and around it when it is computed again: `again`, and sequences split as they are now.

    The split comes back also where backward comes after its block.
    """
    first, second = computed_twice()
    return first, _both(again, second)


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


def wait_for_gradients(model: Any, last: bool) -> contextlib.AbstractContextManager[None]:
    """Exchange gradients between processes only in the last of several accumulated batches.

    Sharded models keep their gradients whole until then: for a model whose gradients do not fit, take larger batches.
    """
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
