"""Sum and norm as they are written: the truth. Gradients are autograd's."""

import torch
from torch import Tensor

from selectra.ops import checks
from selectra.ops.add_norm.call import NormCall


def refuse(call: NormCall) -> None:
    """The truth takes every call."""


def run(call: NormCall) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum."""
    dtype = checks.compute_dtype(call.x.dtype == torch.float64)
    total = call.x.to(dtype)
    if call.residual is not None:
        total = total + call.residual.to(dtype)
    residual = total.to(call.residual_dtype)
    y = residual.to(dtype)
    if call.centred:
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + call.eps).sqrt()
    if call.weight is not None:
        y = y * call.weight.to(dtype)
    if call.bias is not None:
        y = y + call.bias.to(dtype)
    return y.to(call.x.dtype), residual
