"""One position of a block on a GPU; needs no compiled library of the CPU kernels."""

import pytest
import torch

from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers import S6, State
from tests.mixers.test_streaming import changed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_in_a_cuda_graph():
    block = changed(PreNorm(AddNorm(64), S6(64))).cuda()
    x, residual, state = torch.randn(2, 1, 64).cuda(), torch.randn(2, 1, 64).cuda(), block.mixer.init_state(2)
    start = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block.step_(x, residual, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = block.step_(x, residual, state)
    for tensor, value in zip(state, start, strict=True):
        tensor.copy_(value)
    eager = State(*(tensor.clone() for tensor in start))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        want, _ = block.step_(x, residual, eager)
        assert torch.equal(y, want)
        assert all(torch.equal(a, b) for a, b in zip(state, eager, strict=True))
