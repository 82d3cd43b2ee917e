"""Both directions in one node on a GPU: what a module gives there against the operators in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.mixers import Bidirectional
from selectra.mixers.both_ways import Projections, mixed_one_by_one_both_ways
from selectra.models.vim import Halved

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def results(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output and every gradient, on the host."""
    grad = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, leaves, grad))]


def one_by_one(mixer: Any, x: Tensor) -> Tensor:
    projections = Projections(mixer.in_proj.weight, mixer.out_proj.weight)
    return mixed_one_by_one_both_ways(x, projections, mixer.ahead.weights(), mixer.back.weights(), mixer.mean)


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Relative to the largest; of a gradient that is zero, as A's with one step, the error itself."""
    largest = [float(true.abs().max()) or 1.0 for true in want]
    return [float((a - b).abs().max()) / most for a, b, most in zip(got, want, largest, strict=True)]


@pytest.mark.parametrize("kind", [Bidirectional, Halved])
@pytest.mark.parametrize(("batch", "length", "width"), [(2, 197, 192), (3, 5, 24), (1, 1, 20)])
def test_agrees_with_the_operators(kind: type[Bidirectional], batch: int, length: int, width: int) -> None:
    torch.manual_seed(0)
    mixer, x = kind(width), torch.randn(batch, length, width)
    double = copy.deepcopy(mixer).double()
    leaf = x.double().requires_grad_()
    want = results(one_by_one(double, leaf), [leaf, *double.parameters()])
    mixer, x = mixer.cuda(), x.cuda().requires_grad_()
    leaves = [x, *mixer.parameters()]
    y = mixer(x)
    assert y.grad_fn is not None and y.grad_fn.name() == "_BothWaysBackward"
    assert all(error < 1e-4 for error in errors(results(y, leaves), want))
    with torch.no_grad():
        assert torch.equal(mixer(x), y)
    with torch.autocast("cuda", torch.bfloat16):
        y = mixer(x)
        assert y.grad_fn is not None and y.grad_fn.name() == "_BothWaysBackward"
        got, other = results(y, leaves), results(one_by_one(mixer, x.bfloat16()), leaves)
    eps = torch.finfo(torch.bfloat16).eps
    for mine, theirs in zip(errors(got, want), errors(other, want), strict=True):
        assert mine <= 2 * theirs + 2 * eps


def test_many_rows_and_repeated_steps() -> None:
    torch.manual_seed(0)
    mixer, x = Halved(192).cuda(), torch.randn(32, 197, 192, device="cuda", requires_grad=True)
    leaves, found = [x, *mixer.parameters()], []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            y = mixer(x)
        found.append(results(y, leaves))
    for other in found[1:]:
        assert all(
            torch.isfinite(t).all() and torch.allclose(t, o, rtol=1e-2) for t, o in zip(other, found[0], strict=True)
        )


def test_a_step_can_be_captured_in_a_graph() -> None:
    torch.manual_seed(0)
    mixer, x = Halved(32).cuda(), torch.randn(4, 50, 32, device="cuda", requires_grad=True)
    leaves = [x, *mixer.parameters()]

    def step() -> list[Tensor]:
        y = mixer(x)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5) for mine, theirs in zip(got, want, strict=True))
