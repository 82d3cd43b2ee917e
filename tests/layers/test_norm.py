"""Norms of the residual stream, and blocks behind them."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from selectra.errors import ConfigError
from selectra.layers.norm import AddNorm, LayerNorm, PreNorm
from selectra.mixers import S6

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_is_pytorchs_norm_of_the_sum(kind) -> None:
    norm = AddNorm(8, kind=kind)
    theirs = nn.RMSNorm(8, 1e-5) if kind == "rms" else nn.LayerNorm(8, 1e-5)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(norm.state_dict())
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for before in (None, residual):
        y, after = norm(x, before)
        total = x if before is None else x + before
        torch.testing.assert_close(y, theirs(total))
        torch.testing.assert_close(after, total)


def test_the_streams_type() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    y, residual = AddNorm(8).bfloat16()(x)
    assert (y.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    assert AddNorm(8).bfloat16()(x, residual)[1].dtype == torch.float32
    assert AddNorm(8, residual_in_fp32=False).bfloat16()(x, x)[1].dtype == torch.bfloat16
    assert AddNorm(8).double()(x.double())[1].dtype == torch.float64


def test_a_stream_of_blocks_is_a_sum() -> None:
    blocks = [PreNorm(AddNorm(6), S6(6, d_state=3)) for _ in range(2)]
    norm_f, x = AddNorm(6), torch.randn(2, 5, 6)
    y, residual = x, None
    for block in blocks:
        y, residual = block(y, residual)
    y, _ = norm_f(y, residual)
    for block in blocks:
        x = x + block.mixer(nn.functional.rms_norm(x, (6,), block.norm.weight, 1e-5))
    torch.testing.assert_close(y, nn.functional.rms_norm(x, (6,), norm_f.weight, 1e-5))


def test_options_go_to_the_mixer() -> None:
    block = PreNorm(AddNorm(6), S6(6, d_state=3))
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([True, True, True, False, False]).expand(2, 5)
    y, _ = block(x, mask=mask)
    assert (y[:, 3:] == 0).all() and not (block(x)[0][:, 3:] == 0).all()


class Shapes(TorchDispatchMode):
    """Notes over what layer norms are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_layer_norm.default:
            self.normalized.append(list(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_over_several_dimensions_is_pytorchs_over_one(affine: bool) -> None:
    """PyTorch's own over several writes beside its memory in the backward on a GPU."""
    own, theirs = (kind([3, 4], elementwise_affine=affine) for kind in (LayerNorm, nn.LayerNorm))
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(own.state_dict())
    x, found = torch.randn(2, 4, 3, 5), []
    for norm in (own, theirs):
        rows = x.transpose(1, 3).detach().requires_grad_()
        with Shapes() as shapes:
            y = norm(rows)
        found.append((y, *torch.autograd.grad(y.exp().sum(), [rows, *norm.parameters()])))
        assert shapes.normalized == [[12] if norm is own else [3, 4]]
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[3, 4\]"):
        own(x)


@gpu
@needs_gpu
def test_a_layer_norm_over_several_dimensions_of_many_rows() -> None:
    norm, x = LayerNorm([63, 16]).cuda(), torch.randn(70_000, 63, 16, device="cuda")
    norm(x).square().sum().backward()
    exact = copy.deepcopy(norm).double()
    exact.zero_grad()
    for part in x.split(10_000):
        exact(part.double()).square().sum().backward()
    for own, wanted in zip(norm.parameters(), exact.parameters(), strict=True):
        assert own.grad is not None and wanted.grad is not None
        largest = wanted.grad.abs().max().item()
        torch.testing.assert_close(own.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.skipif(bool(os.environ.get("SELECTRA_CHECK_SHAPES")), reason="the hook refuses before the layer does")
@pytest.mark.parametrize(("wrong", "said"), [({"d_model": 0}, "d_model=0"), ({"kind": "batch"}, "takes 'rms' or")])
def test_what_cannot_be_is_named(wrong, said) -> None:
    with pytest.raises(ConfigError, match=said):
        AddNorm(**({"d_model": 4} | wrong))


def two_blocks() -> tuple[nn.ModuleList, AddNorm, list[Tensor]]:
    """Blocks with the last norm, on the GPU, and the leaves of their gradients, the input first."""
    blocks = nn.ModuleList(PreNorm(AddNorm(64), S6(64)) for _ in range(2)).cuda()
    norm_f = AddNorm(64).cuda()
    x = torch.randn(2, 50, 64, device="cuda", requires_grad=True)
    return blocks, norm_f, [x, *blocks.parameters(), *norm_f.parameters()]


def run_blocks(blocks: nn.ModuleList, norm_f: AddNorm, x: Tensor) -> Tensor:
    """As a model runs them."""
    residual = None
    for block in blocks:
        x, residual = block(x, residual)
    return norm_f(x, residual)[0]


@gpu
@needs_gpu
@pytest.mark.parametrize("training", [False, True])
def test_a_graph_replays_residual_blocks(training: bool) -> None:
    blocks, norm_f, leaves = two_blocks()

    def step() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(training):
            y = run_blocks(blocks, norm_f, leaves[0])
        return (y, *torch.autograd.grad(y.square().sum(), leaves)) if training else (y,)

    got, replay = captured(step)
    for _ in range(2):
        with torch.no_grad():
            leaves[0].copy_(torch.randn_like(leaves[0]))
        replay()
        torch.cuda.synchronize()
        for a, b in zip(got, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """The results of a step in a CUDA graph, and what fills them anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    return got, graph.replay


@gpu
@needs_gpu
@pytest.mark.compile
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_residual_blocks_compile_without_graph_breaks(dtype: torch.dtype | None) -> None:
    blocks, norm_f, leaves = two_blocks()
    torch._dynamo.reset()
    compiled = torch.compile(run_blocks, fullgraph=True)
    at_most = 1e-4 if dtype is None else 5e-2
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        want, got = (run(blocks, norm_f, leaves[0]) for run in (run_blocks, compiled))
    torch.testing.assert_close(got, want, rtol=at_most, atol=at_most * want.abs().max().item())
    want_grads, got_grads = (torch.autograd.grad(y.float().square().mean(), leaves) for y in (want, got))
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=at_most, atol=at_most * b.abs().max().item())


@gpu
@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_of_many_short_rows(dtype: torch.dtype, autocast: bool) -> None:
    """PyTorch's types, and its values and gradients, of tensors that lie as they like."""
    torch.manual_seed(0)
    own = LayerNorm(96).cuda()
    nn.init.normal_(own.weight)
    nn.init.normal_(own.bias)
    if not autocast:
        own.to(dtype)
    plain = nn.LayerNorm(96).cuda().to(own.weight.dtype)
    plain.load_state_dict(own.state_dict())
    exact = copy.deepcopy(plain).double()
    x = torch.randn(3, 96, 1111, device="cuda", dtype=dtype).transpose(1, 2)
    found = []
    for norm in (own, plain, exact):
        rows = (x.double() if norm is exact else x).detach().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast and norm is not exact):
            y = norm(rows)
        y.backward(torch.ones_like(y) + y.detach())
        found.append((y, rows.grad, norm.weight.grad, norm.bias.grad))
    for mine, theirs, truth in zip(*found, strict=True):
        assert mine is not None and theirs is not None and truth is not None
        assert mine.dtype == theirs.dtype
        scale = truth.abs().max()
        error, peer = (mine - truth).abs().max() / scale, (theirs - truth).abs().max() / scale
        assert error <= max(1.5 * peer.item(), 4e-6 if theirs.dtype == torch.float32 else 8e-3)
