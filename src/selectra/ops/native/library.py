"""The compiled library: where it lies, whether it can be used here, and one call of it.

The library is C++ with a plain C interface on data pointers. It links neither Python nor torch and is called by
ctypes, which lets other Python threads run meanwhile. `call.h` says what the words of a call mean.
"""

import ctypes
import difflib
import importlib
import importlib.resources
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# torch comes first, so that the library shares the OpenMP that torch has loaded.
import torch
from torch import Tensor

from selectra.errors import BackendError, ConfigError
from selectra.ops.native.intact import damage

LIBRARY_VARIABLE = "SELECTRA_NATIVE_LIBRARY"
ISA_VARIABLE = "SELECTRA_CPU_ISA"
ABI_VERSION = 5
FILE_NAMES = ("libselectra_cpu.so", "libselectra_cpu.dylib", "libselectra_cpu.dll")
NOT_BUILT = (
    "no compiled library in this installation; a C++ compiler when running pip install, "
    "or a wheel for this platform, brings it"
)
NO_AVX2 = "this processor has no AVX2, with which a scan takes about half as long; the baseline build runs"
FUNCTIONS = (
    "scan_forward",
    "scan_backward",
    "conv_forward",
    "conv_backward",
    "step",
    "cross_forward",
    "cross_backward",
    "rate",
)
QUERIES = ("chunk", "build_count", "build_name", "build_runs", "lanes", "large_pages", "round_vectors")
OUT_OF_MEMORY, BAD_BORDERS = 1, 2
ABSENT = (0, 0, 0, 0, 0, 0, 0)
PADDING = ((), (0, 0, 0, 0), (0, 0, 0), (0, 0), (0,), ())
WHOLE, HALVED = 0, 1
LARGE_BYTES = 1 << 21
"""As much as one large page holds."""
logger = logging.getLogger("selectra")


@dataclass(frozen=True)
class NativeStatus:
    """What there is of the compiled library, for `selectra doctor` and for refusals."""

    available: bool
    path: str | None = None
    """The file that was found, usable or not."""
    isa: str | None = None
    """The instruction set that calls use."""
    isas_built: tuple[str, ...] = ()
    threads: int = 1
    """Threads that a large call would use now."""
    problem: str | None = None
    """Why it cannot be used, and what would help."""
    refuses_wish: bool = False
    """Whether the problem is what SELECTRA_CPU_ISA asks for: a call on the CPU then raises it."""
    note: str | None = None
    """What makes it slower here than elsewhere."""


class Library:
    """A loaded library of the right version.

    Args:
        handle: The loaded file.
        path: Where it was found.
    """

    def __init__(self, handle: ctypes.CDLL, path: str) -> None:
        self.path = path
        self.chunk: int = handle.selectra_cpu_chunk()
        self.round_vectors: int = handle.selectra_cpu_round_vectors()
        name = handle.selectra_cpu_build_name
        name.restype = ctypes.c_char_p
        self.isas = tuple(name(build).decode() for build in range(handle.selectra_cpu_build_count()))
        self.runs = tuple(bool(handle.selectra_cpu_build_runs(build)) for build in range(len(self.isas)))
        self.build = max(build for build, runs in enumerate(self.runs) if runs)
        self._lanes = handle.selectra_cpu_lanes
        self._large_pages = handle.selectra_cpu_large_pages
        self._large_pages.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self._large_pages.restype = None
        self._functions = {}
        for function in FUNCTIONS:
            entry = getattr(handle, f"selectra_cpu_{function}")
            entry.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64))
            self._functions[function] = entry

    def lanes(self, dtype: torch.dtype) -> int:
        """Channels in a vector of the instruction set in use."""
        return self._lanes(self.build, int(dtype == torch.float64))

    def room(self, shape: Sequence[int], dtype: torch.dtype, zeros: bool = False) -> Tensor:
        """A new tensor for a kernel to write.

        Large ones ask the system for large pages: the first write to a page of fresh memory makes the system fetch and
        clear it, which with pages of 4 KiB takes as long as a whole call's arithmetic.

        Args:
            shape: Its sizes.
            dtype: The type of its numbers.
            zeros: Whether it has to be zero, where a kernel leaves places out.
        """
        tensor = self.in_large_pages(torch.empty(shape, dtype=dtype, device="cpu"))
        return tensor.zero_() if zeros else tensor

    def in_large_pages(self, tensor: Tensor) -> Tensor:
        """The same new tensor, large pages asked for as in `room`."""
        if tensor.nbytes >= LARGE_BYTES:
            self._large_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def call(self, function: str, dtype: torch.dtype, words: list[int]) -> None:
        """Run one kernel on the words of `call.h`.

        Raises:
            ConfigError: `cu_seqlens` does not rise from 0 to the length.
            MemoryError: There is no room for the kernel's scratch memory.
        """
        self._run(function, dtype, (ctypes.c_int64 * len(words))(*words))

    def call_packed(self, function: str, dtype: torch.dtype, words: bytes) -> None:
        """As `call`, with words that are packed already."""
        self._run(function, dtype, (ctypes.c_int64 * (len(words) // 8)).from_buffer_copy(words))

    def _run(self, function: str, dtype: torch.dtype, words: "ctypes.Array[ctypes.c_int64]") -> None:
        outcome = self._functions[function](self.build, int(dtype == torch.float64), words)
        if outcome == BAD_BORDERS:
            raise ConfigError("cu_seqlens must begin with 0, never fall, and end with the length.")
        if outcome == OUT_OF_MEMORY:
            raise MemoryError(f"No memory for the scratch space of {function}.")


def operand(tensor: Tensor | None) -> tuple[int, ...]:
    """The words of one tensor: address, strides padded to four, storage, and 0 for a line; zeros for None."""
    if tensor is None:
        return ABSENT
    stride = tensor.stride()
    storage = HALVED if tensor.dtype == torch.bfloat16 else WHOLE
    return (tensor.data_ptr(), *stride, *PADDING[len(stride) + 1], storage, 0)


def readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor with numbers as a kernel that computes in `dtype` reads and writes them, where it takes bfloat16 too."""
    return tensor if is_readable(tensor.dtype, dtype) else tensor.to(dtype)


def is_readable(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a kernel that computes in `dtype` reads and writes numbers that are stored in `stored`."""
    return stored == dtype or (stored == torch.bfloat16 and dtype == torch.float32)


def n_sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    """How many sequences a call holds: one in each row of the batch, or those that are packed."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def threads() -> int:
    """Threads that a call may use: torch's setting, or one in a forked child, where OpenMP's threads are gone."""
    return 1 if _state.forked else torch.get_num_threads()


def library() -> Library:
    """The loaded library; only for callers that `status` told it is available."""
    status()
    assert _state.library is not None
    return _state.library


def status() -> NativeStatus:
    """Look for the library at the first call, and say what was found."""
    if not _state.looked:
        _state.looked = True
        _state.path, _state.library, _state.problem = _look()
        _announce()
    found = _state.library
    if found is None:
        return NativeStatus(False, path=_state.path, problem=_state.problem)
    usable = _state.problem is None
    return NativeStatus(
        usable,
        path=found.path,
        isa=found.isas[found.build] if usable else None,
        isas_built=found.isas,
        threads=threads(),
        problem=_state.problem,
        refuses_wish=not usable,
        note=_note(found),
    )


def refusal(known: NativeStatus) -> str | None:
    """Why no call can run on the compiled kernels, or None.

    Raises:
        BackendError: SELECTRA_CPU_ISA asks for an instruction set that there is not.
    """
    if known.refuses_wish:
        raise BackendError(known.problem)
    return known.problem


def _note(found: Library) -> str | None:
    """What to know of a library that this processor runs in its narrowest build alone."""
    return NO_AVX2 if len(found.isas) > 1 and not any(found.runs[1:]) else None


def _announce() -> None:
    """Say once a process what makes calls slower, or other than they would be by themselves."""
    if _state.library is None or _state.problem is not None:
        return
    asked, note = os.environ.get(ISA_VARIABLE), _note(_state.library)
    if asked:
        logger.warning("%s is set: %s", ISA_VARIABLE, asked)
    if note is not None:
        logger.warning("Compiled CPU kernels: %s.", note)


class _State:
    """What this process knows of the library."""

    looked = False
    path: str | None = None
    library: Library | None = None
    problem: str | None = None
    forked = False


_state = _State()


def _note_fork() -> None:
    _state.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _look() -> tuple[str | None, Library | None, str | None]:
    """The library's path, the library, and what is wrong."""
    path = _find()
    if path is None:
        return None, None, NOT_BUILT
    loaded = _load(path)
    if isinstance(loaded, str):
        return str(path), None, loaded
    return str(path), loaded, _choose_isa(loaded, os.environ.get(ISA_VARIABLE))


def _find() -> Path | None:
    asked = os.environ.get(LIBRARY_VARIABLE)
    if asked:
        # The system's loader would look for a bare name in its own folders.
        return Path(asked).resolve()
    return next((file for folder in _folders() for name in FILE_NAMES if (file := folder / name).is_file()), None)


def _folders() -> Iterator[Path]:
    """Where the package's files lie: an editable install keeps compiled ones away from the Python files."""
    package = __spec__.parent if __spec__ is not None else None
    assert package is not None
    module = importlib.import_module(package)
    yield from (Path(entry) for entry in module.__path__)
    root = importlib.resources.files(package)
    if isinstance(root, Path):
        yield root


def _load(path: Path) -> Library | str:
    """The library, or why it cannot be used."""
    problem = _problem_of_file(path)
    if problem is None:
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            problem = f"the file '{path}' cannot be loaded ({error})"
        else:
            problem = _problem_of_interface(handle, path)
            if problem is None:
                return Library(handle, str(path))
    return f"{problem}. Install selectra again, or point {LIBRARY_VARIABLE} at a whole library of this version."


def _problem_of_file(path: Path) -> str | None:
    """Why a file cannot be loaded, as far as that is seen without trying: a damaged one may crash the process."""
    try:
        if not path.is_file():
            return f"there is no file '{path}', which {LIBRARY_VARIABLE} names"
        fault = damage(path.read_bytes())
    except OSError as error:
        return f"the file '{path}' cannot be read ({error.strerror})"
    return None if fault is None else f"the file '{path}' is damaged: {fault}"


def _problem_of_interface(handle: ctypes.CDLL, path: Path) -> str | None:
    """Why a file that was loaded is not the library that this package calls."""
    if not hasattr(handle, "selectra_cpu_abi_version"):
        return f"the file '{path}' is not Selectra's library"
    version = handle.selectra_cpu_abi_version()
    if version != ABI_VERSION:
        return f"the file '{path}' is of interface version {version}, this package needs {ABI_VERSION}"
    absent = [name for name in (*QUERIES, *FUNCTIONS) if not hasattr(handle, f"selectra_cpu_{name}")]
    return f"the file '{path}' is incomplete: it lacks selectra_cpu_{absent[0]}" if absent else None


def _choose_isa(loaded: Library, asked: str | None) -> str | None:
    """Use the instruction set that was asked for; what is wrong with the wish, if anything."""
    if not asked:
        return None
    can = [isa for isa, runs in zip(loaded.isas, loaded.runs, strict=True) if runs]
    if asked not in loaded.isas:
        nearest = difflib.get_close_matches(asked, loaded.isas, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        return f"{ISA_VARIABLE}='{asked}' is no instruction set of this library; it has {', '.join(can)}.{hint}"
    if asked not in can:
        return f"{ISA_VARIABLE}='{asked}' is not supported by this processor; it runs {', '.join(can)}."
    loaded.build = loaded.isas.index(asked)
    return None
