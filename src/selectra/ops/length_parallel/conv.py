"""`causal_conv1d` of a sequence whose parts lie in several processes: each needs the last inputs before its own."""

from typing import Any

import torch
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops.causal_conv1d import causal_conv1d
from selectra.ops.causal_conv1d.call import ConvCall
from selectra.ops.length_parallel.chain import exchange, with_end
from selectra.ops.length_parallel.link import Link


def split_conv(call: ConvCall, link: Link) -> Any:
    """The call's part of y, and where asked for the last inputs of all parts."""
    if call.cu_seqlens is not None:
        raise ConfigError(
            "cu_seqlens cannot be used inside length_parallel: one sequence is split there. Give each process whole "
            "sequences and leave the block, or pad them and pass a mask."
        )
    taps = call.weight.shape[1]
    fresh = causal_conv1d.choose(call).name != "reference"
    length = min(taps, call.x.shape[1])
    x, end = with_end(call.x, length, call.reverse, fresh)
    last = _last_inputs(end, call, taps)
    count = last.new_full((1,), length)
    before, final = _chained(link, call, last, count)
    found = causal_conv1d.run(call._replace(x=x, initial_state=before, return_final_state=False))
    return (found, final) if call.return_final_state else found


def _last_inputs(end: Tensor, call: ConvCall, taps: int) -> Tensor:
    """The last inputs of this part in scan order, (b, d, k), zeros before them where the part is shorter."""
    length = end.shape[1]
    if call.mask is not None:
        start = 0 if call.reverse else call.mask.shape[1] - length
        end = end.masked_fill(~call.mask.narrow(1, start, length)[..., None], 0)
    if call.reverse:
        end = end.flip(1)
    return torch.nn.functional.pad(end.to(call.weight.dtype).transpose(1, 2), (taps - length, 0))


def _chained(link: Link, call: ConvCall, last: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    """The last inputs before this process's part, and those of all parts."""
    order = range(link.size - 1, -1, -1) if call.reverse else range(link.size)
    taps = last.shape[2]
    places = torch.arange(taps, device=last.device)

    def combine(told: list[tuple[Tensor, ...]], initial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state = initial[0] if initial else torch.zeros_like(last)
        before = state
        for rank in order:
            if rank == link.rank:
                before = state
            inputs, count = told[rank]
            # A part that is shorter than the filter moves what stands there towards the past.
            n = count.detach().round().to(torch.int64)
            moved = state.index_select(2, (places + n).clamp(max=taps - 1))
            state = torch.where(places < taps - n, moved, inputs)
        # An output must not be an input.
        return before.clone(), state.clone()

    shared = () if call.initial_state is None else (call.initial_state,)
    return exchange(link, "causal_conv1d", combine, (last, count), shared)
