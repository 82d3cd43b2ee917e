"""Skip, gate and norm by PyTorch's own functions and their gradients: any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.ops.dispatch import say_slow_path
from selectra.ops.gated_norm.call import GatedCall


def refuse(call: GatedCall) -> str | None:
    """Never refuses."""
    return None


def run(call: GatedCall) -> Tensor:
    """The gated and normalised sum."""
    if call.y.is_cuda and not torch.compiler.is_compiling():
        say_slow_path("gated_norm", "portable", call, "cuda")
    dtype = torch.promote_types(call.y.dtype, torch.float32)
    y = call.y.to(dtype)
    if call.x is not None and call.D is not None:
        D = call.D.to(dtype).repeat_interleave(y.shape[-1] // len(call.D))
        y = y + call.x.to(dtype) * D
    y = y * F.silu(call.z.to(dtype))
    y = y.unflatten(-1, (call.n_groups, -1))
    y = F.rms_norm(y, y.shape[-1:], None, call.eps).flatten(-2)
    return y.to(call.z.dtype) * call.weight.to(call.z.dtype)
