"""The causal convolution as k shifted products, with its own backward: any device, linear memory."""

from itertools import pairwise

import torch
from torch import Tensor

from selectra.ops import checks
from selectra.ops.causal_conv1d.call import ConvCall


def refuse(call: ConvCall) -> str | None:
    """Never refuses."""
    return None


def _extended(call: ConvCall) -> Tensor:
    """(b, k + l, d) in scan order: the state, then the inputs, absent ones zero."""
    x = call.x if call.mask is None else torch.where(call.mask[..., None], call.x, 0)
    x = x.flip(1) if call.reverse else x
    batch, length, d = x.shape
    k = call.weight.shape[1]
    extended = torch.empty(batch, k + length, d, dtype=call.weight.dtype, device=x.device)
    if call.initial_state is None:
        extended[:, :k] = 0
    else:
        extended[:, :k] = call.initial_state.transpose(1, 2)
    extended[:, k:] = x
    return extended


def _filtered(call: ConvCall, extended: Tensor) -> Tensor:
    """Before the activation, (b, l, d) in scan order."""
    length = call.x.shape[1]
    y = torch.zeros_like(extended[:, :length])
    for j, tap in enumerate(call.weight.unbind(1)):
        y.addcmul_(tap, extended[:, j + 1 : j + 1 + length])
    return y if call.bias is None else y.add_(call.bias)


def forward(call: ConvCall) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    if call.cu_seqlens is not None:
        return _forward_packed(call)
    extended = _extended(call)
    y = _filtered(call, extended)
    y = torch.nn.functional.silu(y, inplace=True) if call.silu else y
    y = y.flip(1) if call.reverse else y
    y = y if call.mask is None else torch.where(call.mask[..., None], y, 0)
    return y.to(call.x.dtype), extended[:, call.x.shape[1] :].transpose(1, 2).contiguous()


def backward(call: ConvCall, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; None where the input is absent."""
    if call.cu_seqlens is not None:
        return _backward_packed(call, dy, dfinal)
    length, k = call.x.shape[1], call.weight.shape[1]
    extended = _extended(call)
    dy = dy if call.mask is None else torch.where(call.mask[..., None], dy, 0)
    dy = (dy.flip(1) if call.reverse else dy).to(extended.dtype)
    if call.silu:
        y = _filtered(call, extended)
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    dextended = torch.zeros_like(extended)
    dextended[:, length:] += dfinal.transpose(1, 2)
    dweight = torch.empty_like(call.weight)
    for j, tap in enumerate(call.weight.unbind(1)):
        seen = slice(j + 1, j + 1 + length)
        dextended[:, seen].addcmul_(tap, dy)
        dweight[:, j] = (dy * extended[:, seen]).sum((0, 1))
    dx = dextended[:, k:].flip(1) if call.reverse else dextended[:, k:]
    dx = dx if call.mask is None else torch.where(call.mask[..., None], dx, 0)
    return (
        # Operators never hand out views of their own work.
        dx.to(call.x.dtype).clone(),
        dweight,
        None if call.bias is None else dy.sum((0, 1)),
        None if call.initial_state is None else dextended[:, :k].transpose(1, 2).contiguous(),
    )


def _pieces(call: ConvCall) -> list[tuple[slice, ConvCall]]:
    """Each packed sequence as a call of its own."""
    assert call.cu_seqlens is not None
    borders = checks.sequence_borders(call.cu_seqlens, call.x.shape[1])
    found = []
    for index, (start, end) in enumerate(pairwise(borders)):
        initial = None if call.initial_state is None else call.initial_state[index : index + 1]
        where = slice(start, end)
        found.append((where, call._replace(x=call.x[:, where], initial_state=initial, cu_seqlens=None)))
    return found


def _forward_packed(call: ConvCall) -> tuple[Tensor, Tensor]:
    assert call.cu_seqlens is not None
    y = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    states = call.weight.new_zeros(call.cu_seqlens.shape[0] - 1, *call.weight.shape)
    for index, (where, piece) in enumerate(_pieces(call)):
        y[:, where], states[index : index + 1] = forward(piece)
    return y, states


def _backward_packed(call: ConvCall, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    dx = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    dweight = torch.zeros_like(call.weight)
    dbias = None if call.bias is None else torch.zeros_like(call.bias)
    dinitial = None if call.initial_state is None else torch.zeros_like(call.initial_state)
    for index, (where, piece) in enumerate(_pieces(call)):
        dx_piece, dweight_piece, dbias_piece, dinitial_piece = backward(piece, dy[:, where], dfinal[index : index + 1])
        dx[:, where] = dx_piece
        dweight += dweight_piece
        if dbias is not None and dbias_piece is not None:
            dbias += dbias_piece
        if dinitial is not None and dinitial_piece is not None:
            dinitial[index : index + 1] = dinitial_piece
    return dx, dweight, dbias, dinitial
