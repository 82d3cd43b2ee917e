"""The CUDA driver as the runtime calls it, without a GPU."""

import ctypes
from collections.abc import Callable
from typing import Any

from selectra.ops.cuda import driver

WRONG_CONTEXT = 201


class FakeDriver:
    """The functions of libcuda that the runtime calls: one device with one context, launches are noted."""

    CONTEXT, MODULE, FUNCTION = 0xC0, 0x80, 0xF0

    def __init__(self, version: int = 13000, gpus: int = 1) -> None:
        self.number, self.gpus = version, gpus
        self.contexts: list[int | None] = [self.CONTEXT]
        self.calls: list[str] = []
        self.launches: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.n_words = 2
        self.outcome = 0
        self.during_launch: Callable[[], None] | None = None
        self.modules: list[bytes] = []
        self.shared_allowed: list[int] = []
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self._launch)

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            self.calls.append(name)
            return getattr(self, f"_{name}", lambda *_: 0)(*arguments)

        return function

    def _cuInit(self, _: int) -> int:
        return 0 if self.gpus else 100

    def _cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = self.number
        return 0

    def _cuDeviceGetCount(self, number: Any) -> int:
        number._obj.value = self.gpus
        return 0

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, _: Any) -> int:
        value._obj.value = 232448 if attribute == driver.SHARED_BYTES_OPT_IN else 0
        return 0

    def _cuDevicePrimaryCtxRetain(self, context: Any, _: Any) -> int:
        context._obj.value = self.CONTEXT
        return 0

    def _cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.contexts[-1]
        return 0

    def _cuCtxSetCurrent(self, context: Any) -> int:
        self.contexts[-1] = context.value
        return 0

    def _cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.contexts.append(context.value)
        return 0

    def _cuCtxPopCurrent_v2(self, context: Any) -> int:
        context._obj.value = self.contexts.pop()
        return 0

    def _cuModuleLoadData(self, module: Any, cubin: bytes) -> int:
        self.modules.append(cubin)
        module._obj.value = self.MODULE
        return 0

    def _cuModuleGetFunction(self, function: Any, _: Any, name: bytes) -> int:
        function._obj.value = self.FUNCTION
        return 500 if name == b"absent" else 0

    def _cuFuncGetAttribute(self, value: Any, attribute: int, _: Any) -> int:
        value._obj.value = {driver.FUNCTION_REGISTERS: 96, driver.FUNCTION_MAX_THREADS: 640}.get(attribute, 0)
        return 0

    def _cuFuncSetAttribute(self, _: Any, attribute: int, number: int) -> int:
        assert attribute == driver.FUNCTION_DYNAMIC_SHARED
        self.shared_allowed.append(number)
        return 0

    def _cuFuncGetParamInfo(self, _: Any, __: Any, ___: Any, size: Any) -> int:
        size._obj.value = 8 * self.n_words
        return 0

    def _cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = {1: b"CUDA_ERROR_INVALID_VALUE", 500: b"CUDA_ERROR_NOT_FOUND"}[code]
        return 0

    def _cuGetErrorString(self, _: int, text: Any) -> int:
        text._obj.value = b"in words"
        return 0

    def _launch(self, config: int, function: int, arguments: int, extra: int | None) -> int:
        if self.during_launch is not None:
            hook, self.during_launch = self.during_launch, None
            hook()
        if self.contexts[-1] != self.CONTEXT:
            return WRONG_CONTEXT
        assert (function, extra) == (self.FUNCTION, None)
        head = (ctypes.c_uint32 * 7).from_address(config)
        stream, attributes = (ctypes.c_uint64 * 2).from_address(config + 32)
        n_attributes = ctypes.c_uint32.from_address(config + 48).value
        assert (attributes, n_attributes) == (0, 0)
        words = ctypes.c_uint64.from_address(arguments).value
        self.launches.append(((*head, stream), tuple((ctypes.c_int64 * self.n_words).from_address(words))))
        return self.outcome
