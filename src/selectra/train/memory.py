"""Memory: how much a process took, and what to change where the device has no more."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from selectra.train.batch_norms import has_batch_norms
from selectra.train.state import State
from selectra.train.stop import DeviceMemoryError

GIB = 2**30


def peak_memory(device: torch.device) -> float | None:
    """Most GiB that were taken at once since the start: by tensors on a GPU, of this process on a CPU.

    The allocator's and the system's own counters are read: no device is waited for.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource  # noqa: PLC0415
    except ModuleNotFoundError:
        return None
    # In KiB on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


@contextmanager
def naming_full_memory(state: State) -> Iterator[None]:
    """Inside the block a device's full memory is an error that says what to change.

    Raises:
        DeviceMemoryError: The memory is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(_advice(state, str(error).partition("\n")[0])) from error


def _advice(state: State, said: str) -> str:
    run, world, size = state.run, state.world, state.world.readers.size
    train, each = run.train, -(-run.train.batch_size // size)
    ways = []
    whole = train.batch_size
    # Only parts that are equal make the same steps; every process has a share of each, and a smaller one.
    smaller = [part for part in range(size, whole) if whole % part == 0 and -(-part // size) < each]
    if smaller:
        part = smaller[-1]
        # Batch norms take their mean and variance over fewer examples.
        same = "" if has_batch_norms(state.model) else " (the same gradient)"
        ways.append(f"train.batch_size={part} with train.accumulate={train.accumulate * (whole // part)}{same}")
    if not train.recompute:
        ways.append("train.recompute=true (less memory, more time)")
    if train.precision == "float32":
        ways.append("train.precision=bfloat16")
    ways.append("more processes" if world.size == 1 else f"more processes than {world.size}")
    return (
        f"step {state.at.step + 1}: the memory of {state.world.device} is full with "
        f"train.batch_size={train.batch_size} ({each} in a forward pass of each process), "
        f"train.accumulate={train.accumulate}. Take one or more of: {'; '.join(ways)}. With other settings it is "
        f"another training: choose another --out, or start over with --anew. (PyTorch: {said})"
    )
