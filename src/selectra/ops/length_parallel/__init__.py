"""One sequence split over the processes of a group: each scans its part, and states are handed on from part to part."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from selectra.ops.causal_conv1d import causal_conv1d
from selectra.ops.length_parallel.conv import split_conv
from selectra.ops.length_parallel.kept import Kept
from selectra.ops.length_parallel.link import Link, join
from selectra.ops.length_parallel.scan import split_scan
from selectra.ops.selective_scan import selective_scan
from selectra.ops.whole import splits


@contextlib.contextmanager
def length_parallel(group: Any = None, *, timeout: float = 300.0) -> Iterator[Link]:
    """Inside the block sequences are split along their length over the processes of a group.

    Every process passes its part, the r-th one process r; parts follow each other in order of rank, may differ in
    length and may be empty. `selective_scan` and `causal_conv1d`, and what is built of them and of what acts on each
    position alone (`S6`, `Bidirectional`, `MambaLM`), then give each process its part of what one process would give
    for the whole, with `reverse` too, to rounding:

        with length_parallel() as length:
            logits = model(length.chunk(tokens))
            loss = cross_entropy(logits.flatten(0, 1), length.chunk(targets).flatten(), reduction="sum") / n_tokens
            loss.backward()
            length.sum_gradients(model.parameters())

    Initial states are passed alike in every process and final states are those of the whole sequence, in every
    process. Gradients are those of the sum of all processes' losses; of what all processes hold alike (parameters, an
    initial state) each gets a share, and the shares' sum is the whole.

    All processes must make the same calls in the same order, forward and backward: one whose loss is nothing calls
    backward of a zero that hangs on its outputs. Where activations are computed again during backward, backward
    belongs inside the block, too (`selectra.train.parallel.recomputed` sees to it by itself).

    Args:
        group: A process group of torch.distributed; None for all processes.
        timeout: Seconds after which an exchange is given up; the group's own limit holds as well.

    Yields:
        This process's place: `rank`, `size`, `chunk`, `sum_`, `sum_gradients`.

    Raises:
        ConfigError: There is no process group, or this process is not in it. Inside the block: packed sequences
            (`cu_seqlens`), and what needs the whole sequence in one process.
        RankError: Inside the block and in backward: another process ended or did not answer in time.
    """
    link = join(group, timeout)
    if link.size == 1:
        yield link
        return
    with _split_by(link):
        yield link
    link.settle()


@contextlib.contextmanager
def _split_by(link: Link) -> Iterator[None]:
    scan: Any = torch.compiler.disable(partial(split_scan, link=link))
    conv: Any = torch.compiler.disable(partial(split_conv, link=link))
    splits.append(link)
    try:
        with selective_scan.wrapping(scan), causal_conv1d.wrapping(conv):
            yield
    finally:
        splits.remove(link)


def computed_twice() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """What goes around a forward, and later, where it is computed again during backward, around that.

    The second brings the split of this moment back, and what the processes told each other the first time.
    """
    link = splits[-1] if splits else None
    if not isinstance(link, Link):
        return contextlib.nullcontext(), contextlib.nullcontext()
    kept = Kept()
    return kept.first_time(), _again(link, kept)


@contextlib.contextmanager
def _again(link: Link, kept: Kept) -> Iterator[None]:
    with _split_by(link), kept.second_time():
        yield


__all__ = ["Link", "computed_twice", "length_parallel"]
