"""One launch of the scan's CUDA kernels, and the sizes that launches are chosen by."""

from typing import Any, NamedTuple

from selectra.ops.selective_scan.call import ScanCall


class Slice(NamedTuple):
    """The part of the sequences, and of every chunk's steps, that one launch of the backward takes."""

    first_sequence: int = 0
    sequences: int = 0
    first_step: int = 0
    steps: int = 0
    span: int = 0
    """Steps of a chunk."""


class Pass(NamedTuple):
    """One launch."""

    kernel: Any
    grid: tuple[int, int, int]
    threads: int
    chunk: int
    """What the word `chunk` is for it: steps of a chunk; for the last sums blocks of channels of a group."""
    part: Slice = Slice()
    """Where launches take slices of the work."""


class Launch(NamedTuple):
    """The launches of a call."""

    passes: tuple[Pass, ...]
    n_blocks: int
    """Along the channels."""
    chunk: int
    """Steps of a chunk of the length."""
    n_chunks: int
    rows_of_sums: int = 0
    """Rows of partial sums of B's and C's gradients at a time, where launches take slices of the work; else 0."""


class Sizes(NamedTuple):
    """A call's sizes."""

    batch: int
    length: int
    channels: int
    groups: int
    states: int
    n_seqs: int
    """Rows of the batch, or sequences that are packed along the length."""
    item_bytes: int
    """Of one number of u, delta, z, B and C."""
    gated: bool

    @staticmethod
    def of(call: ScanCall) -> "Sizes":
        """The sizes of a call."""
        batch, length = call.u.shape[:2]
        channels = call.A.shape[0]
        n_seqs = batch if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
        groups, states = call.B.shape[2:]
        return Sizes(batch, length, channels, groups, states, n_seqs, call.u.element_size(), call.z is not None)
