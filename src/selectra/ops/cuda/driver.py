"""The CUDA driver's library, called by ctypes.

One call of a launch takes a third of the host time that it takes through cuda-bindings, since the whole call goes as
two blocks of memory instead of eleven arguments. Contexts are torch's: the primary one of each device.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator

from selectra.errors import BackendError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
SUCCESS = 0
# Of CUdevice_attribute, CUfunction_attribute and CUstreamCaptureMode.
SHARED_BYTES_OPT_IN, COOPERATIVE_LAUNCH = 97, 95
FUNCTION_MAX_THREADS, FUNCTION_STATIC_SHARED, FUNCTION_LOCAL_BYTES, FUNCTION_REGISTERS = 0, 1, 3, 4
FUNCTION_DYNAMIC_SHARED = 8
CAPTURE_RELAXED = 2
# Of CUlaunchAttributeID, and a CUlaunchAttribute's layout: the number, and a value of 64 bytes.
ATTRIBUTE_COOPERATIVE, ATTRIBUTE = 2, "@i4xi60x"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The driver's library, or None where no driver is installed."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def call(function: str, *arguments: object) -> None:
    """Call a function of the driver.

    Raises:
        BackendError: It fails; the message holds the driver's word for the fault.
    """
    library = load()
    assert library is not None
    outcome = getattr(library, function)(*arguments)
    if outcome != SUCCESS:
        raise BackendError(f"the CUDA driver's {function} failed: {error_words(outcome)}")


def error_words(code: int) -> str:
    """What the driver calls an error."""
    library = load()
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    if library is None or library.cuGetErrorName(code, ctypes.byref(name)) != SUCCESS or name.value is None:
        return f"error {code}"
    library.cuGetErrorString(code, ctypes.byref(text))
    return f"{name.value.decode()} ({(text.value or b'').decode()})"


def version() -> tuple[int, int]:
    """The newest CUDA that the driver supports."""
    number = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def sees_gpu() -> bool:
    """Whether the driver is there and shows this process a GPU. Makes no context."""
    library, number = load(), ctypes.c_int()
    if library is None or library.cuInit(0) != SUCCESS:
        return False
    return library.cuDeviceGetCount(ctypes.byref(number)) == SUCCESS and number.value > 0


@functools.cache
def primary_context(device_index: int) -> int:
    """The context that torch uses on a device; kept for the life of the process."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), device_index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    assert context.value is not None
    return context.value


def current_context() -> int | None:
    """The context that is current in this thread, if any."""
    context = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(context))
    return context.value


def make_current(context: int) -> None:
    """Make a context current in this thread."""
    call("cuCtxSetCurrent", ctypes.c_void_p(context))


@contextlib.contextmanager
def within(context: int) -> Iterator[None]:
    """Have a context current in this thread inside the block, and what was before after it."""
    call("cuCtxPushCurrent_v2", ctypes.c_void_p(context))
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def load_module(cubin: bytes) -> int:
    """Load machine code into the current context, also while this thread or another captures a graph."""
    module, mode = ctypes.c_void_p(), ctypes.c_int(CAPTURE_RELAXED)
    # A capture forbids calls that may wait for the device; loading does not touch the captured stream.
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        call("cuModuleLoadData", ctypes.byref(module), cubin)
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    assert module.value is not None
    return module.value


def find_function(module: int, name: str) -> int:
    """A kernel of a module."""
    function, mode = ctypes.c_void_p(), ctypes.c_int(CAPTURE_RELAXED)
    # Modules are loaded lazily: here at last.
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        call("cuModuleGetFunction", ctypes.byref(function), ctypes.c_void_p(module), name.encode())
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    assert function.value is not None
    return function.value


def function_attribute(function: int, attribute: int) -> int:
    """A property of a kernel."""
    value = ctypes.c_int()
    call("cuFuncGetAttribute", ctypes.byref(value), attribute, ctypes.c_void_p(function))
    return value.value


def allow_shared_bytes(function: int, number: int) -> None:
    """Let a kernel be launched with this much dynamic shared memory."""
    call("cuFuncSetAttribute", ctypes.c_void_p(function), FUNCTION_DYNAMIC_SHARED, number)


def device_attribute(device_index: int, attribute: int) -> int:
    """A property of a device."""
    device, value = ctypes.c_int(), ctypes.c_int()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), device_index)
    call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value


@functools.cache
def launch_function() -> Callable[..., int]:
    """`cuLaunchKernelEx`: addresses of the configuration, the kernel and the pointers to its parameters, and None.

    Other Python threads run meanwhile: the driver waits where its queue is full.
    """
    library = load()
    assert library is not None
    function = library.cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p,) * 4
    return function


def parameter_bytes(function: int) -> int | None:
    """The size of a kernel's first parameter; None where the driver is too old to say (before CUDA 12.4)."""
    ask = getattr(load(), "cuFuncGetParamInfo", None)
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    if ask is None or ask(ctypes.c_void_p(function), ctypes.c_size_t(0), ctypes.byref(offset), ctypes.byref(size)):
        return None
    return size.value
