"""A sequence split over processes gives what one process gives: outputs and every gradient."""

import contextlib
import functools
import time
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from selectra import length_parallel
from selectra.errors import ConfigError, RankError
from selectra.mixers import SSD, CausalAttention, CrossScan2d, EinFFT, SelectiveChannel
from selectra.ops import causal_conv1d, selective_scan
from selectra.ops.length_parallel import link as length_link
from selectra.ops.length_parallel.ends import FIRST_END, end_length
from selectra.ops.length_parallel.link import MOST_UNDER_WAY, Link
from selectra.ops.selective_scan.call import prepare
from tests.ops.cases import Case, assert_close, conv_case, run, scan_case
from tests.ops.split import cuts, parts, together

ALONG = {"scan": ("u", "delta", "B", "C", "z", "mask"), "conv": ("x", "mask")}
CASES = {"scan": scan_case, "conv": conv_case}
OPS = {"scan": selective_scan, "conv": causal_conv1d}
CALLS = [
    (kind, seed, dtype)
    for kind, seeds in (("scan", range(24)), ("conv", range(24)))
    for seed in seeds
    if "cu_seqlens" not in CASES[kind](seed).integers
    for dtype in (torch.float64, torch.float32)
]


def part_of(kind: str, case: Case, borders: list[int], rank: int) -> Case:
    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Repeated, not by stride: a gradient for every position is what is put together again.
        return {name: parts(x, borders)[rank].clone() if name in ALONG[kind] else x for name, x in tensors.items()}

    return Case(cut(case.tensors), case.flags, cut(case.integers))


def split_calls() -> dict[tuple[str, int, torch.dtype], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Outputs and gradients of this process, of every case."""
    rank, n = distributed.get_rank(), distributed.get_world_size()
    found = {}
    with length_parallel(timeout=30):
        for kind, seed, dtype in CALLS:
            case = CASES[kind](seed)
            borders = cuts(length_of(case), n, seed)
            part = part_of(kind, case, borders, rank)
            asked = {0: "reference", 1: "portable"}.get(seed % 4)
            with contextlib.nullcontext() if asked is None else OPS[kind].using(asked):
                found[kind, seed, dtype] = loss_of_part(kind, part, case, dtype, borders)
    return found


def length_of(case: Case) -> int:
    return next(case.tensors[name] for name in ("u", "x") if name in case.tensors).shape[1]


def loss_of_part(kind: str, part: Case, whole: Case, dtype: torch.dtype, borders: list[int]):
    """As `run`, whose loss is the sum of all processes'; the first one's has the final state."""
    rank = distributed.get_rank()
    leaves = part.leaves(dtype)
    y, state = OPS[kind](**part.arguments(leaves), **part.integers, **part.flags, return_final_state=True)
    generator = torch.Generator().manual_seed(1)
    shapes = ((y.shape[0], length_of(whole), y.shape[2]), state.shape)
    of_y, of_state = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    loss = (y * parts(of_y, borders)[rank]).sum() + (state * of_state).sum() * (rank == 0)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "final_state": state.detach()}, dict(zip(leaves, grads, strict=True))


def put_together(kind: str, found: Sequence[dict[str, Tensor]], shared_is_summed: bool) -> dict[str, Tensor]:
    whole = {}
    for name in found[0]:
        pieces = [one[name] for one in found]
        if name in (*ALONG[kind], "y"):
            whole[name] = torch.cat(pieces, 1)
        elif shared_is_summed:
            whole[name] = torch.stack(pieces).sum(0)
        else:
            for piece in pieces[1:]:
                assert torch.equal(piece, pieces[0])
            whole[name] = pieces[0]
    return whole


@functools.cache
def truth(kind: str, seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    case = CASES[kind](seed)
    repeated = Case({name: x.contiguous() for name, x in case.tensors.items()}, case.flags, case.integers)
    with OPS[kind].using("reference"):
        return run(OPS[kind], repeated, torch.float64, dtype)


@pytest.mark.dist
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_parts_give_the_whole(n):
    found = together(n, split_calls)
    for kind, seed, dtype in CALLS:
        outputs, grads = zip(*(one[kind, seed, dtype] for one in found), strict=True)
        of_outputs, of_grads = truth(kind, seed, dtype)
        wide, what = dtype is torch.float64, f"{kind} {seed} over {n} in {dtype}"
        assert_close(put_together(kind, outputs, False), of_outputs, 1e-10 if wide else 1e-6, what)
        assert_close(put_together(kind, grads, True), of_grads, 1e-10 if wide else 1e-5, what)


def far_past(lasting: float = 1.0) -> dict[str, Tensor]:
    """A call in which 2500 positions forget, or with less than 1 do not."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(1, 5000, generator=generator) < 0.9
    tensors = {"u": normal(1, 5000, 3), "delta": normal(1, 5000, 3) - 2.6, "A": lasting * (-normal(3, 2).abs() - 0.45)}
    tensors |= {"B": normal(1, 5000, 2), "C": normal(1, 5000, 2), "delta_bias": normal(3) * 0.1}
    return {**tensors, "mask": mask}


def fades(tensors: dict[str, Tensor], length: int, reverse: bool) -> float:
    """The logarithm of what the slowest state keeps over the last positions."""
    delta = F.softplus(tensors["delta"] + tensors["delta_bias"]) * tensors["mask"][..., None]
    steps = delta[:, :length] if reverse else delta[:, -length:]
    return float((steps.sum(1)[..., None] * tensors["A"]).max())


PASTS = [(1.0, False), (1.0, True), (1e-3, False)]


def call_of(tensors: dict[str, Tensor], reverse: bool, **more) -> dict:
    return {**tensors, "delta_softplus": True, "reverse": reverse, **more}


def scan_far() -> list:
    found = []
    rank = distributed.get_rank()
    with length_parallel(timeout=30) as length:
        for lasting, reverse in PASTS:
            tensors = far_past(lasting)
            leaves = {
                name: (length.chunk(x).clone() if name in ALONG["scan"] else x).requires_grad_(name != "mask")
                for name, x in tensors.items()
            }
            y, state = selective_scan(**call_of(leaves, reverse, return_final_state=True))
            loss = (y * y).sum() + state.sum() * (rank == 1)
            wanted = [name for name in leaves if name != "mask"]
            grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
            found.append(({"y": y.detach(), "final_state": state.detach()}, dict(zip(wanted, grads, strict=True))))
    return found


@pytest.mark.dist
def test_a_far_past_is_left_out_and_nothing_changes():
    found = together(2, scan_far)
    for index, (lasting, reverse) in enumerate(PASTS):
        tensors = far_past(lasting)
        for part in (0, 1):
            half = {k: x.tensor_split(2, 1)[part] if k in ALONG["scan"] else x for k, x in tensors.items()}
            for there in (False, True):
                # What the last positions make of the state and, the other way, the first ones of its gradient.
                length = end_length(prepare(**call_of(half, there)))
                if lasting < 1:
                    assert length == 2500
                    continue
                # The test means something only where a part of the work was left out.
                assert FIRST_END < length < 2500
                assert fades(half, length, there) <= -100 < fades(half, length // 2, there)
        leaves = {name: x.requires_grad_(name != "mask") for name, x in tensors.items()}
        with selective_scan.using("portable"):
            y, state = selective_scan(**call_of(leaves, reverse, return_final_state=True))
        wanted = [name for name in leaves if name != "mask"]
        grads = torch.autograd.grad((y * y).sum() + state.sum(), [leaves[name] for name in wanted])
        outputs, of_parts = zip(*(one[index] for one in found), strict=True)
        truths = {"y": y.detach(), "final_state": state.detach()}
        what = f"reverse={reverse}, {lasting} of the decay"
        assert_close(put_together("scan", outputs, False), truths, 1e-12, what)
        assert_close(put_together("scan", of_parts, True), dict(zip(wanted, grads, strict=True)), 1e-10, what)


def test_what_is_remembered_is_looked_at_whole():
    tensors = far_past()
    for changed in (
        {"A": -tensors["A"]},
        {"A": tensors["A"] * 1e-6},
        {"delta_bias": torch.full((3,), torch.nan).double()},
    ):
        assert end_length(prepare(**call_of({**tensors, **changed}, False))) == 5000
    assert (
        end_length(prepare(**{**call_of(tensors, False), "delta": tensors["delta"].abs(), "delta_softplus": False}))
        == 5000
    )
    # A sum of steps over 1024 of 5000 positions that the mask leaves out forgets nothing.
    absent = torch.zeros(1, 5000, dtype=torch.bool)
    assert end_length(prepare(**call_of({**tensors, "mask": absent}, False))) == 5000


def two_calls(fault: str) -> tuple[str, str, float]:
    """The error of the process that waits, and how long that took."""
    rank, x = distributed.get_rank(), torch.ones(1, 4, 2, requires_grad=True)
    with length_parallel(timeout=3):
        y = causal_conv1d(x, torch.ones(2, 3))
        start = time.monotonic()
        if rank == 1:
            if fault == "stalls":
                time.sleep(12)
            return "", "", 0.0
        try:
            y.sum().backward() if fault == "backward" else causal_conv1d(x, torch.ones(2, 3))
        except RankError as error:
            return type(error).__name__, str(error), time.monotonic() - start
    return "", "", 0.0


@pytest.mark.dist
@pytest.mark.parametrize("fault", ["stalls", "ends", "backward"])
def test_a_process_that_stalls_or_ends_is_named_in_time(fault):
    (name, message, seconds), _ = together(2, two_calls, fault, timeout=30.0)
    assert name == "RankError"
    assert "causal_conv1d: process 0 of 2" in message or "the backward of causal_conv1d: process 0 of 2" in message
    assert ("backward of" in message) == (fault == "backward")
    assert "3 s" in message and seconds < 8


def refused() -> list[str]:
    messages = []
    x = torch.ones(1, 4, 8)
    calls = (
        lambda: causal_conv1d(x, torch.ones(8, 3), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)),
        lambda: selective_scan(
            x, x, -torch.ones(8, 2), x[..., :2], x[..., :2], cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
        ),
        lambda: SSD(8, 4, d_head=4)(x),
        lambda: CausalAttention(8, 2)(x),
        lambda: EinFFT(8, n_blocks=2)(x),
        lambda: SelectiveChannel(8)(x),
        lambda: CrossScan2d(8)(x.view(1, 2, 2, 8)),
    )
    with length_parallel(timeout=30):
        for call in calls:
            with pytest.raises(ConfigError) as caught:
                call()
            messages.append(str(caught.value))
    for call in calls[2:]:
        call()
    return messages


@pytest.mark.dist
def test_what_needs_the_whole_sequence_says_so():
    for messages in together(2, refused):
        assert all("cu_seqlens" in message for message in messages[:2])
        assert all("needs the whole sequence" in message for message in messages[2:])


class Work:
    """An exchange of GPUs that is under way."""

    def __init__(self) -> None:
        self.limits: list[timedelta | None] = []

    def wait(self, limit: timedelta | None = None) -> None:
        self.limits.append(limit)
        if limit is not None and limit < timedelta(seconds=1):
            raise RuntimeError("Watchdog caught collective operation timeout")


def test_on_a_gpu_the_stream_waits_at_once_and_the_host_later():
    link: Link = Link(None, 0, 2, 30.0)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    works = [Work() for _ in range(MOST_UNDER_WAY + 3)]
    for work in works:
        link._finish("selective_scan", on_gpu, lambda work=work: work)
    limit = timedelta(seconds=30)
    assert [work.limits for work in works] == [[None, limit]] * 3 + [[None]] * MOST_UNDER_WAY
    link.settle()
    assert all(work.limits == [None, limit] for work in works)
    late = Link(None, 0, 2, 0.5)
    late._finish("selective_scan", on_gpu, Work)
    with pytest.raises(RankError, match=r"selective_scan: process 0 of 2.*within 0\.5 s"):
        late.settle()


def summed() -> list[Tensor | None]:
    rank = distributed.get_rank()
    shapes = [
        ((3, 4), torch.float32),
        ((0,), torch.float32),
        ((5,), torch.float64),
        ((2, 3), torch.float32),
        ((), None),
    ]
    leaves = [torch.zeros(shape, dtype=dtype or torch.float32).requires_grad_() for shape, dtype in shapes]
    for i, leaf in enumerate(leaves[:4]):
        # The last one has a gradient in one process alone, and not as it lies in memory.
        if i < 3 or rank == 1:
            grad = torch.arange(leaf.numel(), dtype=leaf.dtype).view(leaf.shape[::-1]).permute(*range(leaf.dim())[::-1])
            leaf.grad = (grad + i) * (rank + 1)
    with length_parallel(timeout=30) as length:
        length.sum_gradients(leaves)
    return [leaf.grad for leaf in leaves]


@pytest.mark.dist
def test_gradients_are_added_up_in_pieces(monkeypatch):
    for found in together(2, summed):
        *grads, none = found
        assert none is None
        for i, (grad, times) in enumerate(zip(grads, (3, 3, 3, 2), strict=True)):
            numbers = torch.arange(grad.numel(), dtype=grad.dtype).view(grad.shape[::-1])
            assert torch.equal(grad, (numbers.permute(*range(grad.dim())[::-1]) + i) * times)
    sizes = [torch.zeros(n, dtype=dtype) for n, dtype in ((3, torch.float32), (2, torch.float32), (1, torch.float64))]
    monkeypatch.setattr(length_link, "BYTES_AT_ONCE", 16)
    assert [[len(x) for x in piece] for piece in length_link._pieces(sizes)] == [[3], [2], [1]]
    monkeypatch.setattr(length_link, "BYTES_AT_ONCE", 20)
    assert [[len(x) for x in piece] for piece in length_link._pieces(sizes)] == [[3, 2], [1]]


def test_a_split_needs_a_group_and_a_limit():
    with pytest.raises(ConfigError, match="torchrun"), length_parallel():
        pass
    with pytest.raises(ConfigError, match="above 0"), length_parallel(timeout=0):
        pass
