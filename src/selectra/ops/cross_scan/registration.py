"""The cross-scan's `cuda` and `cpu` backends as an operator of PyTorch: shapes, autograd, autocast, vmap and FLOPs.

The other backends are made of operators that are registered themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from selectra.ops import checks
from selectra.ops.autocast import keep_types_under_autocast
from selectra.ops.cross_scan import cpu, cuda
from selectra.ops.cross_scan.call import CrossCall
from selectra.ops.selective_scan.cuda import require_cuda
from selectra.ops.transforms import is_batched, needs_dispatcher, refuse_tangents, refuse_transforms, register_refusals

TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
# The backend is told to whoever watches which one ran.
FLAGS = "bool delta_softplus, int[] routes, bool merge, str backend"
N_TENSORS = 8

library = torch.library.Library("selectra", "FRAGMENT")
library.define(f"cross_scan({TENSORS}, {FLAGS}, bool save) -> (Tensor, Tensor)")
library.define(
    f"cross_scan_backward(Tensor dy, Tensor checkpoints, {TENSORS}, {FLAGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Kernel(NamedTuple):
    """What a registered backend provides."""

    forward: Callable[[CrossCall, bool], tuple[Tensor, Tensor | None]]
    """y, and what the backward needs, where it is asked to save that."""
    backward: Callable[[CrossCall, Tensor, Tensor], tuple[Tensor | None, ...]]
    checkpoint_shape: Callable[[CrossCall], tuple[int, ...]]
    require: Callable[[tuple[Tensor | None, ...]], None]
    """Raises where a tensor is not in the memory that the kernels read."""
    sums_lie_as_inputs: bool
    """Whether the gradients of a u and z that all routes share lie in memory as these do; others always do."""


KERNELS = {
    "cuda": Kernel(
        cuda.forward, cuda.backward, cuda.checkpoint_shape, lambda tensors: require_cuda(tensors, "cross_scan"), False
    ),
    "cpu": Kernel(
        cpu.forward,
        cpu.backward,
        cpu.checkpoint_shape,
        lambda tensors: checks.require_cpu("cross_scan", "cpu", tensors),
        True,
    ),
}


def run(call: CrossCall, backend: str) -> Tensor:
    """Run a call on a registered backend, keeping what the backward needs only where a gradient can be asked for.

    A plain call goes to its kernel without PyTorch's dispatcher, which takes longer than all else on the way.
    """
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors)
    if needs_dispatcher(call.tensors):
        refuse_transforms("cross_scan", call.tensors)
        return torch.ops.selectra.cross_scan(*call, backend, save)[0]
    if save:
        return _CrossScan.apply((*call[N_TENSORS:], backend), *call.tensors)  # pyright: ignore[reportReturnType]
    return KERNELS[backend].forward(call, False)[0]


class _CrossScan(torch.autograd.Function):
    """A plain call with a gradient."""

    @staticmethod
    def forward(ctx: Any, flags: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        call = CrossCall._make((*tensors, *flags[:-1]))
        y, checkpoints = KERNELS[flags[-1]].forward(call, True)
        ctx.save_for_backward(*tensors, checkpoints)
        ctx.flags = flags
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, checkpoints = ctx.saved_tensors
        # A gradient that shall have one itself is refused in words by the registration.
        if torch.is_grad_enabled() or is_batched(dy) or needs_dispatcher((dy, *inputs)):
            return None, *_registered_gradients(dy, checkpoints, inputs, ctx.flags)
        *words, backend = (*inputs, *ctx.flags)
        return None, *KERNELS[backend].backward(CrossCall._make(words), dy, checkpoints)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *words, backend, save = args
    call, kernel = CrossCall._make(words), KERNELS[backend]
    # A compiled or exported program carries the kernels to tensors that `refuse` never saw.
    kernel.require(call.tensors)
    y, checkpoints = kernel.forward(call, save)
    return y, call.A.new_empty(0) if checkpoints is None else checkpoints


def _backward(dy: Tensor, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, kernel = CrossCall._make(args[:-1]), KERNELS[args[-1]]
    kernel.require(call.tensors)
    if checkpoints.shape != kernel.checkpoint_shape(call):
        # The forward was traced where no gradient could be asked for, and kept nothing.
        _, kept = kernel.forward(call, True)
        assert kept is not None
        checkpoints = kept
    return tuple(dy.new_empty(0) if grad is None else grad for grad in kernel.backward(call, dy, checkpoints))


library.impl("cross_scan", _forward, "CompositeExplicitAutograd")
library.impl("cross_scan_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("selectra::cross_scan", lib=library)
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *words, backend, save = args
    call = CrossCall._make(words)
    u, delta = call.u, call.delta
    y = u.new_empty(u.shape[:3] + u.shape[4:] if call.merge else delta.shape)
    return y, call.A.new_empty(KERNELS[backend].checkpoint_shape(call) if save else (0,))


@torch.library.register_fake("selectra::cross_scan_backward", lib=library)
def _backward_fake(dy: Tensor, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, sums_too = CrossCall._make(args[:-1]), KERNELS[args[-1]].sums_lie_as_inputs
    keep = [x is not None and x.dim() == 5 and (sums_too or not cuda.is_shared(x, call)) for x in call.tensors]
    # B and C have five dimensions too.
    keep[3] = keep[4] = False
    return tuple(
        dy.new_empty(0) if x is None else torch.empty_like(x) if kept else x.new_empty(x.shape)
        for x, kept in zip(call.tensors, keep, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:N_TENSORS], output[1])
    ctx.mark_non_differentiable(output[1])
    # No zeros are made for the checkpoints' gradient, which nobody reads.
    ctx.set_materialize_grads(False)
    # All flags but `save`.
    ctx.flags = inputs[N_TENSORS:-1]


def _autograd(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    *inputs, checkpoints = ctx.saved_tensors
    # Flags have none.
    rest = (None,) * (len(ctx.flags) + 1)
    if dy is None:
        return (*(None for _ in inputs), *rest)
    return (*_registered_gradients(dy, checkpoints, inputs, ctx.flags), *rest)


def _registered_gradients(dy: Tensor, checkpoints: Tensor, inputs: list[Any], flags: Any) -> list[Tensor | None]:
    """The gradients by way of the dispatcher, None for inputs that are None."""
    refuse_tangents("cross_scan", (dy, *inputs))
    grads = torch.ops.selectra.cross_scan_backward(dy, checkpoints, *inputs, *flags)
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]


torch.library.register_autograd("selectra::cross_scan", _autograd, setup_context=_setup_context, lib=library)

register_refusals(library, "cross_scan")
for _name in ("cross_scan", "cross_scan_backward"):
    keep_types_under_autocast(library, _name)


@register_flop_formula(torch.ops.selectra.cross_scan)
def _flops(u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> int:
    """9 b h w k d n, as for the scan."""
    batch, height, width, k, d = delta
    return 9 * batch * height * width * k * d * A[2]


@register_flop_formula(torch.ops.selectra.cross_scan_backward)
def _flops_backward(dy: Any, checkpoints: Any, u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> int:
    """The states once more, and about twice their arithmetic for the adjoint."""
    return 3 * _flops(u, delta, A)
