"""What every registered series model keeps, found by itself: shapes, gradients, independence, gaps, covariates."""

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import selectra.models  # noqa: F401
from selectra.errors import ConfigError
from selectra.layers.covariates import WithCovariates
from selectra.layers.revin import WindowNorm
from selectra.registry import models
from selectra.spec import Spec

NAMES = [name for name in models.names("series") if name.endswith("_smoke")]
# Those that scan along the series, whose order their forecasts therefore depend on.
SCANS_SERIES = {"modern_tcn", "tsm2", "s_mamba", "timemachine"}
EACH = pytest.mark.parametrize("name", NAMES)
SHAPES = pytest.mark.parametrize(("seq_len", "horizon", "n_series"), [(24, 8, 3), (17, 5, 1), (8, 1, 2), (31, 37, 4)])


def build(
    name: str, *, seq_len: int = 24, horizon: int = 8, n_series: int = 3, season: int = 4, **arguments: Any
) -> nn.Module:
    facts = {"seq_len": seq_len, "horizon": horizon, "n_series": n_series, "season": season}
    return models.build(Spec(name, **arguments), facts).eval()


def window(batch: int = 4, seq_len: int = 24, n_series: int = 3) -> tuple[Tensor, Tensor]:
    """A window with gaps, a series without any value among them."""
    x = torch.randn(batch, seq_len, n_series)
    observed = torch.rand(batch, seq_len, n_series) > 0.3
    observed[0, :, 0] = False
    return x.masked_fill(~observed, 0), observed


def test_every_family_has_a_smoke_size():
    assert {name.removesuffix("_smoke") for name in models.names() if name.endswith("_smoke")} == set(models.families())


@EACH
@SHAPES
def test_shapes(name, seq_len, horizon, n_series):
    model = build(name, seq_len=seq_len, horizon=horizon, n_series=n_series)
    x, observed = window(2, seq_len, n_series)
    for y in (model(x), model(x, observed=observed)):
        assert y.shape == (2, horizon, n_series) and y.dtype == torch.float32 and y.isfinite().all()


@EACH
def test_layer_norms_are_over_one_dimension(name):
    """PyTorch's over several fail in the backward of more than 65,536 rows on a GPU: `layers.norm.LayerNorm`."""
    arguments: dict[str, Any] = {"norm": "layer"} if name == "tsmixer_smoke" else {}
    plain = [module for module in build(name, **arguments).modules() if type(module) is nn.LayerNorm]
    assert all(len(norm.normalized_shape) == 1 for norm in plain)


@EACH
def test_every_parameter_gets_a_gradient(name):
    model, (x, observed) = build(name), window()
    parameters = dict(model.named_parameters())
    if not parameters:
        pytest.skip("nothing to learn")
    model(x, observed=observed).square().sum().backward()
    without = [
        key for key, p in parameters.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert without == []


@EACH
def test_batch_elements_do_not_see_each_other(name):
    model, (x, observed) = build(name), window()
    together = model(x, observed=observed)
    for i in range(len(x)):
        alone = model(x[i : i + 1], observed=observed[i : i + 1])
        assert torch.allclose(alone, together[i : i + 1], rtol=1e-5, atol=1e-6)


@EACH
def test_the_horizon_is_not_seen(name):
    """Windows are views of one record, in which each one's horizon follows it and lies in the next one's window."""
    model, record = build(name), torch.randn(40, 3)
    x = record.unfold(0, 24, 8).transpose(1, 2)  # rows 0 to 23, 8 to 31, 16 to 39
    y = model(x)
    for i in range(3):
        known = record.clone()
        known[8 * i + 24 :] = math.nan
        assert torch.allclose(model(known[8 * i : 8 * i + 24][None])[0], y[i], rtol=1e-5, atol=1e-6)


@EACH
def test_what_is_not_observed_has_no_effect(name):
    model, (x, observed) = build(name), window()
    y = model(x, observed=observed)
    for beneath in (7.0, math.nan, 1e30, -1e30, math.inf):
        assert torch.equal(model(x.masked_fill(~observed, beneath), observed=observed), y)
    gradients = []
    for beneath in (0.0, math.nan, 1e30):
        poisoned = x.masked_fill(~observed, beneath).requires_grad_()
        model.zero_grad()
        model(poisoned, observed=observed).sum().backward()
        assert poisoned.grad is not None and (poisoned.grad[~observed] == 0).all()
        gradients.append([poisoned.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients[0], other, strict=True))
    assert all(gradient.isfinite().all() for gradient in gradients[0])


@EACH
def test_a_closed_form_does_not_see_what_is_not_observed(name):
    if not hasattr(build(name), "solve"):
        pytest.skip("is not solved")
    (x, observed), y = window(32), torch.randn(32, 8, 3)
    seen = torch.rand_like(y) > 0.3
    solved = []
    for beneath in (0.0, math.nan, 1e30):
        model: Any = build(name)
        model.solve([Batch(x.masked_fill(~observed, beneath), observed, y.masked_fill(~seen, beneath), seen)])
        solved.append(list(model.parameters()))
    assert all(torch.equal(a, b) for other in solved[1:] for a, b in zip(solved[0], other, strict=True))


@EACH
def test_the_order_of_the_series_matters_to_scans_across_them_alone(name):
    n_series = 11  # no other axis of a smoke size has this length
    model, (x, observed) = build(name, n_series=n_series), window(n_series=n_series)
    order = torch.randperm(n_series)
    y = model(x, observed=observed)[..., order]
    changed = model(x[..., order], observed=observed[..., order])
    if name.removesuffix("_smoke") in SCANS_SERIES:
        assert not torch.allclose(changed, y, atol=1e-4)
        return
    with torch.no_grad():
        own = [p for p in model.parameters() if n_series in p.shape]
        for parameter in own:
            # Not the same for all series, as after training.
            parameter.add_(0.1 * torch.randn_like(parameter))
        y = model(x, observed=observed)[..., order]
        for parameter in own:
            for axis in (axis for axis, length in enumerate(parameter.shape) if length == n_series):
                parameter.copy_(parameter.index_select(axis, order))
        changed = model(x[..., order], observed=observed[..., order])
    assert torch.allclose(changed, y, rtol=0, atol=1e-5)


@EACH
def test_a_full_mask_is_no_mask(name):
    model, (x, _) = build(name), window()
    assert torch.allclose(model(x, observed=torch.ones_like(x, dtype=torch.bool)), model(x), rtol=1e-5, atol=1e-6)


@EACH
def test_window_norms_are_the_same_for_all(name):
    if "window_norm" not in models.entry(name).parameters():
        pytest.skip("has none")
    x, observed = window()
    for mode in get_args(WindowNorm):
        if mode == "revin" and hasattr(build(name), "solve"):
            # Nothing in it is learned by gradient.
            with pytest.raises(ConfigError, match="revin"):
                build(name, window_norm=mode)
            continue
        model = build(name, window_norm=mode)
        y = model(x, observed=observed)
        follows = torch.allclose(model(x + 5, observed=observed)[1:], y[1:] + 5, rtol=1e-3, atol=1e-3)
        assert follows == (mode != "none"), mode
        twice = torch.allclose(model(3 * x, observed=observed)[1:], 3 * y[1:], rtol=1e-2, atol=1e-2)
        assert twice or mode not in ("instance", "revin"), mode


@EACH
def test_quantiles_add_an_axis(name):
    if "quantiles" not in models.entry(name).parameters():
        pytest.skip("has none")
    model, (x, observed) = build(name, quantiles=(0.1, 0.5, 0.9)), window()
    y = model(x, observed=observed)
    assert y.shape == (4, 8, 3, 3) and y.isfinite().all()
    assert not torch.allclose(y[..., 0], y[..., 1])
    for wrong in ((0.5, 1.0), (0.0,)):
        with pytest.raises(ConfigError, match="quantiles"):
            build(name, quantiles=wrong)


@EACH
def test_weights_are_saved_and_loaded(name, tmp_path):
    model, other, (x, observed) = build(name), build(name), window()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x, observed=observed), model(x, observed=observed))


@EACH
def test_bfloat16_autocast_stays_near(name):
    model, (x, observed) = build(name), window()
    y = model(x, observed=observed)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, observed=observed)
    assert low.isfinite().all()
    assert (low.float() - y).abs().max() <= 0.05 * y.abs().max()


@pytest.mark.compile
@EACH
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    model, (x, observed) = build(name), window()
    # PyTorch traces none of its own recurrent networks.
    traced = not any(isinstance(module, nn.RNNBase) for module in model.modules())
    y = expected = x
    # Gradients are traced for the longer graph, which has all that the other has.
    for given, backend in (({}, "eager"), ({"observed": observed}, "aot_eager")):
        compiled = torch.compile(model, fullgraph=traced, backend=backend)
        y, expected = compiled(x, **given), model(x, **given)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    if parameters:
        gradients, wanted = (torch.autograd.grad(output.square().sum(), parameters) for output in (y, expected))
        for got, want in zip(gradients, wanted, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@EACH
def test_training_and_evaluation_differ_in_dropout_alone(name):
    model, (x, observed) = build(name), window()
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        pytest.skip("its batch norms, which it has as published, differ too")
    y = model(x, observed=observed)
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(x, observed=observed), y)


@dataclass(frozen=True)
class Batch:
    """What closed-form models read."""

    x: Tensor
    observed: Tensor
    y: Tensor
    y_observed: Tensor
    past: Tensor | None = None
    future: Tensor | None = None
    static: Tensor | None = None


def wrap(name: str, takes: tuple[str, ...] | None = None) -> WithCovariates:
    takes = models.entry(name).takes if takes is None else takes
    counts = {"past": 2, "future": 3, "static": 4}
    own = {
        f"n_{kind}": n for kind, n in counts.items() if kind in takes and f"n_{kind}" in models.entry(name).parameters()
    }
    sizes = {"seq_len": 24, "horizon": 8, "n_series": 3, **{f"n_{kind}": n for kind, n in counts.items()}}
    return WithCovariates(build(name, **own), takes=takes, name=name, **sizes)


def covariates(batch: int = 4) -> dict[str, Tensor]:
    return {"past": torch.randn(batch, 24, 2), "future": torch.randn(batch, 32, 3), "static": torch.randn(batch, 3, 4)}


@EACH
def test_every_model_takes_all_covariates_through_the_wrapper(name):
    model: Any = wrap(name)
    (x, observed), given = window(), covariates()
    y = model(x, observed=observed, **given)
    # The residual head starts at 0.
    own = {kind: value for kind, value in given.items() if kind in models.entry(name).takes}
    assert torch.equal(y, model.model(x, observed=observed, **own))
    # What a solved model is given is a regression, where static covariates are a constant of each series.
    encoder, solved = model.encoder, model.in_closed_form
    if model.encoded:
        with torch.no_grad():
            (encoder if solved else encoder.head).weight.normal_()
    y = model(x, observed=observed, **given)
    assert y.shape == (4, 8, 3)
    for kind, value in given.items():
        changed = not torch.allclose(model(x, observed=observed, **{**given, kind: value + 1}), y)
        assert changed != (solved and kind == "static"), kind
    if not solved:
        y.sum().backward()
        assert not model.encoded or all(p.grad is not None and p.grad.any() for p in encoder.parameters())


@EACH
def test_every_model_can_be_given_filled_gaps(name):
    """As if it took none of the optional inputs; a solved model is solved on filled windows."""
    model, (x, observed) = wrap(name, takes=()), window()
    assert any("cannot use missing values" in note for note in model.notes)
    y, given = torch.randn(4, 8, 3), covariates()
    batch = Batch(x.masked_fill(~observed, math.nan), observed, y, torch.ones(4, 8, 3).bool(), **given)
    assert hasattr(model, "solve") == hasattr(model.model, "solve")
    if model.in_closed_form:
        model.solve([batch, replace(batch, y=batch.y + 1)])
        encoder: Any = model.encoder
        assert encoder.weight.isfinite().all() and encoder.weight.any()
    y = model(batch.x, observed=observed, **given)
    assert y.shape == (4, 8, 3) and y.isfinite().all()
