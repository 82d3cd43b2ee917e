"""The same bits for the same input: PyTorch's switch around a training, its refusals in words.

Selectra's own kernels add in a fixed order anyway, on CPUs and GPUs. PyTorch's on a GPU do not all: some add with
atomic operations, and cuBLAS may share its working space among streams.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from selectra.errors import ConfigError

WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
REFUSAL = "does not have a deterministic implementation"


def fix_products() -> None:
    """Let cuBLAS have working spaces of its own for each stream: it asks once, when it computes its first product."""
    os.environ.setdefault(WORKSPACE, FIXED[0])


@contextmanager
def deterministic(on: bool, device: torch.device) -> Iterator[None]:
    """Inside the block every operation gives the same bits for the same input, or is refused.

    Args:
        on: Whether that is wanted; without it nothing changes.
        device: Where it computes.

    Raises:
        ConfigError: An operation has no such form on this device, or cuBLAS was not told in time.
    """
    if not on:
        yield
        return
    if device.type == "cuda" and os.environ.get(WORKSPACE) not in FIXED:
        raise ConfigError(
            f"train.deterministic needs {WORKSPACE}={FIXED[0]} in the environment before CUDA computes its first "
            f"product; it is {os.environ.get(WORKSPACE)!r}. `selectra train` sets it; in a program of your own set it "
            "before torch is imported."
        )
    # Their attributes are there at run time alone.
    cudnn: Any = torch.backends.cudnn
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    others = cudnn.benchmark, settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written: filling it first would only take time.
    cudnn.benchmark, settings.fill_uninitialized_memory = False, False
    try:
        yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(REFUSAL)
        if not found:
            raise
        raise ConfigError(
            f"train.deterministic=true, and '{name.strip()}' has no such form on {device}: leave the setting out "
            "(results then differ by rounding from run to run), take another model, or train on a CPU."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, settings.fill_uninitialized_memory = others
