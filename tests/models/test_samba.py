"""Samba: what is its own."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selectra.errors import ConfigError, DataError
from selectra.mixers import S6
from selectra.models.samba import Samba
from selectra.models.simba import Simba
from selectra.official import from_official, readers
from selectra.pretrained import load_pretrained
from selectra.registry import models
from selectra.spec import Spec
from tests.golden import PRECISIONS, Golden

SOURCE = "zhuqinfeng1999/Samba:Samba"
SIZES: dict[str, Any] = {"d_stem": 4, "dims": (16, 32), "depths": (1, 2), "mlp_ratios": (2, 3), "d_state": 4}
CONFIG: dict[str, Any] = {"embed_dims": [8, 16], "depths": [1, 1], "mlp_ratios": [2, 2], "num_stages": 2}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["samba_backbone", "samba_backbone_lowvar", "samba_block"])
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    Golden.read(golden, name, dtype).check_all()


def test_the_encoders_published_size():
    with torch.device("meta"):
        model = models.build(Spec("samba"))
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head.")) == 22_650_720
    model.reset_classifier(0, "avg")
    assert sum(p.numel() for p in model.parameters()) == 22_650_720


def test_the_encoder_is_simbas_with_mlps():
    simba = Simba(**SIZES, channel_mixer="mlp", n_classes=5, token_labels=True)
    model = Samba(**SIZES, n_classes=3).eval()
    with torch.no_grad():
        for p in simba.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for module in simba.eval().modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    load_pretrained(model, official_names(simba))
    x = torch.randn(2, 3, 40, 24)
    for ours, theirs in zip(model.features(x), simba.features(x), strict=True):
        assert torch.equal(ours, theirs)


def official_names(simba: Simba) -> dict[str, torch.Tensor]:
    """A SiMBA's state as its repository has it."""
    return {official_name(key): value for key, value in simba.state_dict().items()}


def official_name(key: str) -> str:
    stage = re.fullmatch(r"stages\.(\d+)\.(embed|blocks|norm)\.(.+)", key)
    if key.startswith("class_block."):
        return "post_network.0." + official_block_name(key.removeprefix("class_block."))
    if stage is None:
        return key
    number, part, rest = int(stage[1]) + 1, stage[2], stage[3]
    if part == "blocks":
        place, _, rest = rest.partition(".")
        return f"block{number}.{place}.{official_block_name(rest)}"
    if part == "norm":
        return f"norm{number}.{rest}"
    # Behind the stem's own convolutions, and in what halves a grid, the last convolution and its norm.
    rest = rest.removeprefix("proj.") if number == 1 and rest.startswith("proj.") else rest
    is_last = re.fullmatch(r"conv\.(weight|bias)", rest) is not None
    return f"patch_embed{number}.{rest.replace('conv.', 'proj.') if is_last else rest}"


def official_block_name(key: str) -> str:
    for ours, theirs in (("norm1.", "attn.norm."), ("mamba.", "attn.mamba."),
                         ("channel.dwconv.", "mlp.dwconv.dwconv."), ("channel.", "mlp.")):  # fmt: skip
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def test_a_segmentation_networks_state_gives_the_encoder():
    simba, model = Simba(**SIZES, channel_mixer="mlp"), Samba(**SIZES)
    state = {f"backbone.{k}": v for k, v in official_names(simba).items() if k.startswith(("patch", "block", "norm"))}
    loaded = load_pretrained(model, {**state, "decode_head.conv_seg.weight": torch.ones(2)})
    assert loaded.fresh == ("head.bias", "head.weight")
    with pytest.raises(DataError, match=r"it lacks .*stages\.0"):
        load_pretrained(model, {k: v for k, v in state.items() if "block1" not in k})


def test_the_classifier_reads_the_normalised_mean_token():
    model, x = Samba(**SIZES, n_classes=5).eval(), torch.randn(2, 3, 40, 24)
    grid = model.forward_features(x).permute(0, 2, 3, 1)
    norm: Any = model.stages[-1].norm
    assert torch.allclose(model.embed(x), norm(grid.mean((1, 2))), atol=1e-6)
    assert torch.allclose(model.features(x)[-1], norm(grid), atol=1e-6)


def test_each_stage_reads_the_normalised_grid():
    model, x = Samba(**SIZES).eval(), torch.randn(1, 3, 32, 32)
    first = model.features(x)[0]
    second: Any = model.stages[1]
    y = second.embed(first)
    for block in second.blocks:
        y = block(y)
    assert torch.allclose(model.features(x)[1], second.norm(y), atol=1e-6)


def test_the_start_as_shipped_has_one_step_everywhere():
    for model, is_shipped in ((Samba(**SIZES), False), (Samba(**SIZES, start="shipped"), True)):
        biases = [m.dt_proj.bias for m in model.modules() if isinstance(m, S6)]
        assert all((bias == 0).all() == is_shipped for bias in biases)


def untrained(config: dict[str, Any]) -> Any:
    return readers[SOURCE](**config)


@pytest.mark.parametrize(
    ("norm_layer", "eps"),
    [("LayerNorm eps=1e-6", 1e-6), (nn.LayerNorm, 1e-5), (partial(nn.LayerNorm, eps=1e-3), 1e-3)],
)
def test_the_norms_eps_is_read(norm_layer, eps):
    model = untrained({**CONFIG, "norm_layer": norm_layer}).model
    assert model.stages[0].blocks[0].norm2.eps == model.stages[0].norm.eps == eps
    assert model.stages[0].blocks[0].norm1.eps == model.stages[1].embed.norm.eps == 1e-5


def test_without_token_labels_the_mean_token_comes():
    official = untrained({**CONFIG, "token_label": False}).eval()
    (token,) = official(torch.randn(2, 3, 24, 40))
    assert token.shape == (2, 16)


def test_rates_rise_over_all_described_blocks():
    config = {"embed_dims": [8, 16, 24], "depths": [2, 3, 4], "mlp_ratios": [2, 2, 2], "num_stages": 2}
    model = untrained({**config, "drop_path_rate": 0.8}).model
    rates = [block.drop_path.rate for block in model.blocks()]
    assert rates == pytest.approx([0.1 * i for i in range(5)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_layer": "BatchNorm"}, "option 'norm_layer' is 'BatchNorm'"),
        ({"num_stages": 4}, "option 'num_stages' is 4; embed_dims, mlp_ratios, depths"),
        ({"embed_dim": [8]}, "no supported option 'embed_dim'.*Did you mean 'embed_dims'"),
        ({"token_label": "maybe"}, "option 'token_label' is 'maybe'"),
    ],
)
def test_what_is_not_supported_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        from_official(SOURCE, {**CONFIG, **config}, {})
