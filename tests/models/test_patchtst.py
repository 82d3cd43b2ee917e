"""PatchTST: what is its own."""

import os
from typing import Any

import pytest
import torch

from selectra.errors import ConfigError
from selectra.models.patchtst import PatchTST
from selectra.registry import models
from selectra.spec import Spec

SIZES: dict[str, Any] = {
    **{"seq_len": 40, "horizon": 6, "n_series": 3, "d_model": 8, "depth": 2, "n_heads": 2, "d_ff": 12},
    **{"patch_len": 8, "stride": 4},
}


def test_series_are_read_alone():
    model, x = PatchTST(**SIZES).eval(), torch.randn(2, 40, 3, requires_grad=True)
    for i in range(3):
        (gradient,) = torch.autograd.grad(model(x)[..., i].sum(), x)
        assert ((gradient != 0).any(1) == torch.eye(3)[i].bool()).all()
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(model(x[..., order]), model(x)[..., order], atol=1e-5)


def test_every_patch_sees_every_patch():
    model, x = PatchTST(**SIZES).eval(), torch.randn(1, 9, 8, requires_grad=True)
    for i in (0, 8):
        (gradient,) = torch.autograd.grad(model.layers(x)[0, i].sum(), x)
        assert (gradient.abs().sum(2) > 0).all()


def test_batch_norm_is_over_all_tokens():
    """In training each feature of the last layer's tokens has mean 0 and deviation 1; running values serve later."""
    model, x = PatchTST(**{**SIZES, "dropout": 0.0}).train(), torch.randn(4, 40, 3)
    tokens = model.layers(model.embed(x).flatten(0, 1))
    assert tokens.mean((0, 1)).abs().max() < 1e-5 and (tokens.std((0, 1), correction=0) - 1).abs().max() < 1e-3
    y = model.eval()(x)
    assert torch.allclose(model(x[:1]), y[:1], atol=1e-5)


def by_hand(d: int, d_ff: int, horizon: int, seq_len: int, patch_len: int = 16, stride: int = 8) -> int:
    patches = 1 + -(-(seq_len - patch_len) // stride)
    layer = 4 * (d * d + d) + (d * d_ff + d_ff) + (d_ff * d + d) + 4 * d
    return (2 * patch_len * d + d + patches * d) + 3 * layer + (patches * d * horizon + horizon)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ("etth1", by_hand(16, 128, 96, 336)),
        ("ettm1", by_hand(128, 256, 96, 336)),
        ("illness", by_hand(16, 128, 96, 336, 24, 2)),
    ],
)
def test_published_sizes(data, count):
    model = models.build(Spec(f"patchtst_{data}"), {"seq_len": 336, "horizon": 96, "n_series": 7})
    assert sum(p.numel() for p in model.parameters()) == count
    assert isinstance(model.layers[1].norm1, torch.nn.BatchNorm1d)


@pytest.mark.skipif(bool(os.environ.get("SELECTRA_CHECK_SHAPES")), reason="the hook refuses before the model does")
@pytest.mark.parametrize(
    ("wrong", "message"), [({"n_heads": 3}, "n_heads=3 must divide d_model=8"), ({"norm": "rms"}, "norm='rms'")]
)
def test_what_cannot_be_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        PatchTST(**{**SIZES, **wrong})
