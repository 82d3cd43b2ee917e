"""Whether CUDA kernels can run here, and if not, what is missing and what would bring it.

Importing this touches neither the driver nor NVRTC: the first question does.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from selectra.ops.cuda import cache, compiler, driver

OLDEST_CAPABILITY = (8, 0)
# The first Linux drivers for a CUDA of this major version: they run what any NVRTC of it makes.
FIRST_DRIVERS = {12: "525", 13: "580"}
GET_CUDA_TORCH = "a build of torch for CUDA brings what they need; the selector on pytorch.org says how to install one"


@dataclass(frozen=True)
class CudaStatus:
    """What there is for CUDA kernels, for `selectra doctor` and for refusals."""

    available: bool
    problem: str | None = None
    """Why no kernel can run on any GPU, and what would help."""
    gpu_unused: bool = False
    """Whether there is an NVIDIA GPU that the problem leaves unused."""
    driver: str | None = None
    """The newest CUDA that the driver supports."""
    nvrtc: str | None = None
    """NVRTC's version."""
    folder: Path | None = None
    """Where compiled kernels are kept."""


def status() -> CudaStatus:
    """Look at torch, the driver and NVRTC at the first call, and say what was found."""
    return _look()


def refusal(device_index: int) -> str | None:
    """Why no CUDA kernel can run on a device, or None; known once for a process."""
    try:
        return _refusals[device_index]
    except KeyError:
        return _refusals.setdefault(device_index, status().problem or _problem_of_device(device_index))


# What `torch.compiler.assume_constant_result` does, without its import of the whole compiler: a traced call takes the
# answer as it is, and nothing of it is traced.
refusal._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def capability(device_index: int) -> tuple[int, int]:
    """A device's compute capability."""
    return torch.cuda.get_device_capability(device_index)


_refusals: dict[int, str | None] = {}


@functools.cache
def _look() -> CudaStatus:
    folder = cache.folder()
    problem = _problem_of_torch()
    if problem is not None:
        return CudaStatus(False, problem, torch.version.hip is None and driver.sees_gpu(), folder=folder)
    found, nvrtc = driver.version(), _nvrtc()
    if isinstance(nvrtc, str):
        return CudaStatus(False, nvrtc, driver.sees_gpu(), _dotted(found), folder=folder)
    problem = _problem_of_driver(found, nvrtc)
    unused = problem is not None and driver.sees_gpu()
    return CudaStatus(problem is None, problem, unused, _dotted(found), _dotted(nvrtc), folder)


def _problem_of_torch() -> str | None:
    if torch.version.hip is not None:
        return (
            f"torch {torch.__version__} is a build for AMD GPUs (ROCm), and these kernels are CUDA, for NVIDIA GPUs; "
            "calls run on `portable`"
        )
    if torch.version.cuda is None:
        if not driver.sees_gpu():
            return f"torch {torch.__version__} is a build without CUDA, and no NVIDIA GPU is seen here"
        return (
            f"torch {torch.__version__} is a build without CUDA, and this machine has an NVIDIA GPU: {GET_CUDA_TORCH}"
        )
    if driver.load() is None:
        return (
            f"no NVIDIA driver: its library {driver.LIBRARY} is not found; installing the driver brings it, and a "
            "container gets it when it is started with its GPUs"
        )
    return None


def _nvrtc() -> tuple[int, int] | str:
    """NVRTC's version, or why there is none."""
    major = _cuda_major()
    try:
        return compiler.version()
    except ImportError as error:
        return (
            f"the Python package cuda-bindings, through which NVRTC is called, cannot be imported ({error}): "
            f"pip install 'cuda-bindings=={major}.*'"
        )
    except (RuntimeError, OSError):
        file = f"nvrtc64_{major}0_0.dll" if driver.LIBRARY.endswith(".dll") else f"libnvrtc.so.{major}"
        package = "nvidia-cuda-nvrtc-cu12" if major < 13 else f"nvidia-cuda-nvrtc=={major}.*"
        return f"NVRTC, which compiles the kernels, cannot be loaded: {file} is not found; pip install '{package}'"


def _cuda_major() -> int:
    assert torch.version.cuda is not None
    return int(torch.version.cuda.partition(".")[0])


def _problem_of_driver(found: tuple[int, int], nvrtc: tuple[int, int]) -> str | None:
    """A driver runs the machine code of every NVRTC of its own major version and of those before."""
    if found[0] < nvrtc[0]:
        first = FIRST_DRIVERS.get(nvrtc[0])
        newer = f"driver {first} or newer" if first else "a newer driver"
        return (
            f"the NVIDIA driver is for CUDA {_dotted(found)}, and NVRTC {_dotted(nvrtc)} makes kernels for CUDA "
            f"{nvrtc[0]}.0 and up: {newer} brings it, or a build of torch for CUDA {found[0]} does without"
        )
    if torch.cuda.device_count() == 0:
        return "the NVIDIA driver shows this process no GPU; CUDA_VISIBLE_DEVICES says which it may see"
    return None


def _problem_of_device(index: int) -> str | None:
    """What is wrong with one GPU where nothing is wrong with the machine."""
    count = torch.cuda.device_count()
    if index >= count:
        return f"there is no cuda:{index}; GPUs that this process sees: {count}"
    found, name = capability(index), torch.cuda.get_device_name(index)
    if found < OLDEST_CAPABILITY:
        return (
            f"cuda:{index} ({name}) has compute capability {_dotted(found)}, and the kernels need "
            f"{_dotted(OLDEST_CAPABILITY)} or newer (A100, RTX 30 and what came after)"
        )
    if 10 * found[0] + found[1] not in compiler.architectures():
        return (
            f"NVRTC {_dotted(compiler.version())} does not compile for compute capability {_dotted(found)} of "
            f"cuda:{index} ({name}); a build of torch for a newer CUDA brings one that does"
        )
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
