"""`selectra bench stack`: a 12-block Mamba against a 6-layer Transformer of as many parameters."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from selectra.bench.block import TransformerBlock
from selectra.bench.modules import Subject, backends, check, forward_of, plain, seeded, training_of
from selectra.bench.stack_table import stack_table
from selectra.bench.timing import paired
from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers import S6, step_blocks_
from selectra.ops import native
from selectra.train.record import environment

SEED = 0
WHAT = (
    "residual Mamba blocks against a Transformer (PyTorch's scaled_dot_product_attention) of equal parameters; "
    "batch 1, float32, wall clock, interleaved; ratio: median of the rounds' ratios"
)


class StackStudy(NamedTuple):
    """What is measured."""

    d_model: int = 192
    head_size: int = 64
    depth: int = 12
    layers: int = 6
    lengths: tuple[int, ...] = (196, 512, 1024, 2048, 4096, 16384)
    positions: tuple[int, ...] = (10, 1_000, 100_000)


class MambaStack(nn.Module):
    """Residual Mamba blocks and a last norm."""

    def __init__(self, d_model: int, depth: int) -> None:
        super().__init__()
        blocks = [PreNorm(AddNorm(d_model), S6(d_model)) for _ in range(depth)]
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm_f = AddNorm(d_model)
        # As mamba_ssm starts the last map of each block, so that deep stacks keep their size.
        for block in self.blocks:
            block.mixer.out_proj.weight.data /= depth**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Causal, (b, l, d_model) to the same."""
        residual: Tensor | None = None
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.norm_f(x, residual)[0]

    def init_state(self, batch: int) -> list[Any]:
        """Of every block."""
        return [block.mixer.init_state(batch) for block in self.blocks]

    @torch.no_grad()
    def prefill(self, x: Tensor, states: list[Any]) -> list[Any]:
        """The states after a chunk."""
        residual: Tensor | None = None
        found = []
        for block, state in zip(self.blocks, states, strict=True):
            x, residual = block.norm(x, residual)
            x, after = block.mixer.scan(x, state)
            found.append(after)
        return found

    @torch.no_grad()
    def step(self, x: Tensor, states: list[Any]) -> Tensor:
        """One position; the states are written."""
        x, residual = step_blocks_(self.blocks, x, None, states)
        return self.norm_f(x, residual)[0]


class TransformerStack(nn.Module):
    """Transformer blocks with as many parameters, and a last norm."""

    def __init__(self, d_model: int, head_size: int, layers: int, n_parameters: int) -> None:
        super().__init__()
        each = n_parameters // layers
        self.blocks: Any = nn.ModuleList(TransformerBlock(d_model, head_size, each) for _ in range(layers))
        self.norm_f = nn.RMSNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Causal, (b, l, d_model) to the same."""
        for block in self.blocks:
            x = block(x)
        return self.norm_f(x)

    def cache(self, length: int) -> list[Tensor]:
        """Room for the keys and values of so many positions of every block, filled with noise."""
        shape = (2, 1, self.blocks[0].n_heads, length, self.blocks[0].head_size)
        return [torch.randn(shape) for _ in self.blocks]

    @torch.no_grad()
    def step(self, x: Tensor, caches: list[Tensor], position: int) -> Tensor:
        """The position `position`, which attends to all before it."""
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(x, cache, position)
        return self.norm_f(x)


def bench_stack(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    study: StackStudy | None = None,
) -> dict[str, Any]:
    """Check, then time forward and training step by length; returns the record.

    Raises:
        BackendError: Something is wrong; nothing is timed then.
    """
    study = study or StackStudy()
    with seeded(SEED, device):
        small = small_stacks()
        x = torch.randn(2, 37, 32)
        gate = {name: check(name, Subject(module, x, plain)) for name, module in small.items()}
        stacks = stacks_of(study)
        record = new_record("stack", WHAT, stacks, study, device, seconds, gate)
        for length in study.lengths:
            record["rows"].append(_row(stacks, torch.randn(1, length, study.d_model), seconds))
            record["load after"] = os.getloadavg()
            save(record)
    console.print(stack_table(record), highlight=False, soft_wrap=True)
    return record


def small_stacks() -> dict[str, Any]:
    """What is checked."""
    return {"mamba": MambaStack(32, 2), "transformer": TransformerStack(32, 16, 1, 20_000)}


def stacks_of(study: StackStudy) -> dict[str, Any]:
    """Both, of equal parameters."""
    mamba = MambaStack(study.d_model, study.depth)
    count = sum(p.numel() for p in mamba.parameters())
    return {"mamba": mamba, "transformer": TransformerStack(study.d_model, study.head_size, study.layers, count)}


def new_record(
    benchmark: str,
    what: str,
    stacks: dict[str, Any],
    study: StackStudy,
    device: torch.device,
    seconds: float,
    gate: dict[str, float],
) -> dict[str, Any]:
    """A record without rows."""
    return {
        "benchmark": benchmark,
        "what": what,
        "environment": environment(),
        "instruction set": native.status().isa,
        "load before": os.getloadavg(),
        "device": str(device),
        "seeds": {"weights and inputs": SEED},
        "seconds for each measurement": seconds,
        "study": study._asdict(),
        "parameters": {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks.items()},
        "gate": gate,
        "rows": [],
    }


def _row(stacks: dict[str, Any], x: Tensor, seconds: float) -> dict[str, Any]:
    subjects = {name: Subject(stack, x, plain) for name, stack in stacks.items()}
    row: dict[str, Any] = {"L": x.shape[1], "backends": backends(subjects["mamba"])}
    for kind, make in (("forward", forward_of), ("training", training_of)):
        row[kind] = paired({name: make(subject) for name, subject in subjects.items()}, seconds)
    return row
