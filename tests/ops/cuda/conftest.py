"""A small source, a cache folder of each test's own, and machines that are not there."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from selectra.ops.cuda import cache, compiler, driver, runtime, support
from tests.ops.cuda.fake_driver import FakeDriver
from tests.ops.cuda.process import new_process

SOURCE = """
#include "step.cuh"
struct Call { long long n; float* out; };
extern "C" __global__ void add(const __grid_constant__ Call call) {
    long long i = blockIdx.x * 256LL + threadIdx.x;
    if (i < call.n) call.out[i] += STEP * SCALE;
}
extern "C" __global__ void count_shared(const __grid_constant__ Call call) {
    extern __shared__ float room[];
    for (long long i = threadIdx.x; i < call.n; i += blockDim.x) room[i] = 1.0f;
    __syncthreads();
    float sum = 0.0f;
    for (long long i = 0; i < call.n; i++) sum += room[i];
    if (threadIdx.x == 0) *call.out = sum;
}
"""


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    new_process(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A source with a header that includes another."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "adder.cu").write_text(SOURCE)
    (folder / "step.cuh").write_text('#pragma once\n  #  include "inner.cuh"\n')
    (folder / "inner.cuh").write_text("#define STEP 1.0f\n")
    (folder / "other.cuh").write_text("#define STEP 2.0f\n")
    return str(folder / "adder.cu")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that a stand-in for NVRTC has compiled for."""
    done: list[str] = []

    def compile_unit(unit: compiler.Unit, told: tuple[str, ...]) -> bytes:
        done.append(told[0].removeprefix("-arch="))
        return hashlib.sha256(repr((unit, told)).encode()).digest() * 100

    monkeypatch.setattr(runtime, "compile_unit", compile_unit)
    monkeypatch.setattr(runtime, "version", lambda: (13, 0))
    return done


CACHED = (
    driver.primary_context,
    driver.launch_function,
    runtime.multiprocessors,
    runtime.shared_limit,
    support.capability,
    support._look,
)


@contextlib.contextmanager
def nothing_known() -> Iterator[None]:
    """Inside and after the block nothing is known of devices."""
    for known in CACHED:
        known.cache_clear()
    try:
        yield
    finally:
        for known in CACHED:
            known.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> Iterator[FakeDriver]:
    """A machine with a GPU of capability 9.0, whose driver is the fake one."""
    machine = FakeDriver()
    monkeypatch.setattr(driver, "load", lambda: machine)
    monkeypatch.setattr(support, "_refusals", {})
    monkeypatch.setattr(runtime, "_allowed", {})
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "architectures", lambda: (80, 90, 120))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x55, raising=False)
    with nothing_known():
        yield machine
