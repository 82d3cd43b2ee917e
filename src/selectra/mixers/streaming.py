"""Whether one position of a Mamba block can go through the compiled kernel, and its way there.

Everything that PyTorch would have to see keeps the ordinary path: gradients, hooks, adapters and parametrisations on
the projections, autocast, compilers and modes, other devices and types, and a backend that was asked for. On a CPU a
single block is taken too, on a GPU only all blocks of a model together (`stack.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from selectra.ops import add_norm, causal_conv1d, selective_scan
from selectra.ops.block_step import CudaStepPlan
from selectra.ops.native.step import BlockWeights, StepPlan, key_of, run
from selectra.ops.transforms import needs_dispatcher

if TYPE_CHECKING:
    from selectra.layers.norm import AddNorm
    from selectra.mixers.s6 import S6, State

_OPS = (add_norm, causal_conv1d, selective_scan)
# Beside the module, not in it: a plan is of this process and is neither copied nor saved.
_plans: weakref.WeakKeyDictionary[nn.Module, StepPlan | CudaStepPlan] = weakref.WeakKeyDictionary()
Plan = TypeVar("Plan", StepPlan, CudaStepPlan)
_MAPS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def quick_step(
    mixer: S6, x: Tensor, state: State, norm: AddNorm | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The block's output, and with a norm before it the residual stream, or None where the kernel does not apply.

    The state's tensors are written.
    """
    if not x.is_cpu or must_be_seen((x, residual, *state)):
        return None
    plan = plan_of(mixer, norm, StepPlan)
    if plan is None or not plan.takes(x, residual) or not plan.takes_state(x.shape[0], *state):
        return None
    stream = None if norm is None else new_stream(norm, x, residual)
    return run((plan,), (state,), x, residual, stream), x if stream is None else stream


def must_be_seen(tensors: Sequence[Tensor | None]) -> bool:
    """Whether more than the kernel has to see a call on these tensors, of which the first is the input."""
    x = tensors[0]
    assert x is not None
    return (
        needs_dispatcher(tensors)
        or torch.is_autocast_enabled(x.device.type)
        or any(op.wish() is not None or op.wrapped for op in _OPS)
    )


def plan_of(mixer: S6, norm: AddNorm | None, kind: type[Plan]) -> Plan | None:
    """The block's weights as the kernel reads them now, or None where its parts are not plain."""
    if not _is_plain(mixer, norm):
        return None
    weights = _weights(mixer, norm)
    key = key_of(weights)
    eps = 0.0 if norm is None else norm.eps
    plan = _plans.get(mixer)
    if not isinstance(plan, kind) or plan.eps != eps or plan.key != key:
        plan = _plans[mixer] = kind(weights, key, eps)
    return plan


def new_stream(norm: AddNorm, x: Tensor, residual: Tensor | None) -> Tensor:
    """Room for the residual stream behind the norm."""
    return x.new_empty(x.shape, dtype=_stream_dtype(norm, x, residual))


def _stream_dtype(norm: AddNorm, x: Tensor, residual: Tensor | None) -> torch.dtype:
    if norm.residual_in_fp32:
        return torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.dtype if residual is None else residual.dtype


def _is_plain(mixer: S6, norm: AddNorm | None) -> bool:
    """Whether the parts are what they seem to be, and no hook waits to be called."""
    parts: dict[str, Any] = mixer._modules
    if norm is not None and (norm.kind != "rms" or _is_changed(norm)):
        return False
    if modules._global_forward_hooks or modules._global_forward_pre_hooks or type(parts["conv1d"]) is not nn.Conv1d:
        return False
    for name in _MAPS:
        part = parts[name]
        if type(part) is not nn.Linear or _is_changed(part):
            return False
    return True


def _is_changed(part: nn.Module) -> bool:
    """Whether a call of it does more than its class says: a hook, or another forward put in its place."""
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)


def _weights(mixer: S6, norm: AddNorm | None) -> BlockWeights:
    """Without `Module.__getattr__`, which costs more than the rest."""
    parts: dict[str, Any] = mixer._modules
    own: dict[str, Any] = mixer._parameters
    names = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    in_proj, conv, x_proj, dt_proj, out_proj = (parts[name]._parameters for name in names)
    return BlockWeights(
        None if norm is None else norm._parameters["weight"],
        in_proj["weight"],
        in_proj["bias"],
        conv["weight"],
        conv["bias"],
        x_proj["weight"],
        dt_proj["weight"],
        dt_proj["bias"],
        own["A_log"],
        own["D"],
        out_proj["weight"],
        out_proj["bias"],
    )
