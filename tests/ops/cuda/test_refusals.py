"""What is missing, and what would bring it, in words."""

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from selectra.ops import cuda
from selectra.ops.cuda import cache, compiler, driver, support
from tests.ops.cuda.fake_driver import FakeDriver


def test_nothing_is_refused_where_all_is_there(fake: FakeDriver) -> None:
    assert cuda.refusal(0) is None
    assert cuda.status() == cuda.CudaStatus(True, None, False, "13.0", "13.0", cache.folder())


def without(error: Exception) -> Callable[[], tuple[int, int]]:
    def version() -> tuple[int, int]:
        raise error

    return version


@pytest.mark.parametrize(
    ("change", "unused", "words"),
    [
        (
            lambda fake, patch: patch.setattr(torch.version, "cuda", None),
            True,
            r"^torch .* is a build without CUDA, and this machine has an NVIDIA GPU: a build of torch for CUDA brings",
        ),
        (
            lambda fake, patch: (patch.setattr(torch.version, "cuda", None), setattr(fake, "gpus", 0)),
            False,
            r"^torch .* is a build without CUDA, and no NVIDIA GPU is seen here$",
        ),
        (
            lambda fake, patch: (
                patch.setattr(torch.version, "cuda", None),
                patch.setattr(torch.version, "hip", "6.4"),
            ),
            False,
            r"is a build for AMD GPUs \(ROCm\), and these kernels are CUDA",
        ),
        (
            lambda fake, patch: patch.setattr(driver, "load", lambda: None),
            False,
            r"^no NVIDIA driver: its library (libcuda\.so\.1|nvcuda\.dll) is not found; installing the driver",
        ),
        (
            lambda fake, patch: patch.setattr(compiler, "version", without(ImportError("No module named 'cuda'"))),
            True,
            r"cuda-bindings, .* \(No module named 'cuda'\): pip install 'cuda-bindings==13\.\*'$",
        ),
        (
            lambda fake, patch: patch.setattr(compiler, "version", without(RuntimeError("not found"))),
            True,
            r"cannot be loaded: libnvrtc\.so\.13 is not found; pip install 'nvidia-cuda-nvrtc==13\.\*'$",
        ),
        (
            lambda fake, patch: (
                patch.setattr(compiler, "version", without(RuntimeError("not found"))),
                patch.setattr(torch.version, "cuda", "12.8"),
            ),
            True,
            r"libnvrtc\.so\.12 is not found; pip install 'nvidia-cuda-nvrtc-cu12'$",
        ),
        (
            lambda fake, patch: setattr(fake, "number", 12040),
            True,
            r"driver is for CUDA 12\.4, and NVRTC 13\.0 makes kernels for CUDA 13\.0 and up: driver 580 or newer",
        ),
        (
            lambda fake, patch: setattr(fake, "gpus", 0),
            False,
            r"^the NVIDIA driver shows this process no GPU; CUDA_VISIBLE_DEVICES says which",
        ),
    ],
    ids=[
        "CPU torch",
        "CPU torch, no GPU",
        "ROCm",
        "no driver",
        "no bindings",
        "no NVRTC",
        "no NVRTC 12",
        "old driver",
        "no GPU",
    ],
)
def test_what_is_missing_on_a_machine_is_said(
    fake: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[FakeDriver, pytest.MonkeyPatch], None],
    unused: bool,
    words: str,
) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda.so.1")
    change(fake, monkeypatch)
    found = cuda.status()
    assert not found.available
    assert found.gpu_unused == unused
    assert found.problem is not None
    assert re.search(words, found.problem)
    assert cuda.refusal(0) == found.problem


@pytest.mark.parametrize(
    ("index", "capability", "words"),
    [
        (0, (7, 5), r"^cuda:0 \(NVIDIA H100\) has compute capability 7\.5, and the kernels need 8\.0 or newer"),
        (0, (13, 0), r"^NVRTC 13\.0 does not compile for compute capability 13\.0 of cuda:0 .*torch for a newer CUDA"),
        (1, (9, 0), r"^there is no cuda:1; GPUs that this process sees: 1$"),
    ],
    ids=["too old", "too new", "not there"],
)
def test_what_is_wrong_with_a_device_is_said(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, index: int, capability: tuple[int, int], words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert cuda.status().available
    problem = cuda.refusal(index)
    assert problem is not None
    assert re.search(words, problem)


def test_a_device_is_looked_at_once(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.refusal(0) is None
    asked = len(fake.calls)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert cuda.refusal(0) is None
    assert len(fake.calls) == asked


@pytest.mark.compile
def test_a_refusal_is_a_constant_of_a_compiled_function(fake: FakeDriver) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def numbered(x: torch.Tensor) -> torch.Tensor:
        # A device's index is known from the tensor when it is traced, as the number of axes is.
        problem = cuda.refusal(x.ndim)
        return x + 1 if problem is None else x + len(problem)

    there = cuda.refusal(1)
    assert there is not None
    support._refusals.clear()
    assert numbered(torch.zeros(())) == 1
    assert numbered(torch.zeros(1)) == len(there)


def test_importing_the_package_asks_for_nothing() -> None:
    program = (
        "import sys, torch, selectra\n"
        "import selectra.ops.cuda\n"
        "from selectra.ops.cuda import driver, support\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert driver.load.cache_info().currsize == support._look.cache_info().currsize == 0\n"
        "print([name for name in ('cuda.core', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "[]"
