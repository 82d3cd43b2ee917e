"""SiMBA: what is its own."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selectra.errors import ConfigError
from selectra.layers.conv_stages import ConvMlp
from selectra.mixers import S6, RowBlock
from selectra.models.simba import Simba
from selectra.official import from_official
from selectra.registry import models
from selectra.spec import Spec
from tests.golden import PRECISIONS, Golden

SOURCE = "badripatro/simba:SiMBA"
FIXTURES = ["simba_net_einfft", "simba_net_mlp", "simba_net_lowvar", "simba_block_einfft", "simba_block_mlp"]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    Golden.read(golden, name, dtype).check_all()


@pytest.mark.parametrize(
    ("size", "token_labels", "expected"),
    [
        *(("small_mlp", True, 26_591_088), ("base_mlp", True, 40_209_744), ("large_mlp", True, 66_762_512)),
        *(("small", True, 15_309_104), ("base", True, 22_819_984), ("large", True, 36_641_264)),
        *(("small_mlp", False, 26_142_088), ("base_mlp", False, 39_696_744), ("large_mlp", False, 66_249_512)),
        *(("small", False, 14_860_104), ("base", False, 22_306_984)),
    ],
)
def test_published_sizes(size, token_labels, expected):
    with torch.device("meta"):
        model = models.build(Spec(f"simba_{size}", token_labels=token_labels))
    assert sum(p.numel() for p in model.parameters()) == expected


# Millions in the paper; without code, so nearness is all that can be asked.
@pytest.mark.parametrize(("size", "published"), [("small", 18.5), ("base", 26.9), ("large", 42.0)])
def test_monarchs_sizes_are_near_the_papers(size, published):
    with torch.device("meta"):
        model = models.build(Spec(f"simba_{size}_monarch", token_labels=True))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 / published - 1) < 0.1


SIZES: dict[str, Any] = {"d_stem": 4, "dims": (16, 32), "depths": (1, 2), "mlp_ratios": (2, 3), "d_state": 4}


@pytest.mark.parametrize("mixer", ["einfft", "monarch", "mlp"])
def test_every_channel_mixer_learns(mixer):
    model = Simba(**SIZES, channel_mixer=mixer, token_labels=True, n_classes=5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y = model(torch.randn(2, 3, 40, 24))
    assert y.shape == (2, 5)
    y.square().sum().backward()
    zero = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The class token's Mamba sees one token: nothing recurs.
    assert zero == ["class_block.mamba.A_log"]


def test_token_labels_add_half_of_the_greatest_scores():
    model, x = Simba(**SIZES, token_labels=True, n_classes=5).eval(), torch.randn(2, 3, 32, 32)
    assert model.aux_head is not None
    tokens = model.features(x)[-1].flatten(1, 2)
    expected = model.head(model.embed(x)) + 0.5 * model.aux_head(tokens).max(1)[0]
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_the_start_as_shipped_has_one_step_everywhere():
    mamba, shipped = (Simba(**SIZES, start=start) for start in ("mamba", "shipped"))
    for model, is_shipped in ((mamba, False), (shipped, True)):
        biases = [m.dt_proj.bias for m in model.modules() if isinstance(m, S6)]
        assert all((bias == 0).all() == is_shipped for bias in biases)


def test_a_convolution_sees_the_grid():
    """Across the end of a row Mamba goes on, the convolution does not."""
    block = RowBlock(4, S6(4, d_state=2), ConvMlp(4, 8))
    x = torch.randn(1, 3, 5, 4, requires_grad=True)
    assert block.channel is not None
    (gradient,) = torch.autograd.grad(block.channel(x)[0, 1, 4].sum(), x)
    seen = (gradient[0] != 0).any(-1)
    assert seen[:, 3:].all() and not seen[:, :3].any()


CONFIG: dict[str, Any] = {"embed_dims": [8, 16], "depths": [1, 1], "mlp_ratios": [2, 2], "num_stages": 2}


@pytest.mark.parametrize(
    ("norm_layer", "eps"),
    [("LayerNorm eps=1e-6", 1e-6), ("LayerNorm", 1e-5), (nn.LayerNorm, 1e-5), (partial(nn.LayerNorm, eps=1e-3), 1e-3)],
)
def test_the_norms_eps_is_read(norm_layer, eps):
    model = from_official_untrained({**CONFIG, "norm_layer": norm_layer, "token_label": False})
    assert model.class_block.norm2.eps == model.stages[0].norm.eps == eps
    assert model.class_block.norm1.eps == model.stages[1].embed.norm.eps == 1e-5


def test_the_norms_eps_without_an_official_configuration():
    model: Any = Simba(**SIZES)
    assert model.class_block.norm2.eps == 1e-6 and model.class_block.norm1.eps == 1e-5


def test_no_classes():
    """With 0 classes the official model has no head."""
    model = from_official_untrained({**CONFIG, "num_classes": 0, "token_label": False}).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), model.embed(x)) and not any("head" in key for key in model.state_dict())


def from_official_untrained(config: dict[str, Any]) -> Any:
    from selectra.official import readers

    return readers[SOURCE](**config).model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_layer": "BatchNorm"}, "option 'norm_layer' is 'BatchNorm'"),
        ({"norm_layer": nn.GroupNorm}, "norm_layer|GroupNorm"),
        ({"num_classes": 0}, "option 'num_classes' is 0 with 'token_label'"),
        ({"cm_type": "monarch"}, "option 'cm_type' is 'monarch'"),
        ({"num_stages": 4}, "option 'num_stages' is 4"),
        ({"embed_dim": [8]}, "no supported option 'embed_dim'.*Did you mean 'embed_dims'"),
    ],
)
def test_what_is_not_supported_is_named(config, message):
    with pytest.raises((ConfigError, TypeError), match=message):
        from_official(SOURCE, {**CONFIG, **config}, {})


def test_a_block_needs_the_grids_sides():
    block = from_official("badripatro/simba:Block_mamba", {"dim": 4, "mlp_ratio": 2}, official_block())
    x = torch.randn(1, 6, 4)
    assert torch.equal(block(x, 2, 3)[0], block(x, H=2, W=3)[0])
    with pytest.raises(ConfigError, match="H=2 and W=2: x has 6 tokens"):
        block(x, 2, 2)


def official_block() -> dict[str, torch.Tensor]:
    names = {"norm1.": "attn.norm.", "mamba.": "attn.mamba.", "channel.dwconv.": "mlp.dwconv.dwconv."}
    state = RowBlock(4, S6(4, d_state=64), ConvMlp(4, 8)).state_dict()
    for ours, theirs in {**names, "channel.": "mlp."}.items():
        state = {key.replace(ours, theirs) if key.startswith(ours) else key: value for key, value in state.items()}
    return state
