"""The selective scan as the papers write it: one position after another, in plain PyTorch. This is the truth.

Every other backend is held to this file, in float64, for outputs and gradients. It is slow and runs only when it is
asked for. Its gradients are autograd's.

Glossary: b batch, l length, d channels, n state size, g groups of channels that share B and C.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selectra.ops import checks
from selectra.ops.selective_scan.call import SOFTPLUS_THRESHOLD, ScanCall


def refuse(call: ScanCall) -> None:
    """The truth takes every call."""


def run(call: ScanCall) -> Any:
    """Outputs, and the final state when the call asks for it."""
    y, state = scan_packed(call) if call.cu_seqlens is not None else scan(call)
    return (y, state) if call.return_final_state else y


def scan(call: ScanCall) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """Mamba (arXiv:2312.00752), Eq. 2a-2b: the recurrence, position by position."""
    dtype = call.A.dtype
    batch, length, d = call.u.shape
    # (b, l, 1): true where a position is present.
    present = call.u.new_ones(batch, length, 1, dtype=torch.bool) if call.mask is None else call.mask[..., None]
    # Selecting before any arithmetic keeps a NaN at an absent position out of outputs and gradients.
    u = torch.where(present, call.u, 0).to(dtype)
    delta = torch.where(present, call.delta, 0).to(dtype)
    B = torch.where(present[..., None], call.B, 0).to(dtype)
    C = torch.where(present[..., None], call.C, 0).to(dtype)

    if call.delta_bias is not None:
        delta = delta + call.delta_bias
    if call.delta_softplus:
        delta = F.softplus(delta, threshold=SOFTPLUS_THRESHOLD)
    # A step of zero passes the state on: exp(0 A) = 1, and nothing is added.
    delta = torch.where(present, delta, 0)

    h = call.initial_state
    if h is None:
        h = call.A.new_zeros(batch, d, call.A.shape[1])
    u_steps, delta_steps, B_steps, C_steps, present_steps = (x.unbind(1) for x in (u, delta, B, C, present))
    channels_per_group = d // call.B.shape[2]
    outputs: list[Tensor] = []
    for t in reversed(range(length)) if call.reverse else range(length):
        B_t, C_t = (x[t].repeat_interleave(channels_per_group, dim=1) for x in (B_steps, C_steps))  # (b, d, n)
        exponent = delta_steps[t][..., None] * call.A
        if call.mask is not None:
            # 0 A is not 0 where A is infinite.
            exponent = torch.where(present_steps[t][..., None], exponent, 0)
        decay = torch.exp(exponent)
        h = decay * h + (delta_steps[t] * u_steps[t])[..., None] * B_t
        outputs.append((h * C_t).sum(-1))
    if call.reverse:
        outputs.reverse()
    y = torch.stack(outputs, 1) if outputs else u

    if call.D is not None:
        y = y + call.D * u
    if call.z is not None:
        y = y * F.silu(torch.where(present, call.z, 0).to(dtype))
    return torch.where(present, y, 0).to(call.out_dtype), h


def scan_packed(call: ScanCall) -> tuple[Float[Tensor, "1 l d"], Float[Tensor, "n_seqs d n"]]:
    """Each of the packed sequences by itself."""
    assert call.cu_seqlens is not None
    borders = checks.sequence_borders(call.cu_seqlens, call.u.shape[1])
    ys, states = [call.u[:, :0].to(call.out_dtype)], [call.A.new_zeros(0, *call.A.shape)]
    for index, (start, end) in enumerate(pairwise(borders)):
        piece = slice(start, end)
        y, state = scan(
            call._replace(
                u=call.u[:, piece],
                delta=call.delta[:, piece],
                B=call.B[:, piece],
                C=call.C[:, piece],
                z=None if call.z is None else call.z[:, piece],
                initial_state=None if call.initial_state is None else call.initial_state[index : index + 1],
                cu_seqlens=None,
            )
        )
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1), torch.cat(states)
