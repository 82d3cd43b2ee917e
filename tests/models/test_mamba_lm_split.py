"""Mamba over a sequence that several processes share: logits, loss and every parameter's gradient."""

from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

from selectra import S6, Bidirectional, length_parallel
from selectra.models import MambaLM
from selectra.ops import selective_scan
from selectra.ops.length_parallel import Link
from selectra.train.parallel import recomputed
from tests.ops.split import together

BORDERS = (0, 9, 9, 23, 30)
"""Of four parts, of which one is empty."""


def model() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(vocab_size=11, d_model=8, depth=3, d_state=4).double()


def sequence() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :4] = mask[1, -5:] = False
    return torch.randint(0, 11, (2, 30)), torch.randint(0, 11, (2, 30)), mask


def loss_of(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of the whole sequence, of this part."""
    return F.cross_entropy(logits[mask], targets[mask], reduction="sum") / sequence()[2].sum()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def mine(x: Tensor) -> Tensor:
    rank = distributed.get_rank()
    return x[:, BORDERS[rank] : BORDERS[rank + 1]]


def trained(again: bool) -> tuple[Tensor, dict[str, Tensor]]:
    net, (tokens, targets, mask) = model(), (mine(x) for x in sequence())
    calls: list[bool] = []
    told: list[str] = []
    gather = Link.gather

    def counted(self: Link, tensor: Tensor, what: str) -> Tensor:
        told.append(what)
        return gather(self, tensor, what)

    mixer: nn.Module = net.mixers()[1]
    mixer.register_forward_pre_hook(lambda *_: calls.append(again))
    with recomputed(net, again), mock.patch.object(Link, "gather", counted):
        with length_parallel(timeout=30) as length:
            logits = net(tokens, mask=mask)
        # Recomputation knows the split by itself, and what was told in the forward.
        loss_of(logits, targets, mask).backward()
    # Of three blocks; a convolution's backward is a sum.
    forward, backward = ["causal_conv1d", "selective_scan"] * 3, ["the backward of selective_scan"] * 3
    assert told == forward + backward
    # A mixer that is computed again is called again.
    assert len(calls) == (2 if again else 1)
    length.sum_gradients(net.parameters())
    return logits.detach(), gradients(net)


def both(again: tuple[bool, ...]) -> list:
    return [trained(each) for each in again]


@pytest.mark.dist
def test_a_language_model_trains_on_parts_as_on_the_whole():
    found = together(4, both, (False, True))
    net, (tokens, targets, mask) = model(), sequence()
    logits = net(tokens, mask=mask)
    loss_of(logits, targets, mask).backward()
    for index in range(2):
        parts, grads = zip(*(one[index] for one in found), strict=True)
        torch.testing.assert_close(torch.cat(parts, 1)[mask], logits[mask], rtol=1e-10, atol=1e-10)
        for each in grads:
            torch.testing.assert_close(each, gradients(net), rtol=1e-10, atol=1e-10)


def blocks() -> list[nn.Module]:
    torch.manual_seed(2)
    return [S6(6, d_state=3).double(), S6(6, d_state=3, bias=True).double(), Bidirectional(6, d_state=3).double()]


def mixed() -> list[Tensor]:
    torch.manual_seed(3)
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    with length_parallel(timeout=30), torch.no_grad():
        return [block(mine(x), **({"reverse": True} if i == 1 else {})) for i, block in enumerate(blocks())]


@pytest.mark.dist
def test_mixers_run_over_parts_in_both_directions():
    found = together(4, mixed)
    torch.manual_seed(3)
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    for i, block in enumerate(blocks()):
        with torch.no_grad():
            whole = block(x, **({"reverse": True} if i == 1 else {}))
        torch.testing.assert_close(torch.cat([one[i] for one in found], 1), whole, rtol=1e-10, atol=1e-10)
        # Parts that do not hear of each other give something else.
        with torch.no_grad():
            alone = block(x[:, 9:23], **({"reverse": True} if i == 1 else {}))
        assert (alone - whole[:, 9:23]).abs().max() > 1e-4


def recomputed_outside() -> str:
    block = S6(6, d_state=3).double()
    x = torch.randn(1, 8, 6, dtype=torch.float64, requires_grad=True)
    with length_parallel(timeout=30):
        y = checkpoint(block, x, use_reentrant=False)
    try:
        y.sum().backward()
    except CheckpointError as error:
        return type(error).__name__
    return ""


@pytest.mark.dist
def test_plain_recomputation_outside_the_block_is_no_silent_error():
    assert together(2, recomputed_outside) == ["CheckpointError"] * 2


def test_one_process_alone_runs_as_ever(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with length_parallel() as length:
            assert isinstance(length, Link) and not selective_scan.wrapped
            x = torch.randn(1, 5, 2)
            assert torch.equal(length.chunk(x), x)
    finally:
        distributed.destroy_process_group()
