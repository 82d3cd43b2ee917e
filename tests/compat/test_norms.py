"""Normalisation by mamba_ssm's names: values and gradients against the formula."""

# pyright: reportMissingImports=false

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from tests.compat import references
from tests.compat.references import assert_same, random

pytestmark = pytest.mark.usefixtures("installed")


def norm_inputs() -> dict[str, Any]:
    """Random arguments in float64."""
    shape = (2, 3, 5)
    return {"x": random(*shape, seed=1), "weight": random(5, seed=2), "bias": random(5, seed=3)}


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_add_and_norm_by_call(rms: bool, prenorm: bool, residual: bool) -> None:
    from mamba_ssm.ops.triton import layer_norm, layernorm

    inputs = norm_inputs() | ({"residual": random(2, 3, 5, seed=4)} if residual else {})

    def formula(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        y = references.norm(total, weight, bias, 1e-5, rms)
        return (y, total) if prenorm else y

    flags = {"eps": 1e-5, "prenorm": prenorm}
    for module in (layer_norm, layernorm):
        assert_same(lambda m=module, **given: m.layer_norm_fn(**given, **flags, is_rms_norm=rms), formula, inputs)
        function = module.rms_norm_fn if rms else module.layer_norm_fn
        assert_same(lambda f=function, **given: f(**given, **flags), formula, inputs)
        reference = module.rms_norm_ref if rms else module.layer_norm_ref
        assert_same(lambda f=reference, **given: f(**given, **flags), formula, inputs)


def test_second_input_second_scale_and_scaled_rows() -> None:
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

    inputs = norm_inputs() | {"x1": random(2, 3, 5, seed=5), "weight1": random(5, seed=6), "bias1": random(5, seed=7)}

    def formula(x: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, weight1: Tensor, bias1: Tensor) -> Any:
        total = x + x1
        first = references.norm(total, weight, bias, 1e-6, False)
        return first, references.norm(total, weight1, bias1, 1e-6, False), total

    assert_same(lambda **given: layer_norm_fn(**given, prenorm=True), formula, inputs)
    rows = norm_inputs() | {"rowscale": random(2, 3, seed=8)}

    def scaled(x: Tensor, weight: Tensor, bias: Tensor, rowscale: Tensor) -> Tensor:
        return references.norm(x * rowscale[..., None], weight, bias, 1e-6, False)

    assert_same(layer_norm_fn, scaled, rows)
    with pytest.raises(ConfigError, match="rowscale goes with one input"):
        layer_norm_fn(**inputs, rowscale=rows["rowscale"])


def test_dropout_keeps_the_mean_and_says_what_it_kept() -> None:
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn

    x, weight = torch.ones(1000, 8), torch.ones(8)
    _, total, mask, mask1 = layer_norm_fn(x, weight, None, dropout_p=0.25, prenorm=True, return_dropout_mask=True)
    assert mask1 is None and 0.7 < mask.double().mean() < 0.8
    torch.testing.assert_close(total, mask / 0.75)
    norm = RMSNorm(8, dropout_p=0.25)
    assert (norm(x) == 0).any() and not (norm.eval()(x) == 0).any()


@pytest.mark.parametrize("asked", [False, True])
def test_types_of_result_and_residual(asked: bool) -> None:
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    norm, x = RMSNorm(5), torch.randn(2, 5).bfloat16()
    y, total = norm(x, prenorm=True, residual_in_fp32=asked)
    assert y.dtype == torch.bfloat16 and total.dtype == (torch.float32 if asked else torch.bfloat16)
    y, total = norm(x, residual=torch.randn(2, 5), prenorm=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
    norm.weight.data.zero_()
    norm.reset_parameters()
    assert (norm.weight == 1).all() and norm.bias is None and list(norm.state_dict()) == ["weight"]


def test_norm_and_map() -> None:
    from mamba_ssm.ops.triton.layer_norm import layer_norm_linear_fn

    inputs = {"x": random(3, 5, seed=1), "norm_weight": random(5, seed=2), "norm_bias": random(5, seed=3)}
    inputs |= {
        "linear_weight": random(4, 5, seed=4),
        "linear_bias": random(4, seed=5),
        "residual": random(3, 5, seed=6),
    }

    def formula(**given: Any) -> Any:
        total = given["x"] + given["residual"]
        y = references.norm(total, given["norm_weight"], given["norm_bias"], 1e-6, False)
        return y @ given["linear_weight"].T + given["linear_bias"], total

    assert_same(lambda **given: layer_norm_linear_fn(**given, prenorm=True), formula, inputs)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 3])
def test_gated_norms(rms: bool, before: bool, group: int | None) -> None:
    from mamba_ssm.ops.triton import layernorm_gated

    inputs = {
        "x": random(2, 6, seed=1),
        "weight": random(6, seed=2),
        "bias": random(6, seed=3),
        "z": random(2, 6, seed=4),
    }

    def formula(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        gate = z * torch.sigmoid(z)
        y = (x if before else x * gate).reshape(2, -1, group or 6)
        y = references.norm(y, torch.ones((), dtype=x.dtype), None, 1e-6, rms).reshape(2, 6) * weight + bias
        return y * gate if before else y

    function = layernorm_gated.rmsnorm_fn if rms else layernorm_gated.layernorm_fn
    assert_same(lambda **given: function(**given, group_size=group, norm_before_gate=before), formula, inputs)
    module = (layernorm_gated.RMSNorm if rms else layernorm_gated.LayerNorm)(6, 1e-6, group, before).double()
    zero = torch.zeros(6, dtype=torch.float64)
    want = formula(inputs["x"], 1 + zero, zero, inputs["z"])
    torch.testing.assert_close(module(inputs["x"], inputs["z"]).detach(), want)


@pytest.mark.parametrize("residual_type", [None, torch.float32])
def test_sums_of_half_types_are_rounded_once(residual_type: torch.dtype | None) -> None:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    x, x1 = (torch.randn(5, 8).bfloat16() for _ in range(2))
    residual, rowscale = None if residual_type is None else torch.randn(5, 8), torch.rand(5)
    before, flags = 0 if residual is None else residual, {"prenorm": True, "residual_in_fp32": True}
    _, total = rms_norm_fn(x, torch.ones(8), None, residual, x1, **flags)
    torch.testing.assert_close(total, x.float() + x1.float() + before, rtol=1e-6, atol=1e-6)
    _, total = rms_norm_fn(x, torch.ones(8), None, residual, rowscale=rowscale, **flags)
    torch.testing.assert_close(total, x.float() * rowscale[:, None] + before, rtol=1e-6, atol=1e-6)
    # Without a residual its type is the input's.
    assert rms_norm_fn(x, torch.ones(8), None, rowscale=rowscale, prenorm=True)[1].dtype == torch.bfloat16
