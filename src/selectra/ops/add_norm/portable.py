"""Sum and norm by PyTorch's own functions and their gradients: any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from selectra.ops.add_norm.call import NormCall
from selectra.ops.dispatch import say_slow_path


def refuse(call: NormCall) -> str | None:
    """Never refuses."""
    return None


def run(call: NormCall) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum."""
    if call.x.is_cuda and not torch.compiler.is_compiling():
        say_slow_path("add_norm", "portable", call, "cuda")
    residual = call.x
    if call.residual is not None:
        # The sum is rounded once: to the type of the new stream, which may be wider than both.
        wider = torch.promote_types(call.x.dtype, call.residual_dtype)
        residual = call.x.to(wider) + call.residual
    residual = residual.to(call.residual_dtype)
    # At least as wide as both: a stream in float32 is not rounded before the norm, nor is a float32 norm's result.
    dtype = torch.promote_types(residual.dtype, call.x.dtype)
    wide = residual.to(dtype)
    weight = None if call.weight is None else call.weight.to(dtype)
    bias = None if call.bias is None else call.bias.to(dtype)
    shape = wide.shape[-1:]
    # Autocast would turn the stream's type.
    with torch.autocast(wide.device.type, enabled=False):
        if call.centred:
            y = F.layer_norm(wide, shape, weight, bias, call.eps)
        else:
            y = F.rms_norm(wide, shape, weight, call.eps)
            y = y if bias is None else y + bias
    return y.to(call.x.dtype), residual
