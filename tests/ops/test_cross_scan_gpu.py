"""The cross-scan on a GPU: `pytest -m gpu`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.mixers import Bidirectional
from selectra.ops import cross_scan, selective_scan
from selectra.ops.cross_scan.call import prepare
from tests.ops import cases
from tests.ops.cross import drawn, results
from tests.ops.test_cross_scan import strided

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PAIR = ("right", "left")
# The hardware's 2^x is too small in the mean; the memory of slow decays gathers that.
FLOAT32_OUTPUT, FLOAT32_GRADIENT = 4e-6, 1.5e-5


def compare(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, **flags: Any) -> dict[str, Tensor]:
    """Output and gradients against the portable backend in float64, which agrees with the loop over positions."""
    with cross_scan.using("portable"):
        want = results(cross_scan, tensors, torch.float64, "cuda", **flags)
    with cross_scan.using("cuda"):
        got = results(cross_scan, tensors, dtype, "cuda", **flags)
    if dtype == torch.float32:
        cases.assert_close(got, {"y": want.pop("y")}, FLOAT32_OUTPUT, "float32")
        cases.assert_close(got, want, FLOAT32_GRADIENT, "float32")
    else:
        cases.assert_close(got, want, 4 * torch.finfo(dtype).eps, str(dtype))
    return got


@pytest.mark.parametrize("n", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("shape", [(2, 14, 14), (3, 31, 17), (1, 2, 65), (2, 1, 197), (1, 100, 1)])
def test_agrees_with_the_portable_backend(shape: tuple[int, int, int], n: int) -> None:
    compare(drawn(shape, 4, 72, n, gate="shared"))


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, n: int) -> None:
    compare(drawn((2, 15, 14), 4, 96, n, dtype=dtype), dtype)
    compare(drawn((2, 1, 197), 2, 37, n, dtype=dtype, shared=False, gate="own"), dtype, routes=PAIR, merge=False)


@pytest.mark.parametrize("n", [1, 16])
def test_long_lines_and_large_grids(n: int) -> None:
    compare(drawn((1, 1, 8191), 2, 40, n, gate="shared"), routes=PAIR)
    compare(drawn((1, 127, 129), 4, 24, n))


@pytest.mark.parametrize("n", [2, 16])
def test_strided_inputs(n: int) -> None:
    compare(strided(drawn((2, 9, 7), 4, 40, n, gate="shared")))


@pytest.mark.parametrize("n", [1, 16])
def test_gradients_are_equal_bit_by_bit(n: int) -> None:
    tensors = drawn((4, 28, 28), 4, 96, n, dtype=torch.bfloat16)
    first = results(cross_scan, tensors, torch.bfloat16, "cuda")
    for _ in range(3):
        again = results(cross_scan, tensors, torch.bfloat16, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)


def step(leaves: dict[str, Tensor], op: Callable[..., Tensor] = cross_scan) -> tuple[Tensor, ...]:
    """Output and gradients."""
    y = op(**leaves, delta_softplus=True)
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float().cuda().requires_grad_() for name, t in tensors.items()}


@pytest.mark.parametrize("n", [2, 16])
def test_a_graph_replays_forward_and_backward(n: int) -> None:
    leaves, other = on_gpu(drawn((1, 11, 13), 4, 40, n)), on_gpu(drawn((1, 13, 11), 4, 40, n))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(leaves)
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(other[name].reshape(leaf.shape))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, step(leaves), strict=True))


@pytest.mark.parametrize("n", [3, 16])
def test_opcheck(n: int) -> None:
    call = prepare(**on_gpu(drawn((1, 2, 3), 4, 6, n, gate="own")), delta_softplus=True)  # pyright: ignore[reportArgumentType]
    detached = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in call]
    torch.library.opcheck(torch.ops.selectra.cross_scan.default, (*detached, "cuda", True))


@pytest.mark.compile
def test_compiles_without_graph_breaks() -> None:
    leaves = on_gpu(drawn((2, 5, 7), 4, 40, 16, gate="shared"))
    torch._dynamo.reset()
    compiled = torch.compile(cross_scan, fullgraph=True)
    for a, b in zip(step(leaves, compiled), step(leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.compile
@pytest.mark.parametrize("compiled", [False, True])
def test_the_mixers_pair_is_the_sum_of_two_scans(compiled: bool) -> None:
    torch.manual_seed(0)
    mixer = Bidirectional(48, expand=1.5).cuda()
    x = torch.randn(2, 37, 48, device="cuda", requires_grad=True)
    leaves = [x, *mixer.parameters()]
    torch._dynamo.reset()
    run: Any = torch.compile(mixer, fullgraph=True) if compiled else mixer
    # With a mask each path has a launch of its own.
    want = mixer(x, mask=torch.ones(2, 37, dtype=torch.bool, device="cuda"))
    got = run(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    found, truth = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_other_backends_are_taken_where_it_refuses() -> None:
    leaves: dict[str, Any] = on_gpu(drawn((1, 2, 3), 4, 6, 65))
    assert cross_scan.explain(**leaves)["cuda"] == "it takes up to 64 states, not 65"
    assert cross_scan.backend_for(**leaves) == "portable"
    few: dict[str, Any] = on_gpu(drawn((1, 2, 3), 4, 6, 16))
    assert cross_scan.backend_for(**few) == "cuda"
    with selective_scan.using("portable"):
        assert cross_scan.backend_for(**few) == "portable"
