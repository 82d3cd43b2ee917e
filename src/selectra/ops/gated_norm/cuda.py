"""The `cuda` backend of `gated_norm`: kernels compiled for the call's types and sizes at its first use."""

import struct
from typing import Any

import torch
from torch import Tensor

from selectra.ops import cuda
from selectra.ops.gated_norm.call import GatedCall
from selectra.ops.transforms import needs_operators

SOURCE = "gated_norm/gated_norm.cu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WARP, MOST_THREADS, VECTOR, MOST_CHUNKS, FLOAT_BYTES = 32, 512, 4, 8, 4
# Blocks of the backward that a multiprocessor has at once, in threads.
RESIDENT_THREADS = 1024


def refuse(call: GatedCall) -> str | None:
    """Why these kernels do not take `call`, or None."""
    y, z = call.y, call.z
    if not y.is_cuda:
        return f"tensors are on {y.device.type}, it needs cuda"
    if y.dtype != torch.float32 or z.dtype not in TYPES or (call.x is not None and call.x.dtype != z.dtype):
        return "it takes y in float32, and x and z in one type of float32, bfloat16 and float16"
    if z.shape[-1] // call.n_groups > MOST_THREADS * MOST_CHUNKS or y.numel() == 0:
        return f"it takes groups of 1 to {MOST_THREADS * MOST_CHUNKS} channels, and a row at least"
    if needs_operators(call.tensors):
        return "a compiler, a transform or a mode has to see its operations"
    return cuda.refusal(y.device.index)


def run(call: GatedCall) -> Tensor:
    """The gated and normalised sum."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors):
        return _GatedNorm.apply(call, *call.tensors)  # pyright: ignore[reportReturnType]
    return forward(call)[0]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: GatedCall, *tensors: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, scale = forward(call)
        ctx.save_for_backward(*tensors, scale)
        ctx.rest = call[len(tensors) :]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, scale = ctx.saved_tensors
        return (None, *backward(GatedCall(*tensors, *ctx.rest), scale, dout))


def forward(call: GatedCall) -> tuple[Tensor, Tensor]:
    """The result, and one over the root of the mean square of every row's groups."""
    call = _laid_out(call)
    rows = _sizes(call)[0]
    out = torch.empty(call.z.shape, dtype=call.z.dtype, device=call.z.device)
    scale = call.y.new_empty((rows, call.n_groups))
    kernel, threads = _kernel("gated_norm_forward", call, (out,))
    words = (*_words(call), *_pointers(out, scale), _bits(call.eps), *[0] * 6)
    kernel.launch((rows, call.n_groups, 1), threads, words)
    return out, scale


def backward(call: GatedCall, scale: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of y, z, weight, x and D."""
    given, call, dout = call, _laid_out(call), dout.contiguous()
    rows, width = _sizes(call)
    d = width * call.n_groups
    dy, dz = torch.empty_like(call.y), torch.empty(call.z.shape, dtype=call.z.dtype, device=dout.device)
    dx = None if call.x is None else torch.empty_like(dz)
    kernel, threads = _kernel("gated_norm_backward", call, (dy, dz, dout))
    at_once = max(RESIDENT_THREADS // threads, 1) * cuda.multiprocessors(dy.get_device())
    blocks = min(rows, -(-at_once // call.n_groups))
    dweight = dy.new_empty((blocks, d))
    dD = None if call.D is None else dy.new_empty((blocks, d))
    words = (*_words(call), 0, scale.data_ptr(), _bits(call.eps), *_pointers(dout, dy, dz, dx, dweight, dD))
    kernel.launch((blocks, call.n_groups, 1), threads, words)
    # As they came.
    dskip = None if dD is None or given.D is None else dD.sum(0).view(given.D.shape[0], -1).sum(1).to(given.D.dtype)
    return dy, dz, dweight.sum(0).to(given.weight.dtype), dx, dskip


def _laid_out(call: GatedCall) -> GatedCall:
    """The same with tensors that kernels can read: y whole, rows of z and x at one distance, parameters in float32."""
    z, x = (None if tensor is None else _rows(tensor) for tensor in (call.z, call.x))
    assert z is not None
    D = None if call.D is None else call.D.float().contiguous()
    return call._replace(y=call.y.contiguous(), z=z, x=x, D=D, weight=call.weight.float().contiguous())


def _rows(x: Tensor) -> Tensor:
    """Its rows one behind the other at one distance, and whole each."""
    outer, inner = x.stride()[:-2], x.stride()[1:-1]
    even = all(a == b * size for a, b, size in zip(outer, inner, x.shape[1:-1], strict=True))
    return x if even and x.stride(-1) == 1 else x.contiguous()


def _sizes(call: GatedCall) -> tuple[int, int]:
    d = call.z.shape[-1]
    return call.z.numel() // d, d // call.n_groups


def _words(call: GatedCall) -> tuple[int, ...]:
    rows, width = _sizes(call)
    head = width if call.D is None else call.z.shape[-1] // call.D.shape[0]
    strides = (_stride(call.z), 0 if call.x is None else _stride(call.x))
    return (
        rows, width, call.n_groups, head, *_pointers(call.y, call.z, call.x), *strides,
        *_pointers(call.D, call.weight),
    )  # fmt: skip


def _stride(x: Tensor) -> int:
    return x.stride(-2) if x.dim() > 1 else x.shape[-1]


def _pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def _bits(x: float) -> int:
    """The bits of a number in float32."""
    return struct.unpack("I", struct.pack("f", x))[0]


def _kernel(name: str, call: GatedCall, others: tuple[Tensor, ...]) -> tuple[cuda.Kernel, int]:
    """The kernel for a call, and its threads."""
    width = _sizes(call)[1]
    strided = [x for x in (call.z, call.x) if x is not None]
    fits = width % VECTOR == 0 and all(_stride(x) % VECTOR == 0 for x in strided)
    whole = (call.y, call.weight, *others, *strided)
    vector = VECTOR if fits and all(x.data_ptr() % (VECTOR * x.element_size()) == 0 for x in whole) else 1
    pieces = -(-width // vector)
    threads = min(WARP * -(-pieces // WARP), MOST_THREADS)
    macros = (
        ("TYPE", TYPES[call.z.dtype]),
        ("VECTOR", vector),
        ("CHUNKS", -(-pieces // threads)),
        ("THREADS", threads),
        ("SKIP", int(call.x is not None)),
    )
    return cuda.kernel(SOURCE, name, macros, call.y.get_device(), threads // WARP * FLOAT_BYTES), threads
