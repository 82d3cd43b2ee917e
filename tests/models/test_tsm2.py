"""TSM2: what is its own."""

import os
from typing import Any

import pytest
import torch

from selectra.errors import ConfigError
from selectra.models.tsm2 import TSM2
from selectra.registry import models

SIZES: dict[str, Any] = {
    "seq_len": 30,
    "horizon": 6,
    "n_series": 3,
    "d_model": 8,
    "d_state": 4,
    "depth": 2,
    "patch_len": 8,
    "stride": 4,
}


def test_it_is_registered_with_what_it_takes():
    entry = models.entry("tsm2")
    assert entry.target is TSM2 and entry.kind == "series" and entry.takes == ("observed", "past", "future", "static")
    assert entry.source == "arXiv:2403.19888"


def test_variates_are_mixed_in_both_directions():
    model, x = TSM2(**SIZES).eval(), torch.randn(1, 30, 3, requires_grad=True)
    for i in range(3):
        (gradient,) = torch.autograd.grad(model(x)[..., i].sum(), x)
        assert (gradient.abs().sum(1) > 0).all()


def test_time_is_mixed_one_way():
    """The token mixer at a patch sees no later patch."""
    layer = TSM2(**SIZES, norm="feature").eval().blocks()[0]
    x = torch.randn(2, 3, 6, 8)
    changed = x.clone()
    changed[:, :, 4:] = torch.randn(2, 3, 2, 8)
    assert torch.allclose(layer.mix_tokens(x)[:, :, :4], layer.mix_tokens(changed)[:, :, :4], atol=1e-6)
    assert not torch.allclose(layer.mix_tokens(x)[:, :, 4:], layer.mix_tokens(changed)[:, :, 4:], atol=1e-5)


def test_mixers_stay_on_their_axis():
    """Tokens of one variate, and variates at one patch, mix among themselves alone."""
    layer = TSM2(**SIZES, norm="feature").eval().blocks()[0]
    x = torch.randn(2, 3, 6, 8)
    other_series, other_patch = x.clone(), x.clone()
    other_series[:, 1] = torch.randn(2, 6, 8)
    other_patch[:, :, 2] = torch.randn(2, 3, 8)
    assert torch.allclose(layer.mix_tokens(x)[:, [0, 2]], layer.mix_tokens(other_series)[:, [0, 2]], atol=1e-6)
    kept = [0, 1, 3, 4, 5]
    assert torch.allclose(layer.mix_channels(x)[:, :, kept], layer.mix_channels(other_patch)[:, :, kept], atol=1e-6)
    # And on their axis everything is reached.
    assert not torch.allclose(layer.mix_channels(x)[:, [0, 2]], layer.mix_channels(other_series)[:, [0, 2]], atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_it_starts_as_a_chain_of_its_mixers(residual):
    model, x = TSM2(**SIZES, residual=residual).eval(), torch.randn(2, 30, 3)
    y = model.embed(x)
    for layer in model.blocks():
        y = layer.mix_tokens(y) + (y if residual else 0)
        y = layer.mix_channels(y) + (y if residual else 0)
    assert torch.allclose(model.features(x), y, atol=1e-6)


def test_the_forecast_follows_level_and_scale_of_the_window():
    model, x = TSM2(**SIZES).eval(), torch.randn(2, 30, 3)
    assert torch.allclose(model(3 * x + 5), 3 * model(x) + 5, atol=1e-3)
    shifted = TSM2(**SIZES, window_norm="last").eval()
    assert torch.allclose(shifted(x + 5), shifted(x) + 5, atol=1e-4)
    plain = TSM2(**SIZES, window_norm="none").eval()
    assert not torch.allclose(plain(x + 5), plain(x) + 5, atol=1e-2)


def test_a_gap_is_not_a_value():
    """A missing value differs from one that lies at the window's mean."""
    model, x = TSM2(**SIZES, window_norm="none").eval(), torch.randn(1, 30, 3)
    x[0, 20, 1] = 0
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[0, 20, 1] = False
    assert not torch.allclose(model(x, observed=observed), model(x), atol=1e-5)


def test_batch_norm_is_over_the_batch_for_each_patch_and_feature():
    model = TSM2(**SIZES, norm="batch")
    norm, x = model.blocks()[0].token_norm, 3 + 2 * torch.randn(40, 3, 7, 8)
    y = norm(x)
    assert y.shape == x.shape
    assert y.mean((0, 1)).abs().max() < 1e-5 and (y.std((0, 1), correction=0) - 1).abs().max() < 1e-2
    model(torch.randn(4, 30, 3)).sum().backward()
    x = torch.randn(4, 30, 3)
    assert torch.allclose(model.eval()(x)[:1], model(x[:1]), atol=1e-5)


def test_covariates_lengthen_the_window():
    """Sec. 5.1: the input is (series, 3 L) with both kinds, and as long as with one where one is given."""
    for n_future, n_static, length in ((0, 0, 30), (2, 0, 60), (0, 4, 60), (2, 4, 90)):
        model = TSM2(**SIZES, n_future=n_future, n_static=n_static)
        assert model.auxiliary.length == length
        future, static = torch.randn(2, 36, n_future), torch.randn(2, 3, n_static)
        given = ({"future": future} if n_future else {}) | ({"static": static} if n_static else {})
        x = torch.randn(2, 30, 3)
        longer, observed = model.auxiliary(x, x > 0, given.get("future"), given.get("static"))
        assert longer.shape == (2, length, 3) and observed is not None and observed[:, 30:].all()
        assert torch.equal(longer[:, :30], x) and torch.equal(observed[:, :30], x > 0)
        model(x, **given).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_static_covariates_speak_for_their_series_and_future_ones_for_all():
    model, x = TSM2(**SIZES, n_future=2, n_static=4), torch.randn(2, 30, 3)
    future, static = torch.randn(2, 36, 2), torch.randn(2, 3, 4)
    (before, _), (after, _) = (
        model.auxiliary(x, None, future + shift, torch.cat([static[:, :2], static[:, 2:] + shift], 1))
        for shift in (0, 1)
    )
    assert torch.allclose(before[:, 60:, :2], after[:, 60:, :2]) and not torch.allclose(before[:, 60:], after[:, 60:])
    assert torch.equal(after[:, 30:60, 0], after[:, 30:60, 2]) and not torch.allclose(before[:, 30:60], after[:, 30:60])


def test_past_covariates_are_further_variates():
    model, x, past = TSM2(**SIZES).eval(), torch.randn(2, 30, 3), torch.randn(2, 30, 2)
    y = model(x, past=past)
    assert y.shape == (2, 6, 3) and not torch.allclose(y, model(x), atol=1e-4)
    both = TSM2(**{**SIZES, "n_series": 5}, window_norm="none").eval()
    alone = TSM2(**SIZES, window_norm="none").eval()
    alone.load_state_dict(both.state_dict())
    assert torch.allclose(alone(x, past=past), both(torch.cat([x, past], 2))[..., :3], atol=1e-6)


def test_covariates_it_was_not_built_for_are_refused():
    x = torch.randn(2, 30, 3)
    with pytest.raises(ConfigError, match="future covariates are given; TSM2 was built with n_future=0"):
        TSM2(**SIZES)(x, future=torch.randn(2, 36, 1))
    with pytest.raises(ConfigError, match="static covariates are missing; TSM2 was built with n_static=2"):
        TSM2(**SIZES, n_static=2)(x)


def test_quantiles_add_an_axis():
    model, x = TSM2(**SIZES, quantiles=(0.1, 0.5, 0.9)).eval(), torch.randn(2, 30, 3)
    y = model(x)
    assert y.shape == (2, 6, 3, 3)
    assert torch.allclose(model(2 * x + 1), 2 * y + 1, atol=1e-3)


@pytest.mark.skipif(bool(os.environ.get("SELECTRA_CHECK_SHAPES")), reason="the hook refuses before the model does")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"horizon": 0}, "horizon=0"),
        ({"depth": 0}, "depth=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"stride": 9}, "stride=9 is longer than patch_len=8"),
        ({"norm": "group"}, "norm='group'"),
        ({"window_norm": "first"}, "window_norm='first'"),
        ({"quantiles": (0.5, 1.0)}, "quantiles"),
    ],
)
def test_what_cannot_be_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TSM2(**{**SIZES, **wrong})


@pytest.mark.parametrize(("without", "gone"), [("time", "token"), ("channels", "channel"), ("averages", "average")])
def test_a_part_can_be_left_out(without: Any, gone: str) -> None:
    sizes: dict[str, Any] = {"seq_len": 24, "horizon": 6, "n_series": 3, "d_model": 8, "depth": 2, "d_state": 4}
    whole, part = TSM2(**sizes), TSM2(**sizes, without=without)
    lost = {name for name, _ in whole.named_parameters()} - {name for name, _ in part.named_parameters()}
    assert lost
    assert all(gone in name for name in lost)
    y = part(torch.randn(2, 24, 3))
    y.square().sum().backward()
    assert y.shape == (2, 6, 3)
    assert all(parameter.grad is not None for parameter in part.parameters())


def test_without_averages_is_their_start() -> None:
    """The averages start as the plain chain."""
    sizes: dict[str, Any] = {"seq_len": 24, "horizon": 6, "n_series": 3, "d_model": 8, "depth": 2, "dropout": 0.0}
    whole, part = TSM2(**sizes), TSM2(**sizes, without="averages")
    part.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(2, 24, 3)
    torch.testing.assert_close(part(x), whole(x))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="without='norm'"):
        TSM2(seq_len=24, horizon=6, n_series=3, without="norm")  # pyright: ignore[reportArgumentType]
