"""`selective_scan` of a sequence whose parts lie in several processes.

The state behind a part is linear in the state before it: `exp(A sum(delta)) h + s`, where s is the state that the part
alone leaves. Each process finds `sum(delta)` and s, all tell each other these, each walks from the first part to its
own and scans its part from the state that it finds there. Autograd does the same the other way.

Finding s costs no second scan of the whole part: what lies so far before the part's end that it is forgotten there, to
far below rounding, is left out, and then the state before the part is forgotten too. Where memories are longer than a
part, all of it is scanned twice.

Source: the associative operator of Mamba's scan (arXiv:2312.00752), Sec. 3.3.2, one element for each process.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from selectra.errors import ConfigError
from selectra.ops.length_parallel.chain import exchange, with_end
from selectra.ops.length_parallel.link import Link
from selectra.ops.selective_scan import selective_scan
from selectra.ops.selective_scan.call import SOFTPLUS_THRESHOLD, ScanCall

# A state that has decayed by exp(-50), or exp(-100) in float64, is forgotten: rounding is exp(-17) and exp(-37).
FORGOTTEN = {torch.float32: 50.0, torch.float64: 100.0}
# The end of a part is looked at in lengths that double from here on; steps are added up in pieces of as many positions.
FIRST_END, PIECE = 1024, 16384


def split_scan(call: ScanCall, link: Link) -> Any:
    """The call's part of y, and where asked for the state after the last position of all parts."""
    if call.cu_seqlens is not None:
        raise ConfigError(
            "cu_seqlens cannot be used inside length_parallel: one sequence is split there. Give each process whole "
            "sequences and leave the block, or pad them and pass a mask."
        )
    length = end_length(call)
    fresh = selective_scan.choose(call).name != "reference"
    views = {name: with_end(getattr(call, name), length, call.reverse, fresh) for name in ("u", "delta", "B")}
    call = call._replace(**{name: whole for name, (whole, _) in views.items()})
    start = 0 if call.reverse else call.u.shape[1] - length
    end = call._replace(
        **{name: view for name, (_, view) in views.items()},
        C=call.C.detach().narrow(1, start, length),
        D=None,
        z=None,
        initial_state=None,
        mask=None if call.mask is None else call.mask.narrow(1, start, length),
        return_final_state=True,
    )
    _, state = selective_scan.run(end)
    steps = _step_sum(end)
    incoming, final = _chained(link, call, steps, state)
    found = selective_scan.run(call._replace(initial_state=incoming, return_final_state=False))
    return (found, final) if call.return_final_state else found


def _chained(link: Link, call: ScanCall, steps: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """The state before this process's part, and that behind all parts."""
    order = range(link.size - 1, -1, -1) if call.reverse else range(link.size)

    def combine(told: list[tuple[Tensor, ...]], shared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        A, *initial = shared
        h = initial[0] if initial else torch.zeros_like(told[0][1])
        incoming = h
        for rank in order:
            if rank == link.rank:
                incoming = h
            steps, state = told[rank]
            h = (steps[..., None] * A).exp() * h + state
        # An output must not be an input.
        return incoming.clone(), h

    shared = (call.A,) if call.initial_state is None else (call.A, call.initial_state)
    return exchange(link, "selective_scan", combine, (steps, state), shared)


@torch.no_grad()
def end_length(call: ScanCall) -> int:
    """How many last positions of a part decide the state behind it: all, or as many as it takes to forget the rest.

    Without softplus a step may be negative, and then nothing is known of the steps before those that were seen.
    """
    total_length, A = call.u.shape[1], call.A
    if not call.delta_softplus or not total_length:
        return total_length
    slowest, limit = A.amax(1), -FORGOTTEN[A.dtype]
    total = _no_steps(call)
    seen, length = 0, min(FIRST_END, total_length)
    while length < total_length:
        start = seen if call.reverse else total_length - length
        total += _sum(call, start, length - seen)
        # Not-a-number is never forgotten.
        if bool((total * slowest <= limit).all()):
            return length
        seen, length = length, 2 * length
    return total_length


def _no_steps(call: ScanCall) -> Tensor:
    return call.A.new_zeros(call.delta.shape[0], call.delta.shape[2])


def _sum(call: ScanCall, start: int, length: int) -> Tensor:
    """The sum of the steps of some positions, (b, d), without gradient."""
    total = _no_steps(call)
    for at in range(start, start + length, PIECE):
        n = min(PIECE, start + length - at)
        mask = None if call.mask is None else call.mask.narrow(1, at, n)
        total += _steps(call.delta.narrow(1, at, n), call.delta_bias, mask, call.delta_softplus, call.A.dtype).sum(1)
    return total


def _steps(delta: Tensor, bias: Tensor | None, mask: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Steps as the scan takes them: after bias and softplus, 0 at absent positions, whatever stands there."""
    if mask is not None:
        delta = delta.masked_fill(~mask[..., None], 0)
    delta = delta.to(dtype)
    if bias is not None:
        delta = delta + bias
    if softplus:
        delta = F.softplus(delta, threshold=SOFTPLUS_THRESHOLD)
    return delta if mask is None else delta.masked_fill(~mask[..., None], 0)


def _step_sum(call: ScanCall) -> Tensor:
    """The sum of all steps of a call, (b, d), in the type of A."""
    return _StepSum.apply(call.delta, call.delta_bias, call)  # pyright: ignore[reportReturnType]


class _StepSum(torch.autograd.Function):
    """Piece after piece, and once more for the gradient: the steps themselves would be as large as delta in float32."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, bias: Tensor | None, call: ScanCall) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(delta, bias, call.mask)
        ctx.softplus, ctx.dtype = call.delta_softplus, call.A.dtype
        return _sum(call, 0, delta.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        delta, bias, mask = ctx.saved_tensors
        ddelta = torch.empty_like(delta)
        dbias = None if bias is None else torch.zeros_like(bias)
        for start in range(0, delta.shape[1], PIECE):
            n = min(PIECE, delta.shape[1] - start)
            present = None if mask is None else mask.narrow(1, start, n)
            rates = grad[:, None].expand(-1, n, -1)
            if ctx.softplus:
                # Only where softplus bends: beyond its threshold this is 1 in float64 too.
                inputs = _steps(delta.narrow(1, start, n), bias, present, False, ctx.dtype)
                rates = rates * torch.sigmoid(inputs)
            if present is not None:
                rates = rates.masked_fill(~present[..., None], 0)
            ddelta.narrow(1, start, n).copy_(rates)
            if dbias is not None:
                dbias += rates.sum((0, 1))
        return ddelta, dbias, None
