"""Whole modules that were pickled where other generations of mamba_ssm, or its forks, were installed."""

# pyright: reportMissingImports=false

import pickle
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("installed")


def reloaded(module: nn.Module, *absent: str, **further: Any) -> Any:
    """Pickled and read again by a class that did not keep some of what ours keeps."""
    for name in absent:
        del module.__dict__[name]
    module.__dict__.update(further)
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    ("options", "absent", "further"),
    [
        ({}, ["bimamba_type", "if_divide_out", "init_layer_scale", "nslices", "_at"], {}),
        ({"bimamba": True}, ["bimamba_type", "if_divide_out", "init_layer_scale", "nslices"], {"bimamba": True}),
        ({"bimamba_type": "v2", "if_divide_out": True}, ["nslices"], {}),
    ],
    ids=["mamba_ssm", "VideoMamba", "Vim"],
)
def test_blocks_of_mamba_ssm_and_of_forks(options: Any, absent: list[str], further: Any) -> None:
    from mamba_ssm import Mamba

    block, x = Mamba(8, **options), torch.randn(2, 5, 8)
    want = block(x)
    assert torch.equal(reloaded(block, *absent, **further)(x), want)


def test_a_residual_block_and_a_norm_of_2024() -> None:
    from mamba_ssm import Mamba
    from mamba_ssm.modules.mamba_simple import Block
    from mamba_ssm.ops.triton.layernorm import RMSNorm

    block, x = Block(8, Mamba, RMSNorm, fused_add_norm=True, residual_in_fp32=True), torch.randn(2, 5, 8)
    want = block(x)
    block.norm = reloaded(block.norm, "drop")
    for got, there in zip(reloaded(block, "mlp", "layer_idx")(x), want, strict=True):
        assert torch.equal(got, there)


def test_parts_that_were_there_stay() -> None:
    from mamba_ssm import Mamba
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mlp import GatedMLP
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    block = Block(8, Mamba, GatedMLP, lambda width: RMSNorm(width, dropout_p=0.5))
    again = reloaded(block)
    assert isinstance(again.mlp, GatedMLP) and again.norm.drop.p == 0.5
