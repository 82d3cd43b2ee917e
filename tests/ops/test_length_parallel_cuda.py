"""A sequence's parts on the scan's CUDA kernels, on an emulated device: one thread a part, one at a time."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.ops import selective_scan
from selectra.ops.length_parallel import kept
from selectra.ops.length_parallel.link import Link
from selectra.ops.length_parallel.scan import split_scan
from selectra.ops.selective_scan import cuda, halves, reference, registration, wide
from selectra.ops.selective_scan.call import ScanCall, prepare
from selectra.ops.selective_scan.faults import faults
from tests.ops import cases
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu
from tests.ops.split import parts

__all__ = ["emulated_gpu"]
ALONG = ("u", "delta", "B", "C", "z", "mask")


@dataclass
class Table:
    """Where parts put what they tell; whoever runs holds the lock."""

    size: int
    running: threading.Lock = field(default_factory=threading.Lock)
    told: dict[int, Tensor] = field(default_factory=dict)
    n_exchanges: int = 0

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)

    def exchange(self, rank: int, tensor: Tensor) -> Tensor:
        self.told[rank] = tensor.clone()
        self.n_exchanges += rank == 0
        self.running.release()
        try:
            self.barrier.wait()
            found = torch.stack([self.told[i] for i in range(self.size)])
            self.barrier.wait()
        finally:
            self.running.acquire()
        return found


@dataclass(frozen=True)
class Seat(Link):
    table: Table = field(default_factory=lambda: Table(1))

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        return self.table.exchange(self.rank, tensor)


@pytest.fixture(autouse=True)
def gpu(emulated_gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedGpu]:
    """The emulated device, which every call is for; new memory holds NaN."""
    stand_in = SimpleNamespace(name="cuda", run=partial(registration.run, backend="cuda"))
    monkeypatch.setattr(selective_scan, "choose", lambda call: stand_in)
    monkeypatch.setattr(wide, "FEWEST_STEPS_OF_CHUNK", 64)
    forget_plans()
    faults.of(-1).word.value = 0
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield emulated_gpu
    torch.use_deterministic_algorithms(before)
    forget_plans()


def forget_plans() -> None:
    for plans in (cuda.forward_plans, cuda.backward_plans, halves.forward_plans, halves.backward_plans):
        plans.clear()


def drawn(length: int, d: int, n: int, dtype: torch.dtype, slow: float) -> dict[str, Tensor]:
    """Tensors of a call, in float64, of numbers that their types hold.

    Args:
        slow: What the slowest state keeps over a position, as a logarithm.
    """
    generator = torch.Generator().manual_seed(length * d + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {name: normal(2, length, d) for name in ("u", "delta", "z")}
    tensors |= {name: normal(2, length, 1, n) for name in ("B", "C")}
    tensors |= {"D": normal(d), "delta_bias": normal(d) * 0.1, "initial_state": normal(2, d, n)}
    tensors |= {"A": -(normal(d, n).exp() + slow)}
    tensors["A"][0, 0] = -slow
    return {name: x.to(dtype if name in ALONG else torch.float32).double() for name, x in tensors.items()}


def one_part(
    seat: Seat, tensors: dict[str, Tensor], flags: dict[str, Any], borders: list[int], dtype: torch.dtype, twice: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one process: of a loss to which the last alone adds the final state."""
    with seat.table.running:
        mine = {k: parts(x, borders)[seat.rank].clone() if k in ALONG else x for k, x in tensors.items()}
        leaves = {k: x.to(dtype if k in ALONG else torch.float32).requires_grad_() for k, x in mine.items()}
        more = {"mask": parts(flags["mask"], borders)[seat.rank].clone()} if "mask" in flags else {}
        call = call_of(leaves, flags | more)
        assert halves.takes(call)
        if twice:
            memory = kept.Kept()
            with memory.first_time():
                first = split_scan(call, seat)
            count = seat.table.n_exchanges
            with memory.second_time():
                outputs = split_scan(call, seat)
            assert seat.table.n_exchanges == count and not memory.found
            assert all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True))
        else:
            outputs = split_scan(call, seat)
        y, state = outputs
        of_y, of_state = (weights(x.shape, i) for i, x in enumerate((tensors["u"], state)))
        loss = (y * parts(of_y, borders)[seat.rank].to(y.dtype)).sum()
        if seat.rank == seat.size - 1:
            loss = loss + (state * of_state.to(state.dtype)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {"y": y.detach(), "final_state": state.detach()}, dict(zip(leaves, grads, strict=True))


def call_of(leaves: dict[str, Tensor], flags: dict[str, Any]) -> ScanCall:
    arguments: dict[str, Any] = {**leaves, "delta_softplus": True, "return_final_state": True, **flags}
    return prepare(**arguments)


def weights(shape: torch.Size, seed: int) -> Tensor:
    """Numbers of few digits, which all types hold."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-4, 5, shape, generator=generator) / 4).double()


def compare(
    tensors: dict[str, Tensor], borders: list[int], dtype: torch.dtype, twice: bool = False, **flags: Any
) -> Table:
    """All parts together against the reference in float64."""
    table = Table(len(borders) - 1)
    seats = [Seat(None, rank, table.size, 60.0, table=table) for rank in range(table.size)]
    with ThreadPoolExecutor(table.size) as pool:
        found = list(pool.map(lambda seat: one_part(seat, tensors, flags, borders, dtype, twice), seats))
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    call = call_of(leaves, flags)
    y, state = reference.run(call)
    loss = (y * weights(y.shape, 0)).sum() + (state * weights(state.shape, 1)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    truth = {"y": y.detach(), "final_state": state.detach()}
    of_grads = dict(zip(leaves, grads, strict=True))
    half = dtype != torch.float32
    for rank in range(1, table.size):
        assert torch.equal(found[0][0]["final_state"], found[rank][0]["final_state"])
    outputs = {"y": torch.cat([one[0]["y"] for one in found], 1), "final_state": found[0][0]["final_state"]}
    cases.assert_close(outputs, truth, 4 * torch.finfo(dtype).eps if half else cases.FLOAT32_OUTPUT, "outputs")
    whole = {}
    for name in leaves:
        pieces = [grads[name] for _, grads in found]
        whole[name] = torch.cat(pieces, 1) if name in ALONG else torch.stack(pieces).sum(0)
    cases.assert_close(whole, of_grads, 4 * torch.finfo(dtype).eps if half else cases.FLOAT32_GRADIENT, "gradients")
    return table


# A past that 60 positions forget, so that passes stop before a chunk's start; one that lasts through every part.
@pytest.mark.parametrize("slow", [2.5, 0.002])
@pytest.mark.parametrize("reverse", [False, True])
def test_parts_in_halves_give_the_whole(slow: float, reverse: bool, gpu: EmulatedGpu) -> None:
    gpu.multiprocessors = 40
    tensors = drawn(461, 10, 6, torch.float32, slow)
    # Parts of several chunks, of one position, and of one chunk.
    compare(tensors, [0, 261, 262, 461], torch.float32, reverse=reverse)
    found = {plans.n_chunks for plans in (*halves.forward_plans.values(), *halves.backward_plans.values())}
    assert 1 in found and max(found) > 1


def test_half_types_masks_slices_and_a_second_time(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.multiprocessors = 40
    # The backward in several launches, which share the room for states.
    for name, value in (("FEWEST_BYTES_OF_SUMS", 1), ("SHARE_OF_SUMS", 24), ("FEWEST_STEPS_OF_SLICE", 32)):
        monkeypatch.setattr(wide, name, value)
    tensors = drawn(300, 16, 12, torch.bfloat16, 0.01)
    mask = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.8
    for name in ("u", "delta", "B", "C", "z"):
        tensors[name][~mask] = math.nan
    table = compare(tensors, [0, 72, 300], torch.bfloat16, twice=True, mask=mask)
    # Forward and backward, not when it was computed again.
    assert table.n_exchanges == 2
    assert {len(plans.rest.passes) > 3 for plans in halves.backward_plans.values()} == {True}
    assert {plans.n_chunks > 1 for plans in halves.backward_plans.values()} == {True, False}


def test_other_calls_run_whole() -> None:
    u, A, B = torch.ones(1, 8, 6), -torch.ones(6, 6), torch.ones(1, 8, 6)
    taken = prepare(u, u, A, B, B)
    assert halves.takes(taken)
    others = (
        prepare(u, u, A[:, :4], B[..., :4], B[..., :4]),
        prepare(u, u, A, B, B, out_dtype=torch.bfloat16),
        prepare(u, u.bfloat16(), A, B, B),
        prepare(u[:, :0], u[:, :0], A, B[:, :0], B[:, :0]),
        taken._replace(A=-torch.ones(6, 65)),
    )
    assert not any(halves.takes(call) for call in others)
