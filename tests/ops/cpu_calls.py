"""Random calls of the compiled CPU kernels, and how far they are from the reference."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectra.ops import causal_conv1d, selective_scan
from selectra.ops.native.library import Library, library
from tests.ops import cases

# Where a scan's call holds its pieces of time, as in call.h.
PIECES_WORD = 8

# Of an output and of a gradient. Some of many cases are sums that cancel: more than 1e-6 of them is rounding. bfloat16
# results are rounded once, to 8 bits, from float32.
TOLERANCES = {
    torch.float64: (cases.FLOAT64, 10 * cases.FLOAT64),
    torch.float32: (4 * cases.FLOAT32_OUTPUT, cases.FLOAT32_GRADIENT),
    torch.bfloat16: (2.0**-8 + cases.FLOAT32_OUTPUT, 2.0**-8 + cases.FLOAT32_GRADIENT),
}


class Drawn(NamedTuple):
    """One random call."""

    seed: int
    name: str
    case: Any
    dtype: torch.dtype
    build: int
    threads: int
    pieces: int


@contextmanager
def in_pieces(count: int) -> Iterator[None]:
    """Scans with each sequence cut into `count` pieces of time, or as many as it has chunks; 0: as by itself."""
    call = Library.call

    def cut(self: Library, function: str, dtype: torch.dtype, words: list[int]) -> None:
        if function.startswith("scan"):
            words[PIECES_WORD] = count
        call(self, function, dtype, words)

    Library.call = cut  # type: ignore[method-assign]
    try:
        yield
    finally:
        Library.call = call  # type: ignore[method-assign]


def draw(seed: int, builds: list[int]) -> Drawn:
    """The call of a seed."""
    rng = random.Random(f"cpu {seed}")
    name = "causal_conv1d" if seed % 3 == 0 else "selective_scan"
    case = cases.conv_case(seed) if name == "causal_conv1d" else cases.scan_case(seed)
    dtype = rng.choice(list(TOLERANCES))
    if dtype == torch.bfloat16:
        case.tensors = {key: rounded(tensor) for key, tensor in case.tensors.items()}
    return Drawn(
        seed, name, case, dtype, rng.choice(builds), rng.choice([1, 1, 2, 3]), pieces=rng.choice([0, 0, 0, 2, 3, 5])
    )


def rounded(tensor: Tensor) -> Tensor:
    """The nearest numbers in bfloat16, as float64 with the same strides."""
    once = tensor[:, :1] if cases.is_constant_in_time(tensor) else tensor
    kept = torch.empty_strided(once.size(), once.stride(), dtype=tensor.dtype).copy_(once.bfloat16())
    return kept.expand_as(tensor)


def errors(drawn: Drawn) -> Iterator[tuple[str, float, float]]:
    """Name, relative error and tolerance of every output and gradient."""
    op: Any = {"selective_scan": selective_scan, "causal_conv1d": causal_conv1d}[drawn.name]
    with op.using("reference"):
        truth = cases.run(op, drawn.case, torch.float64, drawn.dtype)
    library().build = drawn.build
    torch.set_num_threads(drawn.threads)
    with op.using("cpu"), in_pieces(drawn.pieces):
        found = cases.run(op, drawn.case, drawn.dtype)
    torch.set_num_threads(1)
    for got, want, tolerance in zip(found, truth, TOLERANCES[drawn.dtype], strict=True):
        for name, exact in want.items():
            # Of a tensor that is constant in time autograd adds up the gradients of all steps, in bfloat16.
            if drawn.dtype == torch.bfloat16 and cases.is_constant_in_time(drawn.case.tensors.get(name)):
                continue
            yield name, relative_error(name, got[name], exact, want), tolerance


def relative_error(name: str, got: Tensor, exact: Tensor, all_exact: dict[str, Tensor]) -> float:
    """The largest difference over the truth's largest number; infinite where a result is not finite."""
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return float("inf")
    if not exact.numel():
        return 0.0
    scale = exact.abs().max().item()
    if name == "delta_bias" and all_exact["delta"].numel():
        # It is the sum of delta's gradients and may cancel to nothing.
        scale = max(scale, all_exact["delta"].abs().max().item())
    return (got.double() - exact).abs().max().item() / (scale or 1.0)
