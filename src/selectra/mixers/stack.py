"""One position through a row of residual Mamba blocks."""

from collections.abc import Iterable, Sequence
from itertools import chain

from jaxtyping import Float
from torch import Tensor, nn

from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers.s6 import S6, State
from selectra.mixers.streaming import must_be_seen, new_stream, plan_of
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
    return step.run(plans, states, x, residual, stream), stream


def _plans(
    blocks: Sequence[nn.Module], x: Tensor, residual: Tensor | None, states: Sequence[State]
) -> list[StepPlan] | None:
    """Every block's plan, or None where one call cannot do them all."""
    if not blocks or len(blocks) != len(states) or must_be_seen((x, residual, *chain.from_iterable(states))):
        return None
    plans: list[StepPlan] = []
    in_fp32, batch = set(), x.shape[0]
    for block, state in zip(blocks, states, strict=True):
        if type(block) is not PreNorm:
            return None
        mixer, norm = block._modules["mixer"], block._modules["norm"]
        if type(mixer) is not S6 or type(norm) is not AddNorm:
            return None
        plan = plan_of(mixer, norm)
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
