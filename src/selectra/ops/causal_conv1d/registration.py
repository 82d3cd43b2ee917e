"""The causal convolution as an operator of PyTorch; as `selective_scan/registration.py`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from selectra.ops import checks
from selectra.ops.autocast import keep_types_under_autocast
from selectra.ops.causal_conv1d import cpu, cuda, portable
from selectra.ops.causal_conv1d.call import ConvCall
from selectra.ops.dispatch import say_slow_path
from selectra.ops.transforms import refuse_tangents, refuse_transforms, register_refusals

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

    forward: Callable[[ConvCall], tuple[Tensor, Tensor]]
    backward: Callable[[ConvCall, Tensor, Tensor | None], tuple[Tensor | None, ...]]
    needs: Literal["cpu", "cuda"] | None = None


def _cuda_forward(call: ConvCall) -> tuple[Tensor, Tensor]:
    return cuda.forward(*call[:-1])


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
    "cuda": Kernel(_cuda_forward, _cuda_backward, needs="cuda"),
    "cpu": Kernel(_cpu_forward, _cpu_backward, needs="cpu"),
    "portable": Kernel(portable.forward, _portable_backward),
}


def run(call: ConvCall, backend: str) -> Any:
    """Run a call on a registered backend."""
    refuse_transforms("causal_conv1d", call.tensors)
    y, state = torch.ops.selectra.causal_conv1d(*call[:-1], backend)
    return (y, state) if call.return_final_state else y


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
    if call.cu_seqlens is not None and call.cu_seqlens.device.type == "cpu":
        checks.sequence_borders(call.cu_seqlens, call.x.shape[1])
    if backend == "portable":
        say_slow_path("causal_conv1d", backend, call, call.x.device.type)
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
    refuse_tangents("causal_conv1d", (dy, dfinal, *inputs))
    if dy is None:
        dy = inputs[0].new_zeros(inputs[0].shape)
    grads = torch.ops.selectra.causal_conv1d_backward(dy, dfinal, *inputs, *ctx.flags)
    kept = [None if x is None else grad for x, grad in zip(inputs, grads, strict=False)]
    return (*kept, *[None] * (len(inputs) + len(ctx.flags) - len(kept)))


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
