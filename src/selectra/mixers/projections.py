"""Linear maps whose gradients meet without copies.

PyTorch's own backward of a map whose output is cut in parts first joins the parts' gradients in a new tensor, and that
of a tensor with two uses adds two tensors. Here products add up in place instead.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from selectra.ops.transforms import is_batched

# Where memory's speed bounds what is saved here.
_DEVICES: tuple[str, ...] = ("cuda", "cpu")


def linear_halves(
    linear: nn.Module, x: Float[Tensor, "b l d"]
) -> tuple[Float[Tensor, "b l e"], Float[Tensor, "b l e"]]:
    """`linear(x)`, cut in two halves along the channels; an adapter may stand in a linear map's place."""
    if not _in_place(x, linear) or linear.bias is not None:
        first, second = linear(x).chunk(2, dim=-1)
        return first, second
    return _Halves.apply(*_cast(x, _weight(linear)))  # pyright: ignore[reportReturnType]


def _in_place(x: Tensor, linear: nn.Module) -> bool:
    """Whether gradients are asked for by a plain backward pass, and the map is what it seems to be."""
    return (
        x.device.type in _DEVICES
        and torch.is_grad_enabled()
        and x.requires_grad
        and is_plain(linear)
        and _weight(linear).requires_grad
        # A recorded program cannot hold a function of Python.
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and _functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


def parameter(module: Any, name: str) -> Any:
    """A module's parameter, or what has taken its name's place."""
    # The module's own search goes through all else first, which takes ten times as long.
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def is_plain(linear: nn.Module) -> bool:
    """Whether a call of it is the product with its weight: no adapter, no hook, no other forward put in its place."""
    return (
        type(linear) is nn.Linear
        and type(linear._parameters.get("weight")) is nn.Parameter
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
        and not _has_any_global_hook()
    )


def _weight(linear: nn.Module) -> Tensor:
    return linear.weight  # pyright: ignore[reportReturnType]


def _cast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As autocast does: what is saved for the backward shall have the type of the product."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, weight
    return x.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _is_plain_backward(grad: Tensor) -> bool:
    """Whether products may go into what is there: not for second gradients, batches of gradients, nor autocast."""
    return not (torch.is_grad_enabled() or is_batched(grad) or torch.is_autocast_enabled(grad.device.type))


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        first, second = F.linear(x, weight).chunk(2, dim=-1)
        return first, second

    @staticmethod
    def backward(ctx: Any, dfirst: Tensor, dsecond: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole, weight = ctx.saved_tensors
        x, (upper, lower) = _flat(whole), weight.chunk(2)
        first, second = _flat(dfirst), _flat(dsecond)
        if not _is_plain_backward(dfirst):
            dx, dweight = first @ upper + second @ lower, torch.cat([first.mT @ x, second.mT @ x])
        else:
            dx = torch.mm(first, upper).addmm_(second, lower)
            dweight = torch.empty_like(weight)
            for grad, part in zip((first, second), dweight.chunk(2), strict=True):
                torch.mm(grad.mT, x, out=part)
        return dx.view(whole.shape), dweight
