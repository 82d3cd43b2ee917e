"""What a kernel found wrong with its numbers, told at the next call.

Looking at A before every call would stop the device each time. Kernels set a word in the host's memory instead, which
the next call reads; the results of such a channel are not-a-number until then.
"""

import ctypes
import threading

from selectra.errors import BackendError
from selectra.ops.cuda import driver

# For every device, and mapped into its memory.
PORTABLE_AND_MAPPED = 1 | 2


class Fault:
    """One word that kernels on any device set to 1 where A is not finite.

    Args:
        address: Where it lies; the same for the host and for all devices.
    """

    def __init__(self, address: int) -> None:
        self.address = address
        self.word = ctypes.c_int.from_address(address)

    def report(self) -> None:
        """Raise what an earlier call has left.

        Raises:
            BackendError: A held infinities or not-a-numbers.
        """
        self.word.value = 0
        raise BackendError(
            "selective_scan: A held infinite or not-a-number values in an earlier call on the GPU, whose results are "
            "not-a-number there; A must be finite, and negative for a state that decays."
        )


class _Faults:
    """The words, made at the first call; they live as long as the process, since kernels may run until its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._host_word = ctypes.c_int(0)
        self._of_devices: Fault | None = None
        self._of_host = Fault(ctypes.addressof(self._host_word))

    def of(self, device_index: int) -> Fault:
        """The word for kernels on a device; -1 is the host."""
        if device_index < 0:
            return self._of_host
        with self._lock:
            if self._of_devices is None:
                self._of_devices = Fault(_allocate(device_index))
            return self._of_devices


def _allocate(device_index: int) -> int:
    address, mode = ctypes.c_void_p(), ctypes.c_int(driver.CAPTURE_RELAXED)
    with driver.within(driver.primary_context(device_index)):
        # While a graph is captured, allocations are refused unless the thread says that they may wait for the device.
        driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            driver.call(
                "cuMemHostAlloc",
                ctypes.byref(address),
                ctypes.c_size_t(ctypes.sizeof(ctypes.c_int)),
                ctypes.c_uint(PORTABLE_AND_MAPPED),
            )
        finally:
            driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    assert address.value is not None
    ctypes.c_int.from_address(address.value).value = 0
    return address.value


faults = _Faults()
