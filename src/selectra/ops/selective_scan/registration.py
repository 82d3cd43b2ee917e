"""The selective scan as an operator of PyTorch: shapes, autograd, autocast, vmap and FLOPs.

`torch.ops.selectra.selective_scan` carries the chosen backend by name into its backward, which runs on another thread.
Only the schema, not a decorator, is registered: that costs half of `torch.library.custom_op` per call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from selectra.ops import checks
from selectra.ops.autocast import keep_types_under_autocast
from selectra.ops.dispatch import say_slow_path
from selectra.ops.selective_scan import cpu, portable
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.transforms import refuse_tangents, refuse_transforms, register_refusals

TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? mask, Tensor? cu_seqlens"
)
# Positions of the tensors that can have a gradient, and how many arguments come before the flags.
N_DIFFERENTIABLE, N_TENSORS = 9, 11

library = torch.library.Library("selectra", "FRAGMENT")
library.define(
    f"selective_scan({TENSORS}, bool delta_softplus, bool reverse, ScalarType out_dtype, str backend, bool save) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    f"selective_scan_backward(Tensor dy, Tensor dfinal, Tensor checkpoints, {TENSORS}, bool delta_softplus, "
    "bool reverse, ScalarType out_dtype, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Kernel(NamedTuple):
    """What a registered backend provides."""

    forward: Callable[[ScanCall, bool], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[ScanCall, Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]
    checkpoint_shape: Callable[[Tensor, Tensor, int, int | None], tuple[int, ...]]
    needs_cpu: bool = False


def _cpu_forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.forward(*call[:-1], save)


def _cpu_backward(call: ScanCall, dy: Tensor, dfinal: Tensor, checkpoints: Tensor) -> tuple[Tensor, ...]:
    return cpu.backward(dy, dfinal, checkpoints, *call[:-2])


KERNELS = {
    "cpu": Kernel(_cpu_forward, _cpu_backward, cpu.checkpoint_shape, needs_cpu=True),
    "portable": Kernel(portable.forward, portable.backward, portable.checkpoint_shape),
}


def run(call: ScanCall, backend: str) -> Any:
    """Run a call on a registered backend, keeping what the backward needs only where a gradient can be asked for."""
    refuse_transforms("selective_scan", call.tensors)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors)
    y, state, _ = torch.ops.selectra.selective_scan(*call[:-1], backend, save)
    return (y, state) if call.return_final_state else y


def _kernel(call: ScanCall, backend: str) -> Kernel:
    kernel = KERNELS[backend]
    # A compiled or exported program carries the backend's name to tensors that `refuse` never saw.
    if kernel.needs_cpu:
        checks.require_cpu("selective_scan", backend, call[:N_TENSORS])
    return kernel


def _n_seqs(call: ScanCall) -> int | None:
    return None if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, delta_softplus, reverse, out_dtype, backend, save = args
    call = ScanCall._make((*tensors, delta_softplus, reverse, out_dtype, True))
    kernel = _kernel(call, backend)
    # Kernels trust the borders; reading them on a GPU would stall it, so there the caller answers for them.
    if call.cu_seqlens is not None and call.cu_seqlens.device.type == "cpu":
        checks.sequence_borders(call.cu_seqlens, call.u.shape[1])
    if backend == "portable":
        say_slow_path("selective_scan", backend, call, call.u.device.type)
    return kernel.forward(call, save)


def _backward(dy: Tensor, dfinal: Tensor, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, delta_softplus, reverse, out_dtype, backend = args
    call = ScanCall._make((*tensors, delta_softplus, reverse, out_dtype, True))
    kernel = _kernel(call, backend)
    if checkpoints.shape != kernel.checkpoint_shape(call.u, call.A, call.B.shape[2], _n_seqs(call)):
        # The forward was traced where no gradient could be asked for, and kept nothing.
        checkpoints = kernel.forward(call, True)[2]
    grads = kernel.backward(call, dy, dfinal, checkpoints)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


library.impl("selective_scan", _forward, "CompositeExplicitAutograd")
library.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("selectra::selective_scan", lib=library)
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, B, *_ = args
    cu_seqlens, out_dtype, backend, save = args[10], args[13], args[14], args[15]
    n_seqs = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = KERNELS[backend].checkpoint_shape(u, A, B.shape[2], n_seqs) if save else (0,)
    return (
        u.new_empty(u.shape, dtype=out_dtype),
        A.new_empty(u.shape[0] if n_seqs is None else n_seqs, *A.shape),
        A.new_empty(shape),
    )


@torch.library.register_fake("selectra::selective_scan_backward", lib=library)
def _backward_fake(dy: Tensor, dfinal: Tensor, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = args[:N_DIFFERENTIABLE]
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:N_TENSORS], output[2])
    ctx.mark_non_differentiable(output[2])
    # No zeros are made for the checkpoints' gradient, which nobody reads.
    ctx.set_materialize_grads(False)
    # All flags but `save`.
    ctx.flags = inputs[N_TENSORS:-1]
    ctx.n_inputs = len(inputs)


def _autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *inputs, checkpoints = ctx.saved_tensors
    refuse_tangents("selective_scan", (dy, dfinal, *inputs))
    if dy is None:
        dy = inputs[0].new_zeros(inputs[0].shape, dtype=ctx.flags[2])
    if dfinal is None:
        cu_seqlens, A = inputs[10], inputs[2]
        n_states = inputs[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dfinal = A.new_zeros(n_states, *A.shape)
    grads = torch.ops.selectra.selective_scan_backward(dy, dfinal, checkpoints, *inputs, *ctx.flags)
    kept = [None if x is None else grad for x, grad in zip(inputs, grads, strict=False)]
    return (*kept, *[None] * (ctx.n_inputs - len(kept)))


torch.library.register_autograd("selectra::selective_scan", _autograd, setup_context=_setup_context, lib=library)


register_refusals(library, "selective_scan")
for _name in ("selective_scan", "selective_scan_backward"):
    keep_types_under_autocast(library, _name)


@register_flop_formula(torch.ops.selectra.selective_scan)
def _flops(u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> int:
    """9 b l d n, the count of state-spaces/mamba's maintainers (issue 110)."""
    batch, length, d = u
    return 9 * batch * length * d * A[1]


@register_flop_formula(torch.ops.selectra.selective_scan_backward)
def _flops_backward(dy: Any, dfinal: Any, checkpoints: Any, u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> int:
    """The states once more, and about twice their arithmetic for the adjoint."""
    return 3 * _flops(u, delta, A)
