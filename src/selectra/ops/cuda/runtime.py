"""Kernels of this package on a device: compiled at first use, loaded once, launched on torch's current stream.

    kernel("selective_scan/scan_wide.cu", "scan_forward", (("N", 16),), device_index).launch(grid, threads, words)

A kernel takes one struct by value, of 64-bit words alone: `__global__ void name(const __grid_constant__ Call call)`.
"""

import ctypes
import functools
import logging
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from selectra.errors import BackendError
from selectra.ops.cuda import cache, driver
from selectra.ops.cuda.compiler import compile_unit, options, read_unit, version
from selectra.ops.cuda.support import capability

Macros = tuple[tuple[str, str | int], ...]
Value = TypeVar("Value")
# CUlaunchConfig: grid, block and bytes of shared memory; stream; attributes and their number.
CONFIG = "@7I4xQQI4x"
CONFIG_BYTES = struct.calcsize(CONFIG)
WORD_BYTES = 8
# What a block gets without being asked for.
SHARED_BYTES_FOR_ALL = 48 * 1024
SAID_FROM_SECONDS = 1.0
# Blocks of a grid along x, y and z.
MOST_BLOCKS = (2**31 - 1, 65_535, 65_535)
logger = logging.getLogger("selectra")


class Room(NamedTuple):
    """Memory for one call: the launch's configuration, the words, and the pointer to the words."""

    memory: Any
    config: int
    """Address of the configuration."""
    arguments: int
    """Address of the pointer to the words."""


class Kernel:
    """One kernel, loaded on one device.

    Args:
        name: Its name in the source.
        device_index: The device.
        function: The driver's handle.
        context: The device's context.
        shared_bytes: Dynamic shared memory of a block.
        cooperative: Whether all blocks of a launch are at work at once, so that they can wait for each other.
    """

    def __init__(
        self, name: str, device_index: int, function: int, context: int, shared_bytes: int, cooperative: bool = False
    ) -> None:
        self.name = name
        self.device_index = device_index
        self.shared_bytes = shared_bytes
        self.registers = driver.function_attribute(function, driver.FUNCTION_REGISTERS)
        """Registers of a thread."""
        self.local_bytes = driver.function_attribute(function, driver.FUNCTION_LOCAL_BYTES)
        """Bytes of a thread that lie in memory: spilled registers and local arrays."""
        self.max_threads = driver.function_attribute(function, driver.FUNCTION_MAX_THREADS)
        """The most threads of a block."""
        self.parameter_bytes = driver.parameter_bytes(function)
        self._function = function
        self._context = context
        self._launch = driver.launch_function()
        self._stream = torch._C._cuda_getCurrentRawStream
        self._device = torch._C._cuda_getDevice
        self._pack: Callable[..., None] = struct.Struct(CONFIG).pack_into
        attribute = struct.pack(driver.ATTRIBUTE, driver.ATTRIBUTE_COOPERATIVE, 1)
        self._attribute = ctypes.create_string_buffer(attribute, len(attribute))
        # What a launch is told beyond its sizes: where that stands, and how much it is.
        self._told = (ctypes.addressof(self._attribute), 1) if cooperative else (0, 0)
        # Rooms that no call is using. A list gives and takes in one step, so that threads need no lock.
        self._rooms: list[Room] = []

    @property
    def shared_limit(self) -> int:
        """The most bytes of shared memory that a block of this device can have."""
        return shared_limit(self.device_index)

    def launch(self, grid: tuple[int, int, int], threads: int, words: Sequence[int]) -> None:
        """Launch on torch's current stream of the kernel's device.

        Args:
            grid: Blocks along x, y and z.
            threads: Threads of a block.
            words: The struct, word by word.

        Raises:
            BackendError: The driver does not accept the launch.
        """
        index = self.device_index
        try:
            room = self._rooms.pop()
        except IndexError:
            room = self._new_room(len(words))
        memory, config, arguments = room
        try:
            self._pack(memory, 0, *grid, threads, 1, 1, self.shared_bytes, self._stream(index), *self._told, *words)
        except struct.error as error:
            if too_large(grid):
                raise BackendError(f"the kernel {self.name} was not launched: {too_large(grid)}") from error
            raise
        if self._device() == index:
            outcome = self._launch(config, self._function, arguments, None)
        else:
            with driver.within(self._context):
                outcome = self._launch(config, self._function, arguments, None)
        if outcome and driver.current_context() is None:
            # torch names a thread's device before it makes a context current there.
            driver.make_current(self._context)
            outcome = self._launch(config, self._function, arguments, None)
        self._rooms.append(room)
        if outcome:
            raise BackendError(
                f"the kernel {self.name} was not launched: {too_large(grid) or driver.error_words(outcome)}; grid "
                f"{grid}, {threads} threads of at most {self.max_threads}, {self.shared_bytes} bytes of shared memory"
            )

    def _new_room(self, n_words: int) -> Room:
        assert self.parameter_bytes in (None, n_words * WORD_BYTES)
        # n and not q: the same 64 bits, but addresses are read in a third of the time.
        layout = struct.Struct(f"{CONFIG}{n_words}n")
        self._pack = layout.pack_into
        memory = ctypes.create_string_buffer(layout.size + WORD_BYTES)
        config = ctypes.addressof(memory)
        struct.pack_into("@Q", memory, layout.size, config + CONFIG_BYTES)
        return Room(memory, config, config + layout.size)


def too_large(grid: tuple[int, int, int]) -> str:
    """What is wrong with a grid that no device takes; nothing where it fits. Looked at once a launch has failed."""
    beyond = [
        f"{blocks:,} blocks along {axis}, of at most {most:,}"
        for axis, blocks, most in zip("xyz", grid, MOST_BLOCKS, strict=True)
        if blocks > most
    ]
    return f"{' and '.join(beyond)}; take a smaller batch, or fewer groups or heads" if beyond else ""


def kernel(
    source: str, name: str, defines: Macros, device_index: int, shared_bytes: int = 0, cooperative: bool = False
) -> Kernel:
    """A kernel, ready to be launched; compiled and loaded at the first call with these arguments.

    Args:
        source: A path inside `selectra/ops`, such as "selective_scan/scan_wide.cu".
        name: The kernel's name in it.
        defines: Names and values of macros.
        device_index: The device; `refusal` knows nothing against it.
        shared_bytes: Dynamic shared memory of a block.
        cooperative: Whether all blocks of a launch are at work at once, so that they can wait for each other. A launch
            of more than the device holds fails.

    Raises:
        BackendError: The source does not compile, has no such kernel, or asks for more than the device has.
    """
    key = (source, name, defines, device_index, shared_bytes, cooperative)
    found = _kernels.made.get(key)
    return _kernels.get(key, lambda: _load(*key)) if found is None else found


@functools.cache
def multiprocessors(device_index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@functools.cache
def shared_limit(device_index: int) -> int:
    """The most bytes of shared memory that a block of a device can have."""
    return driver.device_attribute(device_index, driver.SHARED_BYTES_OPT_IN)


@functools.cache
def is_cooperative(device_index: int) -> bool:
    """Whether a device can have all blocks of a launch at work at once."""
    return bool(driver.device_attribute(device_index, driver.COOPERATIVE_LAUNCH))


class Once(Generic[Value]):
    """Values by key, each made once, however many threads ask; different ones are made side by side."""

    def __init__(self) -> None:
        self.made: dict[Any, Value] = {}
        self._lock = threading.Lock()
        self._locks: dict[Any, threading.Lock] = {}

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value of a key; `make` makes it where there is none."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.made:
                self.made[key] = make()
            return self.made[key]


_kernels: Once[Kernel] = Once()
_modules: Once[int] = Once()
_cubins: Once[bytes] = Once()


def _load(source: str, name: str, defines: Macros, device_index: int, shared_bytes: int, cooperative: bool) -> Kernel:
    limit = shared_limit(device_index)
    if shared_bytes > limit:
        raise BackendError(
            f"the kernel {name} asks for {shared_bytes} bytes of shared memory, a block of cuda:{device_index} has "
            f"{limit} at most"
        )
    major, minor = capability(device_index)
    cubin = load_or_compile(source, defines, f"sm_{major}{minor}")
    context = driver.primary_context(device_index)
    with driver.within(context):
        module = _modules.get((source, defines, device_index), lambda: driver.load_module(cubin))
        function = driver.find_function(module, name)
        _allow_shared_bytes(function, shared_bytes)
        return Kernel(name, device_index, function, context, shared_bytes, cooperative)


def _allow_shared_bytes(function: int, shared_bytes: int) -> None:
    """Let a kernel have so much; what it was allowed for another size of call stays allowed."""
    with _allowing:
        if shared_bytes > _allowed.get(function, SHARED_BYTES_FOR_ALL):
            driver.allow_shared_bytes(function, shared_bytes)
            _allowed[function] = shared_bytes


# By the driver's handles.
_allowed: dict[int, int] = {}
_allowing = threading.Lock()


def load_or_compile(source: str, defines: Macros, arch: str) -> bytes:
    """The cubin of a source for an architecture: from this process, from the disk, or compiled now."""
    return _cubins.get((source, defines, arch), lambda: _from_disk_or_compiled(source, defines, arch))


def _from_disk_or_compiled(source: str, defines: Macros, arch: str) -> bytes:
    unit, told = read_unit(source), options(defines, arch)
    name = cache.file_name(unit, told, version())
    kept = cache.read(name)
    if kept is not None:
        return kept
    begun = time.perf_counter()
    cubin = compile_unit(unit, told)
    _say_first_use(source, arch, time.perf_counter() - begun, cache.write(name, cubin))
    return cubin


def _say_first_use(source: str, arch: str, seconds: float, file: Any) -> None:
    """Explain the first pause; those that follow are of the same kind."""
    if seconds < SAID_FROM_SECONDS or _said:
        return
    _said.append(source)
    where = "this process alone" if file is None else f"later uses in '{file.parent}'"
    logger.info("The CUDA kernels of %s were compiled for %s in %.1f s, for %s.", source, arch, seconds, where)


_said: list[str] = []
