"""ModernTCN: what is its own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.models.modern_tcn import Block, ModernTCN
from selectra.registry import models
from selectra.spec import Spec

SIZES: dict[str, Any] = {"seq_len": 22, "horizon": 5, "n_series": 3, "d_model": 4, "depth": 2, "ffn_ratio": 2,
                         "large_kernel": 5, "small_kernel": 3}  # fmt: skip


def normal(bn: Any, x: Tensor) -> Tensor:
    """Batch norm of a channel with its running values."""
    return (x - bn.running_mean[:, None]) / (bn.running_var[:, None] + bn.eps).sqrt() * bn.weight[:, None] + bn.bias[
        :, None
    ]


def block_by_hand(block: Block, x: Tensor) -> Tensor:
    """Series by series and feature by feature, as the paper's Eq. 2 to 4 and the official code have it."""
    n_series, d = x.shape[1:3]
    y = torch.zeros_like(x)
    for m in range(n_series):
        for i in range(d):
            channel = m * d + i
            for branch in (block.large, block.small):
                conv: Any = branch[0]
                row = F.conv1d(
                    x[:, m, i : i + 1], conv.weight[channel : channel + 1], padding=conv.weight.shape[2] // 2
                )
                bn: Any = branch[1]
                scale = bn.weight[channel] / (bn.running_var[channel] + bn.eps).sqrt()
                y[:, m, i] += (row[:, 0] - bn.running_mean[channel]) * scale + bn.bias[channel]
    y = torch.stack([normal(block.norm, y[:, m]) for m in range(n_series)], 1)
    for mlp, axis in ((block.features, 1), (block.series, 2)):
        # A group's channels are the features of one series, then the series of one feature.
        first: Any = mlp[0]
        second: Any = mlp[3]
        groups, out = y.shape[axis], []
        for g in range(groups):
            rows = y.select(axis, g)
            inner, outer = first.weight.shape[0] // groups, second.weight.shape[0] // groups
            hidden = torch.einsum("oc,bcn->bon", first.weight[g * inner : (g + 1) * inner, :, 0], rows)
            hidden = F.gelu(hidden + first.bias[g * inner : (g + 1) * inner, None])
            back = torch.einsum("oc,bcn->bon", second.weight[g * outer : (g + 1) * outer, :, 0], hidden)
            out.append(back + second.bias[g * outer : (g + 1) * outer, None])
        y = torch.stack(out, axis)
    return x + y


def shaken(model: torch.nn.Module) -> Any:
    """In float64, evaluating, with every weight and running value away from its start."""
    with torch.no_grad():
        for name, tensor in model.double().eval().state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor) if "var" in name else 0.2 * torch.randn_like(tensor))
    return model


def test_a_block_is_what_its_equations_say() -> None:
    block, x = shaken(Block(3, 4, 7, 2, (5, 3), 0.3)), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), block_by_hand(block, x), rtol=1e-10, atol=1e-12)


def test_the_whole_model() -> None:
    """Last values repeated behind the window, patches, blocks, one head for all series."""
    model, x = shaken(ModernTCN(**SIZES, window_norm="none")), torch.randn(2, 22, 3, dtype=torch.float64)
    longer = torch.cat([x, x[:, -1:].repeat(1, 4, 1)], 1)
    patches = torch.stack([longer[:, 4 * i : 4 * i + 8] for i in range(5)], 1)  # b n p s
    conv, bn = model.stem
    tokens = torch.einsum("dp,bnps->bsdn", conv.weight[:, 0], patches) + conv.bias[:, None]
    tokens = torch.stack([normal(bn, tokens[:, m]) for m in range(3)], 1)
    for block in model.layers:
        tokens = block_by_hand(block, tokens)
    want = F.linear(tokens.flatten(2), model.head.weight, model.head.bias).transpose(1, 2)
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-12)


def by_hand(m: int, d: int, depth: int, r: int, seq_len: int, horizon: int) -> int:
    branch = sum(k * m * d + 2 * m * d for k in (51, 5))
    mlps = (m * r * d * (d + 1) + m * d * (r * d + 1)) + (d * r * m * (m + 1) + d * m * (r * m + 1))
    stem, head, revin = 8 * d + d + 2 * d, d * (seq_len // 4) * horizon + horizon, 2 * m
    return stem + depth * (branch + 2 * d + mlps) + head + revin


@pytest.mark.parametrize(
    ("data", "count"),
    [("etth1", by_hand(7, 64, 1, 1, 336, 96)), ("ettm1", by_hand(7, 64, 3, 8, 336, 96)),
     ("weather", by_hand(7, 64, 1, 8, 336, 96))],
)  # fmt: skip
def test_published_sizes(data: str, count: int) -> None:
    model = models.build(Spec(f"modern_tcn_{data}"), {"seq_len": 336, "horizon": 96, "n_series": 7})
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"large_kernel": 4}, "large_kernel=4"), ({"small_kernel": 7}, "needs odd numbers, the small one no larger"),
     ({"stride": 9}, "needs stride <= patch_len")],
)  # fmt: skip
def test_what_cannot_be_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModernTCN(**{**SIZES, **wrong})
