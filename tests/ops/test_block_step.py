"""Whole Mamba blocks for one position on a GPU: against the scan of the same blocks in float64."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers import S6, step_blocks_
from selectra.mixers.s6 import State
from selectra.mixers.streaming import new_stream, plan_of
from selectra.ops import block_step
from selectra.ops.block_step import CudaStepPlan
from selectra.ops.block_step import cuda as host
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of the largest number: sums in float32, and for half precision the rounding of the output and of the window.
CLOSE = {F32: 3e-6, BF16: 8e-3, F16: 1e-3}


def blocks_of(depth: int, dtype: torch.dtype, *sizes: int, in_fp32: bool = True, **options: Any) -> Any:
    torch.manual_seed(depth)
    blocks = nn.ModuleList(
        PreNorm(AddNorm(sizes[0], residual_in_fp32=in_fp32), S6(*sizes, **options)) for _ in range(depth)
    )
    for name, parameter in blocks.named_parameters():
        if name.endswith(("norm.weight", "D", "bias")):
            nn.init.normal_(parameter, 0.8, 0.3)
    return blocks.to(dtype).requires_grad_(False)


def drawn_states(blocks: Any, batch: int) -> list[State]:
    states = [block.mixer.init_state(batch) for block in blocks]
    return [State(torch.randn_like(state.conv), torch.randn_like(state.ssm)) for state in states]


def wanted(blocks: Any, x: Any, residual: Any, states: list[State]) -> tuple[Any, ...]:
    """In float64, through the scan of every block; states are written."""
    y, stream = x.double(), None if residual is None else residual.double()
    exact: Any = deepcopy(blocks).double()
    for i, block in enumerate(exact):
        y, stream = block.norm(y, stream)
        y, states[i] = block.mixer.scan(y, State(states[i].conv.double(), states[i].ssm.double()))
    return y, stream, *(tensor for state in states for tensor in state)


def require_close(found: Tensor, true: Tensor, least: float) -> None:
    error = ((found.double() - true).abs().max() / true.abs().max()).item()
    assert error <= least, f"off by {error:.1e} of the largest, allowed {least:.1e}"


def compare(blocks: Any, batch: int, given: torch.dtype | None, steps: int = 2) -> None:
    """Hold the kernel's steps to the scan."""
    dtype, d_model = blocks[0].mixer.in_proj.weight.dtype, blocks[0].mixer.d_model
    states = drawn_states(blocks, batch)
    true_states = [State(*(tensor.clone() for tensor in state)) for state in states]
    for _ in range(steps):
        x = torch.randn(batch, 1, d_model).to(dtype)
        residual = None if given is None else torch.randn(batch, 1, d_model).to(given)
        plans: Any = [plan_of(block.mixer, block.norm, CudaStepPlan) for block in blocks]
        stream = new_stream(blocks[0].norm, x, residual)
        y = block_step.run(plans, states, x, residual, stream)
        truth = wanted(blocks, x, residual, true_states)
        assert y.dtype == dtype
        found = (y, stream, *(tensor for state in states for tensor in state))
        for mine, true in zip(found, truth, strict=True):
            require_close(mine, true, max(CLOSE[dtype], CLOSE[stream.dtype]))


@pytest.fixture(autouse=True)
def _forget_launches():
    """A launch keeps its kernel, and with it what it was emulated with."""
    host.step_launch.cache_clear()
    yield
    host.step_launch.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "sizes", "batch", "given"),
    [
        # d_model, d_state, d_conv, expand, dt_rank
        (F32, (16, 8, 4, 2, 3), 1, None),
        (F32, (40, 16, 2, 2, 33), 3, F32),
        (F32, (12, 40, 5, 1, 1), 2, BF16),
        (BF16, (64, 16, 4, 2, 4), 1, None),
        (BF16, (24, 5, 3, 3, 7), 4, F32),
        (F16, (32, 16, 4, 2, 2), 2, F16),
        # More than a tile of a row, and rows of tiles that are not full.
        (F32, (1064, 4, 4, 1, 8), 1, F32),
    ],
)
def test_steps_are_those_of_the_scan(emulated_gpu: EmulatedGpu, dtype, sizes, batch, given) -> None:
    compare(blocks_of(3 if sizes[0] < 100 else 1, dtype, *sizes), batch, given)


def test_options_and_orders(emulated_gpu: EmulatedGpu) -> None:
    emulated_gpu.multiprocessors = 3
    for seed, options in ((3, {"bias": True}), (5, {"conv_bias": False})):
        emulated_gpu.seed = seed
        compare(blocks_of(2, F32, 24, 4, **options), 2, F32)
    # As mamba_ssm keeps a model of half precision.
    blocks = blocks_of(2, BF16, 24, 4)
    for block in blocks:
        block.mixer.A_log.data, block.mixer.D.data = block.mixer.A_log.float(), block.mixer.D.float()
    compare(blocks, 1, None)
    # A stream in the blocks' own type.
    compare(blocks_of(2, BF16, 24, 4, in_fp32=False), 1, BF16)


def test_little_shared_memory_is_enough(emulated_gpu: EmulatedGpu) -> None:
    emulated_gpu.shared_limit = 40 * 1024
    compare(blocks_of(2, F32, 264, 4, expand=1), 1, None, steps=1)


def test_what_it_does_not_take() -> None:
    blocks = blocks_of(1, F32, 16, 4)
    plan = plan_of(blocks[0].mixer, blocks[0].norm, CudaStepPlan)
    assert plan is not None and not plan.usable
    x = torch.randn(1, 1, 16)
    assert not block_step.takes([plan], x, None)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("depth", "batch", "sizes"), [(3, 1, (256, 16)), (40, 2, (96, 16)), (2, 4, (2048, 16))])
def test_blocks_meet_on_a_gpu(dtype, depth, batch, sizes) -> None:
    blocks = blocks_of(depth, dtype, *sizes)
    states, x = drawn_states(blocks, batch), torch.randn(batch, 1, sizes[0]).to(dtype)
    truth = wanted(blocks, x, None, [State(*(t.clone() for t in state)) for state in states])
    blocks, states = blocks.cuda(), [State(*(t.cuda() for t in state)) for state in states]
    y, stream = step_blocks_(blocks, x.cuda(), None, states)
    assert host.step_launch.cache_info().currsize == 1
    for mine, true in zip((y, stream, *(t for state in states for t in state)), truth, strict=True):
        require_close(mine.cpu(), true, (1 + depth / 3) * CLOSE[dtype])


@pytest.mark.gpu
@needs_gpu
def test_many_steps_agree_with_the_ordinary_path() -> None:
    blocks = blocks_of(6, BF16, 512, 16).cuda()
    states = [[block.mixer.init_state(1) for block in blocks] for _ in range(2)]
    for _ in range(50):
        x = torch.randn(1, 1, 512, device="cuda", dtype=BF16)
        mine = step_blocks_(blocks, x, None, states[0])
        y, stream = x, None
        for block, state in zip(blocks, states[1], strict=True):
            y, stream = block.step_(y, stream, state)
        for a, b in zip(mine, (y, stream), strict=True):
            assert b is not None
            require_close(a, b.double(), 0.03)
