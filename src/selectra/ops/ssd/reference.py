"""The recurrence of Mamba-2 as it is written, position by position: the truth. Gradients are autograd's."""

import torch
from torch import Tensor

from selectra.ops.ssd.call import SsdCall


def refuse(call: SsdCall) -> None:
    """The truth takes every call."""


def run(call: SsdCall) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    dtype = call.compute_dtype
    batch, length, heads, p = call.x.shape
    each = heads // call.B.shape[2]
    state = call.initial_state
    if state is None:
        state = call.dt.new_zeros(batch, heads, p, call.B.shape[3])
    outputs = []
    with torch.autocast(call.x.device.type, enabled=False):
        x = call.x.to(dtype) * call.dt[..., None]
        B, C = (tensor.to(dtype).repeat_interleave(each, 2) for tensor in (call.B, call.C))
        decay = (call.dt * call.A).exp()
        for t in range(length):
            if call.sequence is not None and t:
                same = call.sequence[:, t] == call.sequence[:, t - 1]
                state = torch.where(same[:, None, None, None], state, 0)
            state = state * decay[:, t, :, None, None] + x[:, t, :, :, None] * B[:, t, :, None]
            outputs.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1) if outputs else x, state
