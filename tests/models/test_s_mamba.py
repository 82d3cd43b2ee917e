"""S-Mamba: what is its own."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.models.s_mamba import SMamba
from selectra.registry import models
from selectra.spec import Spec

SIZES: dict[str, Any] = {"seq_len": 12, "horizon": 5, "n_series": 3, "d_model": 8, "d_ff": 6, "depth": 2, "d_state": 4}


def test_it_computes_the_official_forward_written_out():
    """`Model.forecast` and `EncoderLayer.forward` of the official code, on our Mambas."""
    model, x = SMamba(**SIZES).double().eval(), 3 + torch.randn(2, 12, 3, dtype=torch.float64)
    marks = torch.randn(2, 12, 2, dtype=torch.float64)
    mean = x.mean(1, keepdim=True)
    deviation = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    tokens = model.embed.proj(torch.cat([((x - mean) / deviation).permute(0, 2, 1), marks.permute(0, 2, 1)], 1))
    layers: Any = model.layers
    for layer in layers:
        both = layer.mixer
        tokens = layer.norm1(tokens + both.ahead(tokens) + both.back(tokens.flip(1)).flip(1))
        up, down = layer.feed_forward[0], layer.feed_forward[3]
        tokens = layer.norm2(tokens + down(F.gelu(up(tokens))))
    expected = model.head(model.norm_f(tokens)[:, :3]) * deviation + mean
    assert torch.allclose(model(x, past=marks), expected, atol=1e-10)
    assert not torch.allclose(model(x), expected, atol=1e-4)


def test_series_are_scanned_in_both_directions():
    model, x = SMamba(**SIZES).eval(), torch.randn(1, 12, 3, requires_grad=True)
    for i in range(3):
        (gradient,) = torch.autograd.grad(model(x)[..., i].sum(), x)
        assert (gradient.abs().sum(1) > 0).all()


def test_reversed_series_and_exchanged_mambas_give_the_reversed_forecast():
    model, other, x = SMamba(**SIZES).eval(), SMamba(**SIZES).eval(), torch.randn(2, 12, 3)
    names = {"ahead": "back", "back": "ahead"}
    other.load_state_dict(
        {".".join(names.get(part, part) for part in key.split(".")): value for key, value in model.state_dict().items()}
    )
    assert torch.allclose(other(x.flip(2)), model(x).flip(2), atol=1e-5)
    assert not torch.allclose(model(x.flip(2)), model(x).flip(2), atol=1e-4)


def by_hand(d: int, n: int, depth: int, *, horizon: int, seq_len: int = 96) -> int:
    rank = -(-d // 16)
    mamba = 2 * d * d + (2 * d + d) + d * (rank + 2 * n) + (rank * d + d) + d * n + d + d * d
    feed_forward, norms = 2 * (d * d + d), 4 * d
    return (seq_len * d + d) + depth * (2 * mamba + feed_forward + norms) + 2 * d + (d * horizon + horizon)


@pytest.mark.parametrize(
    ("name", "n_series", "horizon", "size"),
    [
        ("etth1", 7, 96, (256, 2, 2)),
        ("ettm1_96", 7, 96, (256, 2, 2)),
        ("ettm2_720", 7, 720, (128, 2, 2)),
        ("exchange", 8, 336, (128, 32, 2)),
        ("weather", 21, 192, (512, 2, 3)),
        ("electricity_96", 321, 96, (512, 16, 3)),
        ("traffic", 862, 720, (512, 32, 4)),
        ("pems03_48", 358, 48, (512, 32, 5)),
        ("pems08_96", 170, 96, (256, 32, 4)),
    ],
)
def test_published_sizes(name, n_series, horizon, size):
    facts = {"seq_len": 96, "horizon": horizon, "n_series": n_series}
    model = models.build(Spec(f"s_mamba_{name}"), facts)
    assert sum(p.numel() for p in model.parameters()) == by_hand(*size, horizon=horizon)


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="depth=0"):
        SMamba(**{**SIZES, "depth": 0})
    with pytest.raises(ConfigError, match="takes no future covariates"):
        SMamba(**SIZES)(torch.randn(2, 12, 3), future=torch.randn(2, 17, 1))
