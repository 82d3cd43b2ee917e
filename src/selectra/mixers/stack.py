"""One position through a row of residual Mamba blocks, on a CPU or a GPU."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers.s6 import S6, State
from selectra.mixers.streaming import must_be_seen, new_stream, plan_of
from selectra.ops import block_step
from selectra.ops.block_step import CudaStepPlan
from selectra.ops.native import step
from selectra.ops.native.step import StepPlan


def step_blocks_(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "b l d_model"],
    residual: Float[Tensor, "b l d_model"] | None,
    states: Sequence[State],
) -> tuple[Float[Tensor, "b l d_model"], Float[Tensor, "b l d_model"]]:
    """`step_` of every `PreNorm` block in turn, in one call of the compiled kernels where that can be.

    Args:
        blocks: Residual blocks.
        x: What is added to the stream first.
        residual: The stream so far; without one it starts with x.
        states: Of every block; they are written.

    Returns:
        What the last block gave, not yet added, and the stream.
    """
    blocks = list(blocks)
    plans = _plans(blocks, x, residual, states)
    if plans is None:
        for block, state in zip(blocks, states, strict=True):
            x, residual = block.step_(x, residual, state)  # pyright: ignore[reportCallIssue]
        assert residual is not None
        return x, residual
    norm = blocks[0]._modules["norm"]
    assert isinstance(norm, AddNorm)
    stream = new_stream(norm, x, residual)
    run: Any = block_step.run if x.is_cuda else step.run
    return run(plans, states, x, residual, stream), stream


def _plans(
    blocks: Sequence[nn.Module], x: Tensor, residual: Tensor | None, states: Sequence[State]
) -> Sequence[StepPlan | CudaStepPlan] | None:
    """Every block's plan, or None where one call cannot do them all."""
    if not blocks or len(blocks) != len(states) or must_be_seen((x, residual, *chain.from_iterable(states))):
        return None
    if x.is_cuda:
        return _plans_on_gpu(blocks, x, residual, states)
    plans: list[StepPlan] = []
    in_fp32, batch = set(), x.shape[0]
    for block, state in zip(blocks, states, strict=True):
        parts = _parts(block)
        if parts is None:
            return None
        mixer, norm = parts
        plan = plan_of(mixer, norm, StepPlan)
        # What blocks hand on fits the next one if the first one's input does.
        if plan is None or not plan.takes_state(batch, *state):
            return None
        # Of blocks that are alike the first speaks for all.
        if not (plans and plan.input == plans[0].input) and not plan.takes(x, residual):
            return None
        in_fp32.add(norm.residual_in_fp32)
        plans.append(plan)
    # Blocks write the stream in one place.
    return plans if len(in_fp32) == 1 else None


def _plans_on_gpu(
    blocks: Sequence[nn.Module], x: Tensor, residual: Tensor | None, states: Sequence[State]
) -> list[CudaStepPlan] | None:
    plans: list[CudaStepPlan] = []
    in_fp32 = set()
    for block, state in zip(blocks, states, strict=True):
        parts = _parts(block)
        plan = None if parts is None else plan_of(*parts, CudaStepPlan)
        if parts is None or plan is None or not plan.takes_state(x.shape[0], *state):
            return None
        in_fp32.add(parts[1].residual_in_fp32)
        plans.append(plan)
    return plans if len(in_fp32) == 1 and block_step.takes(plans, x, residual) else None


def _parts(block: nn.Module) -> tuple[S6, AddNorm] | None:
    """A residual Mamba block's mixer and norm, or None for any other block."""
    if type(block) is not PreNorm:
        return None
    mixer, norm = block._modules["mixer"], block._modules["norm"]
    return (mixer, norm) if type(mixer) is S6 and type(norm) is AddNorm else None
