"""TSMixer: what is its own."""

import os
from typing import Any

import pytest
import torch

from selectra.errors import ConfigError
from selectra.models.tsmixer import TSMixer
from selectra.registry import models
from selectra.spec import Spec

SIZES: dict[str, Any] = {"seq_len": 10, "horizon": 4, "n_series": 3, "depth": 2, "d_ff": 5}


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_it_computes_the_official_forward_written_out(norm):
    """`res_block` of the official code, trained on a batch: statistics over the batch, or over rows and series."""
    model, x = (
        TSMixer(**SIZES, norm=norm, window_norm="none", dropout=0.0).double().train(),
        torch.randn(6, 10, 3).double(),
    )
    axes, shape = ((0,), (10, 3)) if norm == "batch" else ((1, 2), (10, 3))
    layers: Any = model.layers

    def normed(layer: Any, y: torch.Tensor) -> torch.Tensor:
        mean, variance = y.mean(axes, keepdim=True), y.var(axes, keepdim=True, correction=0)
        return (y - mean) / (variance + 1e-3).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)

    y = x
    for block in layers:
        for p in block.parameters():
            torch.nn.init.normal_(p)
        y = y + torch.relu(block.time(normed(block.norm1, y).permute(0, 2, 1))).permute(0, 2, 1)
        y = y + block.down(torch.relu(block.up(normed(block.norm2, y))))
    expected = torch.einsum("bls,hl->bhs", y, model.head.weight) + model.head.bias[:, None]
    assert torch.allclose(model(x), expected, atol=1e-9)


def test_a_batch_of_one_can_be_trained_on():
    model, x = TSMixer(**SIZES).train(), torch.randn(1, 10, 3)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("data", "n_series", "depth", "d_ff"),
    [("ettm2", 7, 2, 64), ("weather", 21, 4, 32), ("electricity", 321, 4, 64), ("traffic", 862, 8, 64)],
)
def test_published_sizes(data, n_series, depth, d_ff):
    model = models.build(Spec(f"tsmixer_{data}"), {"seq_len": 512, "horizon": 96, "n_series": n_series})
    block = (512 * 512 + 512) + (n_series * d_ff + d_ff) + (d_ff * n_series + n_series) + 4 * 512 * n_series
    expected = depth * block + (512 * 96 + 96) + 2 * n_series
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.skipif(bool(os.environ.get("SELECTRA_CHECK_SHAPES")), reason="the hook refuses before the model does")
def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="norm='rms'"):
        TSMixer(**{**SIZES, "norm": "rms"})
