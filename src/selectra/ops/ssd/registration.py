"""Mamba-2's recurrence as an operator of PyTorch; as `selective_scan/registration.py`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from selectra.ops.autocast import keep_types_under_autocast
from selectra.ops.dispatch import say_slow_path
from selectra.ops.selective_scan.cuda import require_cuda
from selectra.ops.ssd import cuda, portable
from selectra.ops.ssd.call import SsdCall
from selectra.ops.transforms import needs_dispatcher, refuse_tangents, refuse_transforms, register_refusals

TENSORS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state, Tensor? sequence"
N_DIFFERENTIABLE, N_TENSORS = 6, 7

library = torch.library.Library("selectra", "FRAGMENT")
library.define(f"ssd({TENSORS}, str backend) -> (Tensor, Tensor)")
library.define(
    f"ssd_backward(Tensor dy, Tensor? dfinal, {TENSORS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Kernel(NamedTuple):
    """What a registered backend provides."""

    forward: Callable[[SsdCall], tuple[Tensor, Tensor]]
    backward: Callable[[SsdCall, Tensor, Tensor | None], tuple[Tensor, ...]]
    """Of x, dt, A, B, C and the initial state."""
    needs: Literal["cuda"] | None = None


KERNELS = {
    "cuda": Kernel(cuda.forward, cuda.backward, needs="cuda"),
    "portable": Kernel(portable.forward, portable.backward),
}


def run(call: SsdCall, backend: str) -> tuple[Tensor, Tensor]:
    """Run a call on a registered backend."""
    refuse_transforms("ssd", call.tensors)
    tensors = call.tensors
    graded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if graded or needs_dispatcher(tensors):
        return torch.ops.selectra.ssd(*call, backend)
    with torch.autocast(call.x.device.type, enabled=False):
        return _whole(call, backend)


def step(call: SsdCall) -> tuple[Tensor, Tensor]:
    """One position, as a language model decodes them."""
    dtype = call.compute_dtype
    groups, n = call.B.shape[2:]
    x, B, C = (tensor[:, 0].to(dtype) for tensor in (call.x, call.B, call.C))
    dt = call.dt[:, 0]
    added = (x * dt[..., None]).unflatten(1, (groups, -1))[..., None] * B[:, :, None, None]
    state = added.flatten(1, 2)
    if call.initial_state is not None:
        state.addcmul_(call.initial_state, (dt * call.A).exp()[..., None, None])
    y = state.view(*added.shape[:2], -1, n) @ C[..., None]
    return y.view(call.x.shape), state


def _whole(call: SsdCall, backend: str) -> tuple[Tensor, Tensor]:
    kernel = KERNELS[backend]
    if kernel.needs == "cuda":
        require_cuda(call, "ssd")
    batch, length, heads, p = call.x.shape
    if length == 1:
        return step(call)
    if 0 in call.x.shape:
        y, first = call.dt.new_zeros(call.x.shape), call.initial_state
        return y, call.dt.new_zeros(batch, heads, p, call.B.shape[3]) if first is None else first.clone()
    if backend == "portable" and call.x.is_cuda:
        say_slow_path("ssd", backend, call, "cuda")
    y, state = kernel.forward(call)
    # A last chunk that was filled up left a part of a longer tensor.
    return y.contiguous(), state


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _whole(SsdCall._make(args[:-1]), args[-1])


def _backward(dy: Tensor, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    call, kernel = SsdCall._make(args[:-1]), KERNELS[args[-1]]
    if kernel.needs == "cuda":
        require_cuda((dy, *call), "ssd")
    if 0 in call.x.shape:
        found = [torch.zeros_like(x) for x in call[:5]]
        found.append(dy.new_zeros(0) if dfinal is None else dfinal.clone())
    else:
        found = list(kernel.backward(call, dy, dfinal))
    return tuple(
        dy.new_empty(0) if x is None else grad.to(x.dtype, memory_format=torch.contiguous_format).contiguous()
        for x, grad in zip(call.tensors, found, strict=True)
    )


library.impl("ssd", _forward, "CompositeExplicitAutograd")
library.impl("ssd_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("selectra::ssd", lib=library)
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = SsdCall._make(args[:-1])
    batch, _, heads, p = call.x.shape
    return call.dt.new_empty(call.x.shape), call.dt.new_empty(batch, heads, p, call.B.shape[3])


@torch.library.register_fake("selectra::ssd_backward", lib=library)
def _backward_fake(dy: Tensor, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:N_DIFFERENTIABLE])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:N_TENSORS])
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[-1]


def _autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    refuse_tangents("ssd", (dy, dfinal, *inputs))
    if dy is None:
        dy = inputs[1].new_zeros(inputs[0].shape)
    grads = torch.ops.selectra.ssd_backward(dy, dfinal, *inputs, ctx.backend)
    return (*(None if x is None else grad for x, grad in zip(inputs, grads, strict=False)), None, None)


torch.library.register_autograd("selectra::ssd", _autograd, setup_context=_setup_context, lib=library)


register_refusals(library, "ssd")
for _name in ("ssd", "ssd_backward"):
    keep_types_under_autocast(library, _name)


@register_flop_formula(torch.ops.selectra.ssd)
def _flops(x: Any, dt: Any, A: Any, B: Any, *_: Any, **__: Any) -> int:
    """The products of the chunked form: scores, scores times inputs, states written and read."""
    batch, length, heads, p = x
    groups, n = B[2:]
    q = min(portable.CHUNK, length)
    return 2 * batch * length * (q * (groups * n + heads * p) + 2 * heads * p * n)


@register_flop_formula(torch.ops.selectra.ssd_backward)
def _flops_backward(dy: Any, dfinal: Any, *args: Any, **kwargs: Any) -> int:
    """Each product's two gradients, and what is formed again."""
    return 3 * _flops(*args)
