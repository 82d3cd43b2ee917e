"""The CUDA backends on CPU tensors: their host code as it is, the emulated machine in the place of the runtime."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from selectra.ops import cuda
from selectra.ops.cuda import runtime, support
from tests.ops.emulator import EmulatedKernel, emulated, problem


@dataclass
class EmulatedGpu:
    """A device whose properties a test may change before its calls."""

    seed: int = 0
    """0, or the order of lanes, warps and blocks is drawn."""
    multiprocessors: int = 4
    capability: tuple[int, int] = (9, 0)
    shared_limit: int = 227 * 1024
    kernels: list[EmulatedKernel] = field(default_factory=list)
    """Those that were asked for, in order."""

    def kernel(
        self,
        source: str | Path,
        name: str,
        defines: Sequence[tuple[str, str | int]],
        device_index: int,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> EmulatedKernel:
        """As `runtime.kernel`; the index of the device is not looked at, since CPU tensors have none."""
        self.kernels.append(emulated(source, defines, name, shared_bytes, self.seed))
        return self.kernels[-1]


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """Put the emulated machine in the place of the CUDA runtime.

    Code under test reaches the runtime through its module (`cuda.kernel(...)`), not by names of its own.
    """
    if reason := problem():
        pytest.skip(reason)
    gpu = EmulatedGpu()
    stand_ins = {
        "kernel": gpu.kernel,
        "refusal": lambda device_index: None,
        "multiprocessors": lambda device_index: gpu.multiprocessors,
        "capability": lambda device_index: gpu.capability,
        "shared_limit": lambda device_index: gpu.shared_limit,
        "is_cooperative": lambda device_index: False,
    }
    for module in (cuda, runtime, support):
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    return gpu
