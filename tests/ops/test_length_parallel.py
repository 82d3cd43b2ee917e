"""A sequence split over processes gives what one process gives: outputs and every gradient."""

import pytest
import torch
from torch import Tensor, distributed

from selectra import length_parallel
from selectra.errors import ConfigError, RankError
from selectra.ops import causal_conv1d, selective_scan
from selectra.ops.length_parallel.scan import end_length
from tests.ops.cases import Case, assert_close, conv_case, run, scan_case
from tests.ops.split import cuts, parts, together

ALONG = {"scan": ("u", "delta", "B", "C", "z", "mask"), "conv": ("x", "mask")}
CASES = {"scan": scan_case, "conv": conv_case}
OPS = {"scan": selective_scan, "conv": causal_conv1d}
SEEDS = {kind: [seed for seed in range(30) if "cu_seqlens" not in CASES[kind](seed).integers] for kind in CASES}


def part_of(kind: str, case: Case, borders: list[int], rank: int) -> Case:
    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Repeated, not by stride: a gradient for every position is what is put together again.
        return {name: parts(x, borders)[rank].clone() if name in ALONG[kind] else x for name, x in tensors.items()}

    return Case(cut(case.tensors), case.flags, cut(case.integers))


def split_calls(kind: str, dtype: torch.dtype) -> list:
    """Outputs and gradients of this process, of every case."""
    rank, n = distributed.get_rank(), distributed.get_world_size()
    found = []
    with length_parallel(timeout=30):
        for seed in SEEDS[kind]:
            case = CASES[kind](seed)
            part = part_of(kind, case, cuts(length_of(case), n, seed), rank)
            found.append(loss_of_part(kind, part, case, dtype, cuts(length_of(case), n, seed), rank))
    return found


def length_of(case: Case) -> int:
    return next(case.tensors[name] for name in ("u", "x") if name in case.tensors).shape[1]


def weights_of(y: Tensor, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (y, state))  # pyright: ignore


def loss_of_part(kind, part, whole, dtype, borders, rank):
    leaves = part.leaves(dtype)
    y, state = OPS[kind](**part.arguments(leaves), **part.integers, **part.flags, return_final_state=True)
    batch, _, d = y.shape
    for_y, for_state = weights_of(torch.empty(batch, length_of(whole), d), state, dtype)
    loss = (y * parts(for_y, borders)[rank]).sum()
    # One process's loss has the final state, whatever part it holds.
    loss = loss + (state * for_state).sum() * (rank == 0)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "final_state": state.detach()}, dict(zip(leaves, grads, strict=True))


def put_together(kind: str, found: list[dict[str, Tensor]], shared_is_summed: bool) -> dict[str, Tensor]:
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


@pytest.mark.dist
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", ["scan", "conv"])
def test_parts_give_the_whole(kind, n):
    for dtype, output, gradient in ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-6, 1e-5)):
        found = together(n, split_calls, kind, dtype)
        for index, seed in enumerate(SEEDS[kind]):
            case = CASES[kind](seed)
            repeated = Case({k: x.contiguous() for k, x in case.tensors.items()}, case.flags, case.integers)
            with OPS[kind].using("reference"):
                truths = run(OPS[kind], repeated, torch.float64, dtype)
            outputs = put_together(kind, [one[index][0] for one in found], False)
            grads = put_together(kind, [one[index][1] for one in found], True)
            what = f"{kind} {seed} over {n} in {dtype}"
            assert_close(outputs, truths[0], output, what)
            assert_close(grads, truths[1], gradient, what)
