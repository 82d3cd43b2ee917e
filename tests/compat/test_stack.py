"""Blocks, stacks and language models by mamba_ssm's names: values and every gradient against loops of our own."""

# pyright: reportMissingImports=false

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.compat import references
from tests.compat.references import assert_same, random
from tests.compat.test_mamba import loop
from tests.compat.test_mamba2 import block_by_loop

pytestmark = pytest.mark.usefixtures("installed")
MAMBA2 = {"layer": "Mamba2", "d_state": 5, "headdim": 4}


def drawn(module: Any) -> Any:
    """In float64, with random parameters."""
    module = module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=100 + i, scale=0.3))
    return module


def normed(norm: Any, x: Tensor) -> Tensor:
    return references.norm(x, norm.weight, norm.bias, norm.eps, not isinstance(norm, nn.LayerNorm))


def mixed(mixer: Any, x: Tensor) -> Tensor:
    return block_by_loop(mixer, x) if hasattr(mixer, "headdim") else loop(mixer, x)


def perceptron(mlp: Any, x: Tensor) -> Tensor:
    a, b = (x @ mlp.fc1.weight.T).chunk(2, -1)
    return (a * F.silu(b)) @ mlp.fc2.weight.T


def block_by_call(block: Any, hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    residual = hidden_states if residual is None else hidden_states + residual
    x = mixed(block.mixer, normed(block.norm, residual))
    if block.mlp is not None:
        residual = residual + x
        x = perceptron(block.mlp, normed(block.norm2, residual))
    return x, residual


def stack(model: Any, tokens: Tensor) -> Tensor:
    x: Tensor = model.embedding.weight[tokens]
    residual: Any = None
    for layer in model.layers:
        x, residual = block_by_call(layer, x, residual)
    return normed(model.norm_f, x + residual)


def assert_parameters(got: Tensor, want: Tensor, module: nn.Module) -> None:
    """Outputs, and the gradient of a fixed loss with respect to every parameter."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    parameters = dict(module.named_parameters())
    weight = random(*want.shape, seed=5)
    found = [torch.autograd.grad((y * weight).sum(), list(parameters.values())) for y in (got, want)]
    for name, a, b in zip(parameters, *found, strict=True):
        assert b.any(), name
        assert (a - b).abs().max() <= 1e-8 * b.abs().max(), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("inner", [0, 128])
def test_blocks(fused: bool, rms: bool, inner: int) -> None:
    from mamba_ssm import Mamba
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mlp import GatedMLP
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    def mlp(dim: int) -> Any:
        return GatedMLP(dim, inner, dim)

    mixer = lambda dim: Mamba(dim, d_state=3)  # noqa: E731
    block = drawn(Block(6, mixer, mlp if inner else nn.Identity, RMSNorm if rms else nn.LayerNorm, fused))
    inputs = {"hidden_states": random(2, 5, 6, seed=1), "residual": random(2, 5, 6, seed=2)}
    assert_same(block.forward, lambda **given: block_by_call(block, **given), inputs, 1e-9)
    x = inputs["hidden_states"]
    assert_parameters(torch.cat(block(x), -1), torch.cat(block_by_call(block, x), -1), block)


def test_the_block_of_2024() -> None:
    from mamba_ssm.modules.mamba_simple import Block, Mamba

    block = drawn(Block(6, lambda dim: Mamba(dim, d_state=3), fused_add_norm=True))
    inputs = {"hidden_states": random(2, 5, 6, seed=1), "residual": random(2, 5, 6, seed=2)}
    assert_same(block.forward, lambda **given: block_by_call(block, **given), inputs, 1e-9)
    assert_parameters(block(inputs["hidden_states"])[0], block_by_call(block, inputs["hidden_states"])[0], block)


@pytest.mark.parametrize("mixer", [{"d_state": 3}, MAMBA2], ids=["Mamba1", "Mamba2"])
@pytest.mark.parametrize(("fused", "rms", "inner"), [(False, False, 0), (True, True, 128), (False, True, 128)])
def test_stacks(mixer: dict[str, Any], fused: bool, rms: bool, inner: int) -> None:
    from mamba_ssm.models.mixer_seq_simple import MixerModel

    model = drawn(MixerModel(8, 2, inner, 11, mixer, rms_norm=rms, fused_add_norm=fused))
    tokens = torch.randint(11, (2, 5))
    assert_parameters(model(tokens), stack(model, tokens), model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixer", [{"d_state": 3}, MAMBA2], ids=["Mamba1", "Mamba2"])
def test_language_models(mixer: dict[str, Any], tied: bool) -> None:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(8, 128, 2, 13, mixer, residual_in_fp32=False, tie_embeddings=tied)
    model = drawn(MambaLMHeadModel(config))
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tied
    tokens = torch.randint(13, (2, 5))
    want = stack(model.backbone, tokens) @ model.lm_head.weight.T
    assert_parameters(model(tokens).logits, want, model)
    torch.testing.assert_close(model(tokens, num_last_tokens=2).logits, want[:, -2:])


@pytest.mark.parametrize("simple", [False, True])
def test_parameters_of_mamba2(simple: bool) -> None:
    from mamba_ssm import Mamba2
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    block = drawn((Mamba2Simple if simple else Mamba2)(8, d_state=5, headdim=4, ngroups=2))
    x = random(2, 6, 8, seed=1)
    assert_parameters(block(x), block_by_loop(block, x), block)


def test_the_combined_and_split_scan_by_call() -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    heads, p, n = 4, 4, 5
    inner = heads * p
    inputs: dict[str, Tensor | None] = {
        "zxbcdt": random(2, 6, 2 * inner + 2 * n + heads, seed=1),
        "weight": random(inner + 2 * n, 4, seed=2, scale=0.5),
        "bias": random(inner + 2 * n, seed=3),
        "dt_bias": random(heads, seed=4),
        "A": -random(heads, seed=5).exp(),
        "D": random(heads, seed=6),
        "norm": random(inner, seed=7),
        "out": random(8, inner, seed=8, scale=0.3),
    }

    def ours(**t: Any) -> Tensor:
        return mamba_split_conv1d_scan_combined(
            t["zxbcdt"], t["weight"], t["bias"], t["dt_bias"], t["A"], t["D"], 4, rmsnorm_weight=t["norm"],
            rmsnorm_eps=1e-5, outproj_weight=t["out"], headdim=p, ngroups=1, norm_before_gate=False,
        )  # fmt: skip

    def formula(**t: Any) -> Tensor:
        z, xBC, dt = t["zxbcdt"].split([inner, inner + 2 * n, heads], -1)
        mixed = references.convolve(xBC.transpose(1, 2), t["weight"], t["bias"]).transpose(1, 2)
        x, B, C = mixed.split([inner, n, n], -1)
        x = x.unflatten(-1, (heads, p))
        y, _ = references.ssd(x, F.softplus(dt + t["dt_bias"]), t["A"], B[:, :, None], C[:, :, None], None, None)
        y = (y + t["D"][:, None] * x).flatten(-2) * F.silu(z)
        return references.norm(y, t["norm"], None, 1e-5, True) @ t["out"].T

    assert_same(ours, formula, inputs, 1e-9)
