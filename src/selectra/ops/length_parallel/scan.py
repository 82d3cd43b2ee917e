"""`selective_scan` of a sequence whose parts lie in several processes.

The state behind a part is linear in the state before it: `exp(A sum(delta)) h + s`, where s is the state that the part
alone leaves. Each process finds `sum(delta)` and s, all tell each other these, each walks from the first part to its
own and scans its part from the state that it finds there. Backward is the same the other way: the gradient of the
state before a part is `exp(A sum(delta)) g + e`, where g is that of the state behind it and e what the part's own
outputs add. With the true state before a part and the true gradient of the state behind it, the scan's own backward
gives this part's share of every gradient.

On a GPU finding s and e is a pass that the scan's kernels make anyway (`selective_scan/halves.py`), and nothing waits
for the host; elsewhere an end of the part is scanned (`ends.py`). What was told in the forward is kept where it is
computed again during backward.

Source: the associative operator of Mamba's scan (arXiv:2312.00752), Sec. 3.3.2, one element for each process.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selectra.errors import ConfigError
from selectra.ops.length_parallel import ends
from selectra.ops.length_parallel.chain import packed, unpacked
from selectra.ops.length_parallel.kept import once
from selectra.ops.length_parallel.link import Link
from selectra.ops.selective_scan import halves, selective_scan
from selectra.ops.selective_scan.call import ScanCall

N_TENSORS = 11


class _Heard(NamedTuple):
    """What a process needs of the forward's exchange."""

    incoming: Tensor
    """The state before its part, (b, d, n)."""
    final: Tensor
    """That behind all parts."""
    steps: Tensor
    """Sums of every part's steps, (parts, b, d)."""
    starts: Tensor | None = None
    """The states at the start of the part's chunks, where it runs in halves."""


def split_scan(call: ScanCall, link: Link) -> Any:
    """The call's part of y, and where asked for the state after the last position of all parts."""
    if call.cu_seqlens is not None:
        raise ConfigError(
            "cu_seqlens cannot be used inside length_parallel: one sequence is split there. Give each process whole "
            "sequences and leave the block, or pad them and pass a mask."
        )
    if selective_scan.choose(call).name == "cuda" and halves.takes(call):
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors)
        found: Any = _Halves.apply(link, call, save, *call.tensors)
    else:
        found = _by_ends(call, link)
    return found if call.return_final_state else found[0]


def _by_ends(call: ScanCall, link: Link) -> tuple[Tensor, Tensor]:
    heard: _Heard = once(lambda: _hear(link, call, *ends.forward_effect(call)))
    incoming = heard.incoming
    if call.initial_state is not None:
        incoming = _Before.apply(incoming, call.initial_state, _order(link, call)[0] == link.rank)
    y, end = selective_scan.run(call._replace(initial_state=incoming, return_final_state=True))
    return _Behind.apply(link, call, heard, y, end, *call[:N_TENSORS])  # pyright: ignore[reportReturnType]


class _Before(torch.autograd.Function):
    """The state before a part, whose gradient is that of the state before all where the part is the first."""

    @staticmethod
    def forward(ctx: Any, incoming: Tensor, initial_state: Tensor, first: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.first = first
        return incoming.view_as(incoming)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, grad if ctx.first else torch.zeros_like(grad), None


class _Behind(torch.autograd.Function):
    """y and the state behind all parts; its backward hands the state behind this part its gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, link: Link, call: ScanCall, heard: _Heard, y: Tensor, end: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(heard.steps, *tensors)
        ctx.link, ctx.flags = link, call[N_TENSORS:]
        return y.view_as(y), heard.final.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        steps, *tensors = ctx.saved_tensors
        call = ScanCall._make((*tensors, *ctx.flags))
        effect = steps.new_zeros(call.u.shape[0], *call.A.shape) if dy is None else ends.backward_effect(call, dy)
        outgoing, _ = _hear_back(ctx.link, call, steps, effect, dfinal)
        return None, None, None, dy, outgoing, *[None] * N_TENSORS


class _Halves(torch.autograd.Function):
    """The kernels' first half, the exchange, and their second half, forward and backward."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, link: Link, call: ScanCall, save: bool, *differentiable: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the call, whose tensors that can have a gradient come once more: autograd sees these alone."""
        heard = once(lambda: _begun(link, call))
        y, checkpoints = halves.forward(call, heard.starts, save)
        ctx.save_for_backward(heard.steps, checkpoints, *call[:N_TENSORS])
        ctx.set_materialize_grads(False)
        ctx.link, ctx.flags = link, call[N_TENSORS:]
        return y, heard.final.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        steps, checkpoints, *tensors = ctx.saved_tensors
        call = ScanCall._make((*tensors, *ctx.flags))
        dy = torch.zeros_like(call.u) if dy is None else halves.readable(dy)
        effect = halves.backward_effect(call, dy)
        outgoing, first = _hear_back(ctx.link, call, steps, effect.state, dfinal)
        *grads, before = halves.backward(call, dy, effect, outgoing, checkpoints)
        # Of what all hold alike each has a share.
        grads.append(before if first else torch.zeros_like(outgoing))
        return None, None, None, *(None if x is None else grad for x, grad in zip(call.tensors, grads, strict=True))


def _begun(link: Link, call: ScanCall) -> _Heard:
    effect = halves.forward_effect(call)
    heard = _hear(link, call, effect.state, effect.steps.sum(1))
    return heard._replace(starts=halves.begin(call, effect, heard.incoming))


def _order(link: Link, call: ScanCall) -> Sequence[int]:
    """The processes in the order in which their parts are scanned."""
    return range(link.size - 1, -1, -1) if call.reverse else range(link.size)


@torch.no_grad()
def _hear(link: Link, call: ScanCall, state: Tensor, steps: Tensor) -> _Heard:
    """Tell all what this part makes of a zero state, hear it of all parts, and walk to this one and to the end."""
    rows = link.gather(packed((state, steps)), "selective_scan")
    told = unpacked(rows, (state.shape, steps.shape))
    h = torch.zeros_like(state) if call.initial_state is None else call.initial_state.detach().contiguous()
    incoming = h
    for rank in _order(link, call):
        if rank == link.rank:
            incoming = h
        state, steps = told[rank]
        h = (steps[..., None] * call.A).exp() * h + state
    return _Heard(incoming, h, torch.stack([steps for _, steps in told]))


@torch.no_grad()
def _hear_back(link: Link, call: ScanCall, steps: Tensor, effect: Tensor, dfinal: Tensor | None) -> tuple[Tensor, bool]:
    """The gradient of the state behind this part, and whether the part is the first in scan order.

    Args:
        steps: Sums of every part's steps, (parts, b, d).
        effect: The gradient of the state before the part, of the part's own outputs alone.
        dfinal: This process's gradient of the state behind all parts.
    """
    order, told = _order(link, call), [effect]
    if call.return_final_state:
        told.append(torch.zeros_like(effect) if dfinal is None else dfinal)
    rows = unpacked(link.gather(packed(told), "the backward of selective_scan"), [x.shape for x in told])
    g = torch.stack([row[1] for row in rows]).sum(0) if call.return_final_state else torch.zeros_like(effect)
    outgoing = g
    for rank in reversed(order):
        if rank == link.rank:
            outgoing = g
        g = rows[rank][0] + (steps[rank][..., None] * call.A).exp() * g
    return outgoing.contiguous(), order[0] == link.rank
