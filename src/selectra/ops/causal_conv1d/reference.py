"""The causal convolution, tap by tap in plain PyTorch: the truth. Its gradients are autograd's."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selectra.ops import checks
from selectra.ops.causal_conv1d.call import ConvCall


def refuse(call: ConvCall) -> None:
    """The truth takes every call."""


def run(call: ConvCall) -> Any:
    """Outputs, and the final state when the call asks for it."""
    y, state = convolve_packed(call) if call.cu_seqlens is not None else convolve(call)
    return (y, state) if call.return_final_state else y


def convolve(call: ConvCall) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d k"]]:
    """One tap after another over the inputs, with the state put before them."""
    (batch, length, d), k = call.x.shape, call.weight.shape[1]
    present = torch.ones_like(call.x[..., :1], dtype=torch.bool) if call.mask is None else call.mask[..., None]
    x = torch.where(present, call.x, 0).to(call.weight.dtype)
    x = x.flip(1) if call.reverse else x
    before = x.new_zeros(batch, d, k) if call.initial_state is None else call.initial_state
    x = torch.cat([before.transpose(1, 2), x], 1)  # (b, k + l, d)
    y = x.new_zeros(batch, length, d)
    for j in range(k):
        y = y + call.weight[:, j] * x[:, j + 1 : j + 1 + length]
    if call.bias is not None:
        y = y + call.bias
    if call.silu:
        y = F.silu(y)
    y = y.flip(1) if call.reverse else y
    return torch.where(present, y, 0).to(call.x.dtype), x[:, length:].transpose(1, 2)


def convolve_packed(call: ConvCall) -> tuple[Float[Tensor, "1 l d"], Float[Tensor, "n_seqs d k"]]:
    """Each of the packed sequences by itself."""
    assert call.cu_seqlens is not None
    borders = checks.sequence_borders(call.cu_seqlens, call.x.shape[1])
    ys, states = [call.x[:, :0]], [call.weight.new_zeros(0, *call.weight.shape)]
    for index, (start, end) in enumerate(pairwise(borders)):
        initial = None if call.initial_state is None else call.initial_state[index : index + 1]
        y, state = convolve(call._replace(x=call.x[:, start:end], initial_state=initial, cu_seqlens=None))
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1), torch.cat(states)
