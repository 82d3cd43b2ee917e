"""The CUDA kernels on the CPU, from the same sources: `emulated(source, defines, name)(grid, threads, words)`.

The sources use no machine primitive but those of `warp.cuh`; `primitives.h` defines them on a machine whose threads are
fibers (`machine.h`). What a GPU would leave undefined is an `EmulatorError` with the place in the kernel: lanes of a
warp, or warps of a block, that do not come to the same warp operation or barrier; two threads that touch a byte of
shared memory, one of them writing, with no barrier between; accesses beyond the shared memory asked for, or at an
address that is not a multiple of their size. Shared memory starts as NaN. With a seed the order of lanes, warps and
blocks is drawn, so that results that differ between seeds show what else depends on it.

With `SELECTRA_EMULATOR_SANITIZE=1` the compiler's sanitizers for addresses and undefined behaviour take the place of
the watch over shared memory: they know the borders of tensors, and end the process. They need
`LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0`.
"""

import ctypes
import functools
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import selectra.ops

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# What the `source` of a kernel is relative to.
SOURCES = Path(selectra.ops.__file__).resolve().parent
INCLUDES = (HERE, SOURCES / "cuda", SOURCES)
KERNEL = re.compile(r"\bemulator::Kernel\s+(\w+)\s*\(")

# CUDA's compiler assumes nothing of types that share memory. Sums and products are rounded one by one on every machine.
DIALECT = ("-std=c++17", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off")
# A place in a library, as accesses.cpp writes it.
PLACE = re.compile(r"\[(0x[0-9a-f]+)\]")

Defines = Mapping[str, str | int] | Sequence[tuple[str, str | int]]


class EmulatorError(RuntimeError):
    """What a kernel did that a GPU leaves undefined, or a source that does not compile."""


def problem() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if sys.platform != "linux":
        return f"the emulator runs on Linux, not on {sys.platform}"
    return None if _compiler() else "no C++ compiler: neither g++ nor clang++ is on the PATH"


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("seed", ctypes.c_uint),
    )


@dataclass(frozen=True)
class EmulatedKernel:
    """A kernel on the emulated machine, launched as a `selectra.ops.cuda.Kernel`."""

    name: str
    library: str
    entry: Callable[..., bytes | None] = field(repr=False)
    shared_bytes: int = 0
    seed: int = 0

    def launch(self, grid: tuple[int, int, int], threads: int, words: Sequence[int]) -> None:
        """Run the kernel on all blocks, one after the other; `words` are its argument's 64-bit words."""
        packed = (ctypes.c_longlong * len(words))(*words)
        launch = _Launch((ctypes.c_int * 3)(*grid), threads, self.shared_bytes, self.seed)
        problem = self.entry(ctypes.byref(launch), packed, len(words))
        if problem is not None:
            raise EmulatorError(f"{self.name}: {PLACE.sub(self._line, problem.decode())}")

    def _line(self, place: re.Match[str]) -> str:
        command = ("addr2line", "-e", self.library, place[1])
        line = subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition(" ")[0]
        return Path(line.strip()).name or place[0]

    def __call__(self, grid: tuple[int, int, int], threads: int, words: Sequence[int], shared_bytes: int = 0) -> None:
        replace(self, shared_bytes=shared_bytes or self.shared_bytes).launch(grid, threads, words)


def emulated(
    source: str | Path, defines: Defines, name: str, shared_bytes: int = 0, seed: int = 0, watched: bool = True
) -> EmulatedKernel:
    """Compile the kernel `name` for the emulated machine.

    Args:
        source: Path inside `selectra/ops`, or an absolute one.
        defines: Names and values of the preprocessor.
        shared_bytes: Shared memory of a launch that does not say its own.
        seed: 0 runs lanes, warps and blocks in their natural order; another number draws the order.
        watched: Whether accesses that no barrier puts in order are errors.
    """
    pairs = tuple(defines.items()) if isinstance(defines, Mapping) else tuple(defines)
    if reason := problem():
        raise EmulatorError(reason)
    library = _library(SOURCES / source, pairs, watched)
    try:
        entry = library[f"emulator_run_{name}"]
    except AttributeError:
        raise EmulatorError(f"{source} has no kernel {name!r} with {dict(pairs)}") from None
    entry.argtypes = (ctypes.POINTER(_Launch), ctypes.POINTER(ctypes.c_longlong), ctypes.c_int)
    entry.restype = ctypes.c_char_p
    return EmulatedKernel(name, library._name, entry, shared_bytes, seed)


@functools.cache
def _library(source: Path, defines: tuple[tuple[str, str | int], ...], watched: bool) -> ctypes.PyDLL:
    """All kernels of a source."""
    flags = [f"-D{name}={value}" for name, value in defines] + [f"-I{_inside(folder)}" for folder in INCLUDES]
    text = _compiled("-DSELECTRA_EMULATED", *flags, "-E", "-x", "c++", _inside(source))
    entries = "".join(f"EMULATOR_ENTRY({name})\n" for name in KERNEL.findall(text))
    text += f'\n#line 1 "entries"\n#include "entry.h"\n{entries}'
    machine = [_object((HERE / name).read_text(), "-O2") for name in ("machine.cpp", "accesses.cpp", "faults.cpp")]
    # A kernel is compiled for every new set of defines and then runs on a few small blocks: -O1 takes thrice as long.
    kernels = _object(text, "-O0", *_checks(watched))
    # PyDLL keeps the interpreter's lock: a library has one machine, which runs one launch at a time.
    return ctypes.PyDLL(str(_built(".so", "-shared", str(kernels), *map(str, machine))))


def _object(text: str, *flags: str) -> Path:
    source = _folder() / f"{_digest(text)}.cpp"
    if not source.is_file():
        _put(source, lambda path: path.write_text(text))
    return _built(".o", *flags, "-g1", "-fPIC", f"-I{_inside(HERE)}", "-c", str(source))


def _built(suffix: str, *arguments: str) -> Path:
    """What the compiler makes of the arguments, which name all that it is made from by content."""
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    path = _folder() / f"{_digest(_compiler_version(), *_sanitizers(), *headers, *arguments)}{suffix}"
    if not path.is_file():
        _put(path, lambda path: _compiled(*_sanitizers(), *arguments, "-o", str(path)))
    return path


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that another process never sees half written."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder) / path.name)
        (Path(folder) / path.name).replace(path)


def _sanitizers() -> tuple[str, ...]:
    if os.environ.get("SELECTRA_EMULATOR_SANITIZE"):
        return ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    return ()


def _checks(watched: bool) -> tuple[str, ...]:
    """Calls at every access that `accesses.cpp` answers; the sanitizer for addresses excludes them."""
    if _sanitizers():
        return ()
    return ("-fsanitize=alignment", "-fsanitize=thread") if watched else ("-fsanitize=alignment",)


def _inside(path: Path) -> str:
    """A path as it is called in every copy of the repository: what was compiled for one serves the others."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _compiled(*arguments: str) -> str:
    command = (_compiler(), *DIALECT, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise EmulatorError("\n".join((" ".join(command), *done.stderr.splitlines()[:40])))
    return done.stdout


@functools.cache
def _compiler_version() -> str:
    return _compiled("--version")


@functools.cache
def _compiler() -> str:
    """Path of the compiler; empty where there is none."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), "")


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"selectra-emulator-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
