"""CUDA C++ from this package to machine code, by NVRTC: no toolkit, no compiler, no headers but our own.

A source is named by its path inside `selectra/ops`. It may include, in quotes, files of its own folder and of
`ops/cuda`; these go to NVRTC from memory, and no other folder is searched.
"""

import importlib
import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from selectra.errors import BackendError

Defines = Sequence[tuple[str, str | int]]

PACKAGE = "selectra.ops"
SHARED_FOLDER = "cuda"
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\r\n]+)"', re.MULTILINE)
# Without the last, NVRTC also looks for headers in the folder that the process happens to be in.
OPTIONS = ("-std=c++17", "--no-source-include")


@dataclass(frozen=True)
class Unit:
    """A source and every header that it can include, by the names it includes them under."""

    name: str
    source: bytes
    headers: Mapping[str, bytes]


def compile_only(source: str, defines: Defines, arch: str) -> bytes:
    """Compile a source of this package; needs NVRTC and no GPU.

    Args:
        source: A path inside `selectra/ops`, such as "selective_scan/scan_wide.cu".
        defines: Names and values of macros.
        arch: What to compile for, such as "sm_90".

    Returns:
        The cubin.

    Raises:
        BackendError: NVRTC does not accept the source; the message is its log.
    """
    return compile_unit(read_unit(source), options(defines, arch))


def options(defines: Defines, arch: str) -> tuple[str, ...]:
    """What NVRTC is told, in an order that depends on the arguments alone."""
    return (f"-arch={arch}", *OPTIONS, *(f"-D{name}={value}" for name, value in defines))


def version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        ImportError: cuda-bindings is not installed.
        RuntimeError: NVRTC's library cannot be loaded.
    """
    _, major, minor = _nvrtc().nvrtcVersion()
    return int(major), int(minor)


def architectures() -> tuple[int, ...]:
    """What this NVRTC compiles for: 90 is sm_90."""
    return tuple(int(arch) for arch in _nvrtc().nvrtcGetSupportedArchs()[1])


def read_unit(source: str) -> Unit:
    """Read a source and, through its include lines, the headers."""
    root = _root()
    # What an editable install has as its root takes neither absolute paths nor several names at once.
    folder: Traversable = Path("/") if source.startswith("/") else root
    *folders, file_name = source.strip("/").split("/")
    for name in folders:
        folder = folder.joinpath(name)
    file = folder.joinpath(file_name)
    text = file.read_bytes()
    headers: dict[str, bytes] = {}
    pending = list(_includes(text))
    while pending:
        name = pending.pop()
        found = next(
            (path for where in (folder, root.joinpath(SHARED_FOLDER)) if (path := where / name).is_file()), None
        )
        # One that is not there may stand in a branch that is not compiled; where it is, NVRTC names it.
        if name not in headers and found is not None:
            headers[name] = found.read_bytes()
            pending += _includes(headers[name])
    return Unit(source, text, headers)


def compile_unit(unit: Unit, told: Sequence[str]) -> bytes:
    """Run NVRTC.

    Raises:
        BackendError: It does not accept the source; the message is its log.
    """
    nvrtc = _nvrtc()
    names = [name.encode() for name in unit.headers]
    arguments = [option.encode() for option in told]
    _, program = nvrtc.nvrtcCreateProgram(
        unit.source, unit.name.encode(), len(names), list(unit.headers.values()), names
    )
    try:
        (outcome,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        if int(outcome) != 0:
            log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            words = log.rstrip(b"\0\n").decode(errors="replace")
            if "libnvrtc-builtins" in words:
                words += "\nIt comes with NVRTC itself: install the package nvidia-cuda-nvrtc again."
            raise BackendError(f"NVRTC cannot compile {unit.name} ({' '.join(told)}): {outcome.name}.\n{words}")
        cubin = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc() -> Any:
    """NVIDIA's binding, which finds NVRTC's library where pip, conda or a toolkit put it; torch installs both."""
    return importlib.import_module("cuda.bindings.nvrtc")


def _root() -> Traversable:
    return importlib.resources.files(PACKAGE)


def _includes(text: bytes) -> Iterator[str]:
    return (match.decode() for match in INCLUDE.findall(text))
