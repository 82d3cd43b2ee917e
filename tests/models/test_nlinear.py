"""NLinear and RLinear: what is their own."""

from typing import Any

import torch

from selectra.models.nlinear import NormLinear
from selectra.registry import models
from selectra.spec import Spec

SIZES: dict[str, Any] = {"seq_len": 9, "horizon": 4, "n_series": 3}


def test_nlinear_maps_what_is_left_of_the_last_value():
    model, x = models.build(Spec("nlinear"), SIZES), torch.randn(2, 9, 3)
    last = x[:, -1:]
    expected = torch.einsum("bls,hl->bhs", x - last, model.head.weight) + model.head.bias[:, None] + last
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == 9 * 4 + 4


def test_rlinear_is_revin_around_the_map():
    model, x = models.build(Spec("rlinear"), SIZES), 4 + torch.randn(2, 9, 3)
    torch.nn.init.normal_(model.revin.weight, 2.0)
    torch.nn.init.normal_(model.revin.bias)
    mean, deviation = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    y = (x - mean) / deviation * model.revin.weight + model.revin.bias
    y = torch.einsum("bls,hl->bhs", y, model.head.weight) + model.head.bias[:, None]
    expected = (y - model.revin.bias) / (model.revin.weight + 1e-10) * deviation + mean
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == 9 * 4 + 4 + 2 * 3


def test_dropout_is_on_the_normalised_window():
    model, x = NormLinear(**SIZES, dropout=0.5).train(), torch.randn(2, 9, 3)
    model.dropout.p = 1.0
    assert torch.allclose(model(x), x[:, -1:] + model.head.bias[:, None], atol=1e-6)
