"""Vim: what is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from selectra.layers.norm import PreNorm
from selectra.mixers import S6, Bidirectional
from selectra.models.vim import Halved, SharedBidirectional, Vim
from selectra.official import BACK, from_official
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.optim import without_decay
from tests.golden import PRECISIONS, Golden

SOURCE = "hustvl/Vim:VisionMamba"
FIXTURES = [
    *("vim_v2_midcls_div2", "vim_v2_midcls_div2_stride", "vim_v2_midcls_nodiv", "vim_v2_nocls_meanpool"),
    *("vim_v2_lowvar", "vim_mixer_v1", "vim_mixer_v2"),
]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    """The stored loss of whole models has a part of what the head reads, too."""
    stored = Golden.read(golden, name, dtype)
    stored.check_all(None if "mixer" in name else lambda m, x: {"features": m(*x, return_features=True)[0]})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(("tiny", 7_148_008), ("small", 25_796_584), ("base", 97_598_440)),
        *(("tiny_stride8", 7_250_344), ("small_stride8", 26_001_256)),
    ],
)
def test_published_sizes(size, expected):
    with torch.device("meta"):
        model = models.build(Spec(f"vim_{size}"))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("d_model", "expected"), [(192, 282_048), (384, 1_043_328), (768, 4_003_584)])
def test_the_blocks_sizes(d_model, expected):
    with torch.device("meta"):
        block = Vim(d_model=d_model, depth=1).layers[0]
    assert sum(p.numel() for p in block.parameters()) == expected


SIZES: dict[str, Any] = {"d_model": 12, "depth": 2, "d_state": 3, "patch_size": 8, "img_size": (24, 32), "n_classes": 4}
CONFIG: dict[str, Any] = {
    **{"embed_dim": 12, "depth": 2, "d_state": 3, "patch_size": 8, "stride": 8, "img_size": (24, 32)},
    **{"num_classes": 4, "final_pool_type": "mean"},
}


def small(**changes: Any) -> Vim:
    model = Vim(**{**SIZES, **changes}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def official_state(model: Vim) -> dict[str, Tensor]:
    theirs = {ours: name for name, ours in BACK.items()}
    state = {}
    for key, value in model.state_dict().items():
        before, back, name = key.partition(".back.")
        if back:
            first, dot, rest = name.partition(".")
            state[f"{before}.{theirs[first]}{dot}{rest}"] = value
        else:
            state[key.replace(".ahead.", ".")] = value
    return state


def image(height: int = 24, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def test_the_class_token_stands_in_the_middle():
    model, x = small(), image()
    assert model.cls_token is not None
    tokens = model.patch_embed(x).flatten(1, 2)
    stream = torch.cat([tokens[:, :6], model.cls_token.expand(2, -1, -1), tokens[:, 6:]], 1) + model.pos_embed
    for block in model.blocks():
        assert isinstance(block, PreNorm)
        normed = stream / (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
        mixer = block.mixer
        assert isinstance(mixer, Halved)
        halves = mixer.in_proj(normed).chunk(2, -1)
        turned = [half.flip(1) for half in halves]
        y = mixer.ahead.mix(*halves)[0] + mixer.back.mix(*turned)[0].flip(1)
        stream = stream + mixer.out_proj(y / 2)
    read = stream[:, 6] / (stream[:, 6].square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm_f.weight
    assert torch.allclose(model(x), model.head(read), rtol=1e-10)


def test_every_way_to_pool_is_read():
    x = image()
    options = {
        "middle": {},
        "head": {"use_middle_cls_token": False},
        "double": {"use_double_cls_token": True},
        "mean": {"if_cls_token": False},
        "max": {"if_cls_token": False, "final_pool_type": "max"},
    }
    for pool, changes in options.items():
        model = small(pool=pool)
        state = official_state(model)
        if pool == "double":
            state["cls_token_head"] = state.pop("cls_token")
        assert torch.equal(from_official(SOURCE, {**CONFIG, **changes}, state)(x)[0], model(x)), pool
        assert [grid.shape for grid in model.features(x)] == [(2, 3, 4, 12)] * 2


@pytest.mark.parametrize("pool", ["middle", "double"])
def test_the_official_max_beside_a_class_token_is_over_the_classes(pool):
    """`final_pool_type="max"` takes the greatest along axis 1, which is that of the classes there."""
    model, x = small(pool=pool), image()
    state = official_state(model)
    if pool == "double":
        state["cls_token_head"] = state.pop("cls_token")
    changes = {"final_pool_type": "max", "use_double_cls_token": pool == "double"}
    official = from_official(SOURCE, {**CONFIG, **changes}, state)
    assert torch.equal(official(x)[0], model(x).max(1)[0])
    assert torch.equal(official(x, return_features=True)[0], model.embed(x))


@pytest.mark.parametrize("pool", ["middle", "max"])
def test_no_classes(pool):
    """With 0 classes the official model has no head."""
    model, x = small(pool=pool), image()
    state = {key: value for key, value in official_state(model).items() if not key.startswith("head.")}
    changes = {
        "num_classes": 0,
        "if_cls_token": pool == "middle",
        "final_pool_type": "max" if pool == "max" else "none",
    }
    (y,) = from_official(SOURCE, {**CONFIG, **changes}, state)(x)
    assert torch.equal(y, model.embed(x) if pool == "middle" else model.embed(x).max(1)[0])


def test_scores_of_the_greatest_token():
    model, x = small(pool="max"), image()
    assert torch.allclose(model(x), model.head(model.features(x)[-1].flatten(1, 2)).max(1)[0])


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"if_divide_out": False}, Bidirectional),
        ({}, Halved),
        ({"if_bimamba": True}, SharedBidirectional),
        ({"bimamba_type": "none"}, S6),
    ],
)
def test_every_mixer_norm_and_eps_is_read(changes, kind):
    model = small()
    norms = {f"layers.{i}.norm": None for i in range(2)} | {"norm_f": None}
    for block in model.layers:
        assert isinstance(block, PreNorm)
        block.mixer = kind(12, 3).double()
    state = official_state(model) | {f"{norm}.bias": torch.randn(12).double() for norm in norms}
    official = from_official(SOURCE, {**CONFIG, **changes, "rms_norm": False, "norm_epsilon": 1e-3}, state)
    assert isinstance(official.model, Vim)
    for block in official.model.layers:
        assert isinstance(block, PreNorm) and type(block.mixer) is kind
        assert (block.norm.kind, block.norm.eps) == ("layer", 1e-3)
    assert official(image())[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"if_rope": True}, "option 'if_rope' is True"),
        ({"if_bidirectional": True}, "option 'if_bidirectional' is True"),
        ({"ssm_cfg": {"conv": 3}}, "option 'ssm_cfg' has 'conv'"),
        ({"ssm_cfg": {"d_state": 3}}, "option 'ssm_cfg' has 'd_state', which is an option of its own"),
        ({"flip_img_sequences_ratio": 0.5}, "option 'flip_img_sequences_ratio' is 0.5"),
        ({"if_cls_token": False, "final_pool_type": "none"}, "option 'final_pool_type' is 'none'"),
        ({"final_pool_type": "all"}, "option 'final_pool_type' is 'all'"),
        ({"init_layer_scale": 1e-5}, "option 'init_layer_scale'"),
        ({"if_divde_out": True}, "no supported option 'if_divde_out'.*Did you mean 'if_divide_out'"),
        ({"img_size": 4}, "img_size=4 is smaller than patch_size=8"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_official(SOURCE, {**CONFIG, **changes}, official_state(small()))


def test_the_mixers_own_options_and_no_positions_are_read():
    model, x = small(), image()
    for block in model.layers:
        assert isinstance(block, PreNorm)
        block.mixer = Halved(12, 3, d_conv=3, expand=1, dt_rank=2, conv_bias=False, bias=True).double()
    options = {"d_conv": 3, "expand": 1, "dt_rank": 2, "conv_bias": False, "bias": True, "dt_min": 0.01}
    state = official_state(model)
    assert torch.equal(from_official(SOURCE, {**CONFIG, "ssm_cfg": options}, state)(x)[0], model(x))
    with torch.no_grad():
        model.pos_embed.zero_()
    del state["pos_embed"]
    got = from_official(SOURCE, {**CONFIG, "ssm_cfg": options, "if_abs_pos_embed": False}, state)
    assert torch.equal(got(x)[0], model(x)) and without_decay(got.model)


def test_the_mixers_bias_is_not_halved():
    halved, x = Halved(6, 3, bias=True), torch.randn(1, 5, 6)
    plain = Bidirectional(6, 3, bias=True)
    plain.load_state_dict(halved.state_dict())
    with torch.no_grad():
        plain.out_proj.weight.div_(2)
    assert torch.allclose(halved(x), plain(x), atol=1e-6)


def test_positions_of_another_size_keep_the_class_tokens_own():
    model = small()
    with torch.no_grad():
        # A plane over the grid stays one where it grows; the class token's position is far from it.
        rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
        plane = (rows + 10 * columns).double().flatten()[:, None].expand(-1, 12)
        model.pos_embed.copy_(torch.cat([plane[:6], torch.full((1, 12), 1e6).double(), plane[6:]])[None])
        model.patch_embed.proj.weight.zero_()
        assert model.patch_embed.proj.bias is not None and model.cls_token is not None
        model.patch_embed.proj.bias.zero_()
        model.cls_token.zero_()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(image(48, 64))
    (tokens,) = seen
    assert tokens.shape[1] == 6 * 8 + 1 and (tokens[:, 24] == 1e6).all()
    grid = torch.cat([tokens[0, :24, 0], tokens[0, 25:, 0]]).unflatten(0, (6, 8))
    assert grid.max() < 40
    # Far from the rim the steps of a grid of twice the size are half as high; bicubic's are only nearly so.
    assert torch.allclose(grid[:, 3:5].diff(dim=1), torch.full((6, 1), 5.0).double(), atol=0.1)
    assert torch.allclose(grid[2:4].diff(dim=0), torch.full((1, 8), 0.5).double(), atol=0.1)


def test_a_turned_sequence_exchanges_the_directions():
    """With the class token in the middle of an even number of tokens, and positions turned with them."""
    model, x = small(), image()
    other = small()
    state = model.state_dict()
    state["pos_embed"] = state["pos_embed"].flip(1)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flip(2, 3)
    for key in list(state):
        if ".ahead." in key:
            back = key.replace(".ahead.", ".back.")
            state[key], state[back] = state[back], state[key]
    other.load_state_dict(state)
    assert torch.allclose(other(x.flip(2, 3)), model(x), rtol=1e-9)
