"""The CUDA kernels of `add_norm` as an operator of PyTorch; the other backends are PyTorch's own functions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from selectra.ops.add_norm import cuda
from selectra.ops.add_norm.call import NormCall
from selectra.ops.autocast import keep_types_under_autocast
from selectra.ops.transforms import is_batched, needs_dispatcher, refuse_tangents, refuse_transforms, register_refusals

FLAGS = "float eps, bool centred, ScalarType residual_dtype, str backend"
N_TENSORS = 4

library = torch.library.Library("selectra", "FRAGMENT")
library.define(
    f"add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {FLAGS}) -> (Tensor, Tensor, Tensor)"
)
# `backend` is "cuda": records find out by its name what ran.
# Of the residual's gradient an empty tensor is given where it is that of x.
library.define(
    "add_norm_backward(Tensor dy, Tensor? dsum, Tensor total, Tensor stats, Tensor? weight, Tensor? bias, "
    "bool centred, ScalarType x_dtype, ScalarType? residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)


def run(call: NormCall) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum. A plain call goes to its kernel without PyTorch's dispatcher, as in the scan."""
    tensors = call.tensors
    if needs_dispatcher(tensors):
        refuse_transforms("add_norm", tensors)
        y, total, _ = torch.ops.selectra.add_norm(*call, "cuda")
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return run_with_gradient(call)
    else:
        y, total, _ = cuda.forward(call)
    return y, total if cuda.keeps(call) else call.x


def run_with_gradient(call: NormCall) -> tuple[Tensor, Tensor]:
    """A plain call with a gradient."""
    found = _AddNorm.apply(call[N_TENSORS:], *call.tensors)
    return found if cuda.keeps(call) else (found, call.x)  # pyright: ignore[reportReturnType]


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flags: tuple[Any, ...], *tensors: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call = NormCall._make((*tensors, *flags))
        y, total, stats = cuda.forward(call)
        _save(ctx, call, total, stats)
        return (y, total) if ctx.keeps else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # A gradient that shall have one itself is refused in words by the registration.
        # Checkpointing gives what was saved once.
        saved = ctx.saved_tensors
        direct = not (torch.is_grad_enabled() or needs_dispatcher((dy, dsum, *saved)))
        direct = direct and not (is_batched(dy) or is_batched(dsum))
        backward = cuda.backward if direct else torch.ops.selectra.add_norm_backward
        return (None, *_gradients(ctx, saved, dy, dsum, backward))


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = NormCall._make(args[:-1])
    cuda.require_cuda(call.tensors)
    return cuda.forward(call)


def _backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    cuda.require_cuda((dy, *args[:5]))
    grads = cuda.backward(dy, *args)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


library.impl("add_norm", _forward, "CompositeExplicitAutograd")
library.impl("add_norm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("selectra::add_norm", lib=library)
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = NormCall._make(args[:-1])
    x = call.x
    total = x.new_empty(x.shape if cuda.keeps(call) else (0,), dtype=call.residual_dtype)
    stats = x.new_empty((1 + call.centred, x.numel() // x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), total, stats


@torch.library.register_fake("selectra::add_norm_backward", lib=library)
def _backward_fake(
    dy: Tensor, dsum: Any, total: Any, stats: Any, weight: Any, bias: Any, centred: bool, x_dtype: Any, residual: Any
) -> tuple[Tensor, ...]:
    apart = residual not in (None, x_dtype)
    return (
        dy.new_empty(dy.shape, dtype=x_dtype),
        dy.new_empty(dy.shape, dtype=residual) if apart else dy.new_empty(0),
        *(dy.new_empty(0) if like is None else like.new_empty(like.shape) for like in (weight, bias)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, NormCall._make(inputs[:-1]), *output[1:])
    ctx.mark_non_differentiable(output[2])


def _save(ctx: Any, call: NormCall, total: Tensor, stats: Tensor) -> None:
    ctx.keeps = cuda.keeps(call)
    ctx.save_for_backward(total if ctx.keeps else call.x, stats, call.weight, call.bias)
    ctx.set_materialize_grads(False)
    ctx.flags = (call.centred, call.x.dtype, None if call.residual is None else call.residual.dtype)


def _autograd(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grads = _gradients(ctx, ctx.saved_tensors, dy, dsum, torch.ops.selectra.add_norm_backward)
    return (*grads, None, None, None, None)


def _gradients(
    ctx: Any,
    saved: Sequence[Any],
    dy: Tensor | None,
    dsum: Tensor | None,
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual, weight and bias, None for those that are None."""
    total, stats, weight, bias = saved
    refuse_tangents("add_norm", (dy, dsum, total))
    centred, x_dtype, residual_dtype = ctx.flags
    if dy is None:
        dy = total.new_zeros(total.shape, dtype=x_dtype)
    # Without a sum of its own the stream's gradient goes to x past this operator.
    dsum = dsum if ctx.keeps else None
    dx, dresidual, dweight, dbias = backward(dy, dsum, total, stats, weight, bias, centred, x_dtype, residual_dtype)
    if residual_dtype is None:
        dresidual = None
    elif residual_dtype == x_dtype:
        dresidual = dx
    return dx, dresidual, None if weight is None else dweight, None if bias is None else dbias


torch.library.register_autograd("selectra::add_norm", _autograd, setup_context=_setup_context, lib=library)


register_refusals(library, "add_norm")
for _name in ("add_norm", "add_norm_backward"):
    keep_types_under_autocast(library, _name)


@register_flop_formula(torch.ops.selectra.add_norm)
def _flops(x: Any, *_: Any, **__: Any) -> int:
    """None: element by element, as PyTorch counts its own norms."""
    return 0


@register_flop_formula(torch.ops.selectra.add_norm_backward)
def _flops_backward(*_: Any, **__: Any) -> int:
    """None, as above."""
    return 0
