"""The selective scan as an operator of PyTorch: shapes, autograd, autocast, vmap and FLOPs.

`torch.ops.selectra.selective_scan` carries the chosen backend by name into its backward, which runs on another thread.
Only the schema, not a decorator, is registered: that costs half of `torch.library.custom_op` per call.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from selectra.ops import checks
from selectra.ops.autocast import keep_types_under_autocast
from selectra.ops.dispatch import say_slow_path
from selectra.ops.selective_scan import cpu, cuda, portable
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.transforms import is_batched, needs_dispatcher, refuse_tangents, refuse_transforms, register_refusals

TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? mask, Tensor? cu_seqlens"
)
# Positions of the tensors that can have a gradient, and how many arguments come before the flags.
N_DIFFERENTIABLE, N_TENSORS = 9, 11
# Of u, delta and z.
KEEP_LAYOUT = (0, 1, 6)

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

    forward: Callable[[ScanCall, bool], tuple[Tensor, Tensor | None, Tensor | None]]
    """y, the final state, which may be None where the call does not ask for it, and what the backward needs, where it
    is asked to save that."""
    backward: Callable[[ScanCall, Tensor, Any, Tensor], tuple[Tensor | None, ...]]
    """From the gradients of y and of the final state, and from what was saved."""
    checkpoint_shape: Callable[[Tensor, Tensor, int, int | None, bool], tuple[int, ...]]
    """From u, A, groups, the number of packed sequences if any, and whether there is a gate."""
    needs: Literal["cpu", "cuda"] | None = None
    keeps_layout: bool = False
    """Whether y and the gradients of u, delta and z lie in memory as these do, not always channels last."""
    direct: bool = False
    """Whether a plain call may go past PyTorch's dispatcher."""
    final_may_lack: bool = False
    """Whether the final state's gradient may be None: zero."""


def _cpu_forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.forward(*call[:-1], save)


def _cpu_backward(call: ScanCall, dy: Tensor, dfinal: Tensor, checkpoints: Tensor) -> tuple[Tensor, ...]:
    return cpu.backward(dy, dfinal, checkpoints, *call[:-2])


KERNELS = {
    "cuda": Kernel(
        cuda.forward,
        cuda.backward,
        cuda.checkpoint_shape,
        needs="cuda",
        keeps_layout=True,
        direct=True,
        final_may_lack=True,
    ),
    "cpu": Kernel(_cpu_forward, _cpu_backward, cpu.checkpoint_shape, needs="cpu", direct=True),
    "portable": Kernel(portable.forward, portable.backward, portable.checkpoint_shape),
}


def run(call: ScanCall, backend: str) -> Any:
    """Run a call on a registered backend, keeping what the backward needs only where a gradient can be asked for.

    A plain call goes to its kernel without PyTorch's dispatcher, which takes longer than all else on the way.
    """
    tensors = call[:N_TENSORS]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:N_DIFFERENTIABLE])
    if not KERNELS[backend].direct or needs_dispatcher(tensors):
        refuse_transforms("selective_scan", call.tensors)
        y, state, _ = torch.ops.selectra.selective_scan(*call[:-1], backend, save)
    elif save:
        return _apply(call, backend, *call.tensors)
    else:
        y, state, _ = _run_kernel(KERNELS[backend], call, save)
    return (y, state) if call.return_final_state else y


class _Scan(torch.autograd.Function):
    """A plain call with a gradient."""

    @staticmethod
    def forward(ctx: Any, call: ScanCall, backend: str, *differentiable: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the call, whose tensors that can have a gradient come once more: autograd sees these alone."""
        y, state, checkpoints = _run_kernel(KERNELS[backend], call, True)
        ctx.save_for_backward(*call[:N_TENSORS], checkpoints)
        # No zeros are made for the gradient of an output that nobody uses.
        ctx.set_materialize_grads(False)
        ctx.flags = (*call[N_TENSORS:-1], backend)
        return (y, state) if call.return_final_state else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, checkpoints = ctx.saved_tensors
        batched, unused = is_batched(dy) or is_batched(dfinal), dfinal is None
        may_lack = KERNELS[ctx.flags[-1]].final_may_lack
        # A gradient that shall have one itself is refused in words by the registration.
        if torch.is_grad_enabled() or batched or needs_dispatcher((dy, dfinal, *inputs)):
            dy, dfinal = _output_gradients(dy, dfinal, inputs, ctx.flags)
            grads = _registered_gradients(dy, dfinal, checkpoints, inputs, ctx.flags)
        else:
            *flags, backend = ctx.flags
            if dy is None or not (unused and may_lack):
                dy, dfinal = _output_gradients(dy, dfinal, inputs, ctx.flags)
            call = ScanCall._make((*inputs, *flags, True))
            found = KERNELS[backend].backward(call, dy, dfinal, checkpoints)
            grads = [None if x is None else grad for x, grad in zip(inputs, found, strict=False)]
        return (None, None, *grads)


# Without what `Function.apply` does for transforms of torch.func, which never come here: a tenth of a call's time.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Scan).apply  # pyright: ignore[reportAttributeAccessIssue]


def _kernel(call: ScanCall, backend: str) -> Kernel:
    kernel = KERNELS[backend]
    # A compiled or exported program carries the backend's name to tensors that `refuse` never saw.
    if kernel.needs == "cuda":
        cuda.require_cuda(call[:N_TENSORS])
    elif kernel.needs == "cpu":
        checks.require_cpu("selective_scan", backend, call[:N_TENSORS])
    return kernel


def _checkpoint_shape(kernel: Kernel, call: ScanCall) -> tuple[int, ...]:
    n_seqs = None if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return kernel.checkpoint_shape(call.u, call.A, call.B.shape[2], n_seqs, call.z is not None)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, delta_softplus, reverse, out_dtype, backend, save = args
    call = ScanCall._make((*tensors, delta_softplus, reverse, out_dtype, True))
    if backend == "portable":
        say_slow_path("selective_scan", backend, call, call.u.device.type)
    y, state, checkpoints = _run_kernel(_kernel(call, backend), call, save)
    assert state is not None
    return y, state, call.A.new_empty(0) if checkpoints is None else checkpoints


def _run_kernel(kernel: Kernel, call: ScanCall, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # Kernels trust the borders; reading them on a GPU would stall it, so there the caller answers for them.
    if call.cu_seqlens is not None and call.cu_seqlens.device.type == "cpu":
        checks.sequence_borders(call.cu_seqlens, call.u.shape[1])
    return kernel.forward(call, save)


def _backward(dy: Tensor, dfinal: Tensor, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, delta_softplus, reverse, out_dtype, backend = args
    call = ScanCall._make((*tensors, delta_softplus, reverse, out_dtype, True))
    kernel = _kernel(call, backend)
    if checkpoints.shape != _checkpoint_shape(kernel, call):
        # The forward was traced where no gradient could be asked for, and kept nothing.
        _, _, kept = kernel.forward(call, True)
        assert kept is not None
        checkpoints = kept
    grads = kernel.backward(call, dy, dfinal, checkpoints)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


library.impl("selective_scan", _forward, "CompositeExplicitAutograd")
library.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("selectra::selective_scan", lib=library)
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, delta_softplus, reverse, out_dtype, backend, save = args
    call = ScanCall._make((*tensors, delta_softplus, reverse, out_dtype, True))
    kernel, u, A = KERNELS[backend], call.u, call.A
    n_states = u.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    y = torch.empty_like(u, dtype=out_dtype) if kernel.keeps_layout else u.new_empty(u.shape, dtype=out_dtype)
    return y, A.new_empty(n_states, *A.shape), A.new_empty(_checkpoint_shape(kernel, call) if save else (0,))


@torch.library.register_fake("selectra::selective_scan_backward", lib=library)
def _backward_fake(dy: Tensor, dfinal: Tensor, checkpoints: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, keeps_layout = args[:N_DIFFERENTIABLE], KERNELS[args[-1]].keeps_layout
    return tuple(
        dy.new_empty(0)
        if x is None
        else torch.empty_like(x)
        if keeps_layout and index in KEEP_LAYOUT
        else x.new_empty(x.shape)
        for index, x in enumerate(inputs)
    )


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
    dy, dfinal = _output_gradients(dy, dfinal, inputs, ctx.flags)
    grads = _registered_gradients(dy, dfinal, checkpoints, inputs, ctx.flags)
    return (*grads, *[None] * (ctx.n_inputs - len(grads)))


def _output_gradients(
    dy: Tensor | None, dfinal: Tensor | None, inputs: Sequence[Tensor | None], flags: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """The gradients of the outputs, zero for one that nobody uses."""
    u, A, cu_seqlens = inputs[0], inputs[2], inputs[10]
    assert u is not None and A is not None
    if dy is None:
        dy = u.new_zeros(u.shape, dtype=flags[2])
    if dfinal is None:
        n_states = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dfinal = A.new_zeros((n_states, *A.shape))
    return dy, dfinal


def _registered_gradients(
    dy: Tensor, dfinal: Tensor, checkpoints: Tensor, inputs: Sequence[Tensor | None], flags: Sequence[Any]
) -> list[Tensor | None]:
    """The gradients of the first inputs by way of the dispatcher, None for those that are None."""
    refuse_tangents("selective_scan", (dy, dfinal, *inputs))
    grads = torch.ops.selectra.selective_scan_backward(dy, dfinal, checkpoints, *inputs, *flags)
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=False)]


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
