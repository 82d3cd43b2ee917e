"""SiMBA for series: what is its own."""

import os
from typing import Any

import pytest
import torch

from selectra.errors import ConfigError
from selectra.mixers import Monarch
from selectra.models.simba_series import SimbaSeries

SIZES: dict[str, Any] = {
    **{"seq_len": 40, "horizon": 6, "n_series": 3, "d_model": 16, "depth": 2, "d_state": 4},
    **{"patch_len": 8, "stride": 4, "mlp_ratio": 2},
}
MIXERS = pytest.mark.parametrize("mixer", ["einfft", "monarch", "mlp"])


@MIXERS
def test_the_forecast_follows_the_order_of_the_series(mixer):
    model, x, order = SimbaSeries(**SIZES, channel_mixer=mixer).eval(), torch.randn(2, 40, 3), torch.tensor([2, 0, 1])
    assert torch.allclose(model(x[..., order]), model(x)[..., order], atol=1e-5)


@MIXERS
def test_every_parameter_gets_a_gradient(mixer):
    model = SimbaSeries(**SIZES, channel_mixer=mixer)
    model(torch.randn(2, 40, 3)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@MIXERS
def test_how_far_a_patch_sees(mixer):
    """Mamba looks back, EinFFT both ways, the MLP's convolution one patch ahead, Monarch at its own patch alone."""
    block: Any = SimbaSeries(**SIZES, channel_mixer=mixer).layers[0]
    if mixer == "einfft":
        # At its start the soft threshold would hide most.
        torch.nn.init.normal_(block.channel.complex_weight_1)
        torch.nn.init.normal_(block.channel.complex_weight_2)
    x = torch.randn(1, 9, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[0, 4].sum(), x)
    seen = (gradient[0].abs().sum(1) > 0).tolist()
    last = {"einfft": 8, "monarch": 4, "mlp": 5}[mixer]
    assert seen == [i <= last for i in range(9)]


def test_a_monarch_map_is_a_map_with_few_parameters():
    layer, x = Monarch(16, 32, 4), torch.randn(2, 5, 16)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 4 * 4 + 4 * 4 * 8 + 32
    matrix = layer(torch.eye(16)[None])[0]
    assert (matrix != 0).all() and torch.allclose(layer(x), x @ matrix, atol=1e-5)


@MIXERS
def test_parameters_counted_by_hand(mixer):
    d, e, n, rank, hidden, patches = 16, 32, 4, 1, 32, 9
    mamba = d * 2 * e + (4 * e + e) + e * (rank + 2 * n) + (rank * e + e) + e * n + e + e * d
    channel = {
        "einfft": d * d + 4 * d,
        "monarch": (d * 4 + 4 * hidden + hidden) + (hidden * 4 + 4 * d + d),
        "mlp": (d * hidden + hidden) + 4 * hidden + (hidden * d + d),
    }[mixer]
    expected = (16 * d + d + patches * d) + 2 * (mamba + channel + 4 * d) + 2 * d + (patches * d * 6 + 6)
    assert sum(p.numel() for p in SimbaSeries(**SIZES, channel_mixer=mixer).parameters()) == expected


@pytest.mark.skipif(bool(os.environ.get("SELECTRA_CHECK_SHAPES")), reason="the hook refuses before the model does")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 18}, "d_model=18 must be a multiple of n_blocks=4"),
        ({"d_model": 24, "channel_mixer": "monarch"}, "multiples of n_blocks.2 = 16"),
        ({"channel_mixer": "fft"}, "channel_mixer='fft': takes 'einfft', 'monarch', 'mlp'"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"quantiles": (0.0,)}, "quantiles"),
    ],
)
def test_what_cannot_be_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SimbaSeries(**{**SIZES, **wrong})
