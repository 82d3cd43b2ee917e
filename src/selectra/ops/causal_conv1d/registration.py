"""The causal convolution as an operator of PyTorch; as `selective_scan/registration.py`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from selectra.ops import checks
from selectra.ops.autocast import keep_types_under_autocast
from selectra.ops.causal_conv1d import cpu, cuda, portable
from selectra.ops.causal_conv1d.call import ConvCall
from selectra.ops.dispatch import say_slow_path
from selectra.ops.transforms import is_batched, needs_dispatcher, refuse_tangents, refuse_transforms, register_refusals

TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? mask, Tensor? cu_seqlens"
N_DIFFERENTIABLE, N_TENSORS = 4, 6

library = torch.library.Library("selectra", "FRAGMENT")
library.define(f"causal_conv1d({TENSORS}, bool silu, bool reverse, str backend) -> (Tensor, Tensor)")
library.define(
    f"causal_conv1d_backward(Tensor dy, Tensor? dfinal, {TENSORS}, bool silu, bool reverse, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class Kernel(NamedTuple):
    """What a registered backend provides."""

    forward: Callable[[ConvCall], tuple[Tensor, Tensor | None]]
    """y, and the final state, which may be None where the call does not ask for it."""
    backward: Callable[[ConvCall, Tensor, Tensor | None], tuple[Tensor | None, ...]]
    needs: Literal["cpu", "cuda"] | None = None
    direct: bool = False
    """Whether a plain call may go past PyTorch's dispatcher."""


def _cuda_forward(call: ConvCall) -> tuple[Tensor, Tensor | None]:
    return cuda.forward(*call)


def _cuda_backward(call: ConvCall, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    return cuda.backward(dy, dfinal, *call[:-1])


def _cpu_forward(call: ConvCall) -> tuple[Tensor, Tensor]:
    return cpu.forward(*call[:-1])


def _cpu_backward(call: ConvCall, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor, ...]:
    return cpu.backward(dy, _state_gradient(call, dfinal), *call[:-1])


def _portable_backward(call: ConvCall, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    return portable.backward(call, dy, _state_gradient(call, dfinal))


def _state_gradient(call: ConvCall, dfinal: Tensor | None) -> Tensor:
    """The gradient of the final state; zeros where nobody used that state."""
    if dfinal is not None:
        return dfinal
    n_states = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return call.weight.new_zeros(n_states, *call.weight.shape)


KERNELS = {
    "cuda": Kernel(_cuda_forward, _cuda_backward, needs="cuda", direct=True),
    "cpu": Kernel(_cpu_forward, _cpu_backward, needs="cpu", direct=True),
    "portable": Kernel(portable.forward, _portable_backward),
}


def run(call: ConvCall, backend: str) -> Any:
    """Run a call on a registered backend.

    A plain call goes to its kernel without PyTorch's dispatcher, which takes longer than all else on the way.
    """
    tensors = call[:N_TENSORS]
    if not KERNELS[backend].direct or needs_dispatcher(tensors):
        refuse_transforms("causal_conv1d", call.tensors)
        y, state = torch.ops.selectra.causal_conv1d(*call[:-1], backend)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors):
        return _apply(call, backend, *call.tensors)
    else:
        y, state = _run_kernel(KERNELS[backend], call)
    return (y, state) if call.return_final_state else y


class _Conv(torch.autograd.Function):
    """A plain call with a gradient."""

    @staticmethod
    def forward(ctx: Any, call: ConvCall, backend: str, *differentiable: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the call, whose tensors that can have a gradient come once more: autograd sees these alone."""
        y, state = _run_kernel(KERNELS[backend], call)
        ctx.save_for_backward(*call[:N_TENSORS])
        # No zeros are made for the gradient of an output that nobody uses.
        ctx.set_materialize_grads(False)
        ctx.flags = (*call[N_TENSORS:-1], backend)
        return (y, state) if call.return_final_state else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = ctx.saved_tensors
        batched = is_batched(dy) or is_batched(dfinal)
        # A gradient that shall have one itself is refused in words by the registration.
        if torch.is_grad_enabled() or batched or needs_dispatcher((dy, dfinal, *inputs)):
            return (None, None, *_registered_gradients(dy, dfinal, inputs, ctx.flags))
        *flags, backend = ctx.flags
        grads = KERNELS[backend].backward(ConvCall._make((*inputs, *flags, True)), _output_gradient(dy, inputs), dfinal)
        return (None, None, *(None if x is None else grad for x, grad in zip(inputs, grads, strict=False)))


# Without what `Function.apply` does for transforms of torch.func, which never come here: a tenth of a call's time.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Conv).apply  # pyright: ignore[reportAttributeAccessIssue]


def _kernel(call: ConvCall, backend: str) -> Kernel:
    kernel = KERNELS[backend]
    if kernel.needs == "cuda":
        cuda.require_cuda(call[:N_TENSORS])
    elif kernel.needs == "cpu":
        checks.require_cpu("causal_conv1d", backend, call[:N_TENSORS])
    return kernel


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = args
    call = ConvCall._make((*fields, True))
    kernel = _kernel(call, backend)
    if backend == "portable":
        say_slow_path("causal_conv1d", backend, call, call.x.device.type)
    y, state = _run_kernel(kernel, call)
    assert state is not None
    return y, state


def _run_kernel(kernel: Kernel, call: ConvCall) -> tuple[Tensor, Tensor | None]:
    # Kernels trust the borders; reading them on a GPU would stall it, so there the caller answers for them.
    if call.cu_seqlens is not None and call.cu_seqlens.device.type == "cpu":
        checks.sequence_borders(call.cu_seqlens, call.x.shape[1])
    return kernel.forward(call)


def _backward(dy: Tensor, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *fields, backend = args
    call = ConvCall._make((*fields, True))
    grads = _kernel(call, backend).backward(call, dy, dfinal)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


library.impl("causal_conv1d", _forward, "CompositeExplicitAutograd")
library.impl("causal_conv1d_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("selectra::causal_conv1d", lib=library)
def _forward_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    cu_seqlens = args[3]
    n_states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), weight.new_empty(n_states, *weight.shape)


@torch.library.register_fake("selectra::causal_conv1d_backward", lib=library)
def _backward_fake(dy: Tensor, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:N_DIFFERENTIABLE])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:N_TENSORS])
    ctx.set_materialize_grads(False)
    ctx.flags = inputs[N_TENSORS:]


def _autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    kept = _registered_gradients(dy, dfinal, inputs, ctx.flags)
    return (*kept, *[None] * (len(inputs) + len(ctx.flags) - len(kept)))


def _output_gradient(dy: Tensor | None, inputs: Sequence[Tensor | None]) -> Tensor:
    """The output's gradient, zero where nobody uses the output."""
    x = inputs[0]
    assert x is not None
    return x.new_zeros(x.shape) if dy is None else dy


def _registered_gradients(
    dy: Tensor | None, dfinal: Tensor | None, inputs: Sequence[Tensor | None], flags: Sequence[Any]
) -> list[Tensor | None]:
    """The gradients of the first inputs by way of the dispatcher, None for those that are None."""
    refuse_tangents("causal_conv1d", (dy, dfinal, *inputs))
    dy = _output_gradient(dy, inputs)
    grads = torch.ops.selectra.causal_conv1d_backward(dy, dfinal, *inputs, *flags)
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=False)]


torch.library.register_autograd("selectra::causal_conv1d", _autograd, setup_context=_setup_context, lib=library)


register_refusals(library, "causal_conv1d")
for _name in ("causal_conv1d", "causal_conv1d_backward"):
    keep_types_under_autocast(library, _name)


@register_flop_formula(torch.ops.selectra.causal_conv1d)
def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """A multiply and an add for each tap."""
    batch, length, d = x
    return 2 * batch * length * d * weight[1]


@register_flop_formula(torch.ops.selectra.causal_conv1d_backward)
def _flops_backward(dy: Any, dfinal: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """The filter once more, then the products for the input and for the weight."""
    return 3 * _flops(x, weight)
