"""iTransformer: what is its own."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.models.itransformer import ITransformer
from selectra.registry import models
from selectra.spec import Spec

SIZES: dict[str, Any] = {"seq_len": 12, "horizon": 5, "n_series": 4, "d_model": 8, "d_ff": 6, "depth": 2, "n_heads": 2}


def test_it_computes_the_official_forward_written_out():
    model, x = ITransformer(**SIZES).double().eval(), 3 + torch.randn(2, 12, 4, dtype=torch.float64)
    marks = torch.randn(2, 12, 2, dtype=torch.float64)
    mean = x.mean(1, keepdim=True)
    deviation = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    tokens = model.embed.proj(torch.cat([((x - mean) / deviation).permute(0, 2, 1), marks.permute(0, 2, 1)], 1))
    layers: Any = model.layers
    for layer in layers:
        q, k, v = (t.view(2, 6, 2, 4) for t in layer.mixer.qkv(tokens).chunk(3, -1))
        weights = torch.softmax(torch.einsum("blhe,bshe->bhls", q, k) / 2, dim=-1)
        heads = torch.einsum("bhls,bshd->blhd", weights, v).reshape(2, 6, 8)
        tokens = layer.norm1(tokens + layer.mixer.out_proj(heads))
        up, down = layer.feed_forward[0], layer.feed_forward[3]
        tokens = layer.norm2(tokens + down(F.gelu(up(tokens))))
    expected = model.head(model.norm_f(tokens)[:, :4]) * deviation + mean
    assert torch.allclose(model(x, past=marks), expected, atol=1e-10)


def test_the_forecast_follows_the_order_of_the_series():
    model, x, order = ITransformer(**SIZES).eval(), torch.randn(2, 12, 4), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(model(x[..., order]), model(x)[..., order], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "n_series", "horizon", "d", "depth"),
    [
        ("etth1_96", 7, 96, 256, 2),
        ("etth1_720", 7, 720, 512, 2),
        ("etth2", 7, 336, 128, 2),
        ("weather", 21, 96, 512, 3),
    ],
)
def test_published_sizes(name, n_series, horizon, d, depth):
    facts = {"seq_len": 96, "horizon": horizon, "n_series": n_series}
    model = models.build(Spec(f"itransformer_{name}"), facts)
    # Four maps of attention, two of the feed-forward network, two norms.
    layer = 4 * (d * d + d) + 2 * (d * d + d) + 4 * d
    expected = (96 * d + d) + depth * layer + 2 * d + (d * horizon + horizon)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="n_heads=3 must divide d_model=8"):
        ITransformer(**{**SIZES, "n_heads": 3})
