"""`selectra bench block`: two Mamba blocks against one Transformer block of as many parameters, by length."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from selectra.bench.block_table import block_table, ways_table
from selectra.bench.modules import Subject, check, measure, measure_ways, plain, seeded
from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers import S6
from selectra.train.record import environment

SEED = 0
SMALL = (2, 71, 64)


class BlockStudy(NamedTuple):
    """What is measured: width, heads, batch, lengths."""

    d_model: int = 1024
    head_size: int = 64
    batch: int = 8
    lengths: tuple[int, ...] = (512, 1024, 2048, 2049, 4096, 8192, 16384)
    dtype: torch.dtype = torch.bfloat16
    other_ways: tuple[int, ...] = (512, 2048)
    """Lengths at which the blocks are timed compiled and in a CUDA graph too; compiling takes its time."""


CPU_STUDY = BlockStudy(192, 64, 1, (196, 1024, 4096), torch.float32, ())


class MambaBlocks(nn.Module):
    """Two residual Mamba blocks, each a norm and an `S6`; the stream is as wide as the activations."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        norms = [AddNorm(d_model, residual_in_fp32=False) for _ in range(2)]
        self.blocks = nn.ModuleList(PreNorm(norm, S6(d_model)) for norm in norms)

    def forward(self, x: Tensor) -> Tensor:
        """Causal, (b, l, d_model) to the same."""
        residual: Tensor | None = None
        for block in self.blocks:
            x, residual = block(x, residual)
        return x if residual is None else x + residual


class TransformerBlock(nn.Module):
    """Causal attention and a feed-forward part, each behind a norm, from PyTorch's own parts.

    Args:
        d_model: Width.
        head_size: Width of a head.
        n_parameters: How many parameters the block shall have; the feed-forward part is made as wide as that takes.
    """

    def __init__(self, d_model: int, head_size: int, n_parameters: int) -> None:
        super().__init__()
        self.head_size, self.n_heads = head_size, d_model // head_size
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(2))
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        left = n_parameters - sum(p.numel() for p in self.parameters())
        # A multiple of 8, as matrix units like it.
        hidden = max(8, 8 * round(left / (2 * d_model) / 8))
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Causal, (b, l, d_model) to the same."""
        q, k, v = (part.unflatten(2, (-1, self.head_size)) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))

    def step(self, x: Tensor, cache: Tensor, position: int) -> Tensor:
        """One position, which attends to the keys and values before it in `cache` (2, b, heads, length, head_size)."""
        q, k, v = (part.unflatten(2, (-1, self.head_size)) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        for kept, new in zip(cache, (k, v), strict=True):
            kept[:, :, position] = new[:, 0]
        keys, values = cache[:, :, :, : position + 1]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def bench_block(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    study: BlockStudy | None = None,
) -> dict[str, Any]:
    """Check, then time forward and training step of both at every length; returns the record.

    Raises:
        BackendError: A block is wrong; nothing is timed then.
    """
    study = study or BlockStudy()
    batch, length, width = SMALL
    with seeded(SEED, device):
        x = torch.randn(batch, length, width, device=device)
        gate = {
            name: check(name, Subject(m, x, plain)) for name, m in _blocks(width, 16, device, torch.float32).items()
        }
        blocks = _blocks(study.d_model, study.head_size, device, study.dtype)
    record: dict[str, Any] = {
        "benchmark": "block",
        "what": "two norm + S6 blocks against one attention + MLP block of equal parameters; wall clock, eager",
        "environment": environment(),
        "device": str(device),
        "seeds": {"weights and inputs": SEED},
        "seconds for each measurement": seconds,
        "study": study._asdict() | {"dtype": str(study.dtype).removeprefix("torch.")},
        "gate": gate,
        "rows": [],
    }
    for length in study.lengths:
        x = torch.randn(study.batch, length, study.d_model, device=device, dtype=study.dtype)
        rows = measure({name: Subject(m, x, plain) for name, m in blocks.items()}, seconds, device)
        if length in study.other_ways:
            for row in rows:
                row["ways"] = measure_ways(Subject(blocks[row["name"]], x, plain), seconds, device)
        record["rows"] += [{"L": length, **row} for row in rows]
        save(record)
    for table in (block_table, ways_table):
        console.print(table(record), highlight=False, soft_wrap=True)
    return record


def _blocks(d_model: int, head_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    mamba = MambaBlocks(d_model)
    transformer = TransformerBlock(d_model, head_size, sum(p.numel() for p in mamba.parameters()))
    return {name: m.to(device, dtype) for name, m in (("mamba", mamba), ("transformer", transformer))}
