"""RSMamba: what is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from selectra.mixers import S6
from selectra.mixers.fixed import fixed_order
from selectra.models.rsmamba import PathMixer, RSMamba
from selectra.official import from_official, readers
from selectra.registry import models
from selectra.spec import Spec
from tests.golden import PRECISIONS, Golden

SOURCE = "KyanChen/RSMamba:RSMamba"
FIXTURES = ["rsmamba_shuffle_gate", "rsmamba_gate_midcls", "rsmamba_mean", "rsmamba_lowvar"]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    Golden.read(golden, name, dtype).check_all()


@pytest.mark.parametrize(("size", "expected"), [("base", 6_381_141), ("large", 16_246_549), ("huge", 33_053_141)])
def test_published_sizes(size, expected):
    with torch.device("meta"):
        model = models.build(Spec(f"rsmamba_{size}", n_classes=21))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("paths", ["forward", "reverse_mean", "reverse_gate", "shuffle_mean", "shuffle_gate"])
def test_paths_written_out(paths):
    """As the official code has it: the orders side by side in the batch, through one whole Mamba."""
    layer = PathMixer(S6(8, 4, bias=True), paths).double()
    x, order = torch.randn(2, 7, 8).double(), torch.randperm(7)
    sides = [x, x.flip(1), x[:, order]][: layer.n_paths]
    ys = list(layer.mamba(torch.cat(sides)).split(2))
    if layer.n_paths > 1:
        ys[1] = ys[1].flip(1)
    if layer.n_paths > 2:
        ys[2] = ys[2][:, torch.argsort(order)]
    if layer.gate is not None:
        gate = layer.gate(torch.cat([y.mean(1) for y in ys], -1)).softmax(-1)
        expected = sum(gate[:, i, None, None] * y for i, y in enumerate(ys))
    else:
        expected = sum(ys) / len(ys)
    assert torch.allclose(layer(x, order), torch.as_tensor(expected), rtol=1e-10, atol=1e-12)


SIZES: dict[str, Any] = {"d_model": 8, "depth": 2, "d_state": 3, "patch_size": 8, "stride": 4, "img_size": 32}


def small(**changes: Any) -> RSMamba:
    model = RSMamba(**{**SIZES, "n_classes": 4, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def test_the_shuffle_is_seeded_and_can_be_switched():
    model, x = small(), torch.randn(2, 3, 32, 32)
    y = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), y)
    model.seed = 1
    assert not torch.allclose(model(x), y, atol=1e-5)
    for mode, changes in (("random", True), ("none", False)):
        model.test_shuffle = mode
        assert torch.allclose(model(x), model(x), atol=1e-6) != changes
    model.test_shuffle, model.seed = "seeded", 0
    assert torch.equal(model(x), y)
    assert not torch.allclose(model.train()(x), model(x), atol=1e-5)
    torch.manual_seed(2)
    first = model(x)
    torch.manual_seed(2)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("length", [1, 2, 9, 784, 5000])
def test_fixed_orders_are_permutations_without_an_order(length):
    cpu = torch.device("cpu")
    orders = [fixed_order(length, seed, cpu) for seed in range(4)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(length))
    if length >= 784:
        positions = torch.arange(length).double()
        together = torch.corrcoef(torch.stack([positions, *(order.double() for order in orders)]))
        assert (together - torch.eye(5)).abs().max() < 0.15


def test_every_pixel_is_seen():
    model = small(img_size=(30, 21))
    assert model.grid == (8, 6)
    x = torch.randn(1, 3, 30, 21, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (gradient != 0).all()


@pytest.mark.parametrize("pool", ["middle", "head", "tail"])
def test_the_class_token_is_read_and_left_out_of_features(pool):
    model, x = small(pool=pool, img_size=12, stride=4), torch.randn(2, 3, 12, 12)
    place = {"middle": 4, "head": 0, "tail": 9}[pool]
    (state,), grid = model.run(x, [1])
    assert grid == (3, 3) and state.shape[1] == 10
    assert torch.allclose(model.embed(x), model.ln1(state[:, place]), atol=1e-6)
    kept = [i for i in range(10) if i != place]
    assert torch.allclose(model.features(x)[-1].flatten(1, 2), model.ln1(state[:, kept]), atol=1e-6)


CONFIG: dict[str, Any] = {
    "arch": {"embed_dims": 8, "num_layers": 2, "feedforward_channels": 12},
    "img_size": 24,
    "patch_size": 8,
    "path_type": "forward_reverse_shuffle_mean",
}


def untrained(**changes: Any) -> Any:
    return readers[SOURCE](**{**CONFIG, **changes}).eval()


def test_several_layers_and_every_kind_of_output():
    x, orders = torch.randn(2, 3, 24, 24), [torch.randperm(9), torch.randperm(9)]
    raw = untrained(out_type="raw", out_indices=(0, -1))
    state = raw.model.state_dict()
    first, last = raw(x, *orders)
    assert first.shape == last.shape == (2, 9, 8)
    grids = untrained(out_type="featmap", out_indices=(0, 1))
    grids.model.load_state_dict(state)
    assert torch.equal(grids(x, *orders)[1], last.unflatten(1, (3, 3)).permute(0, 3, 1, 2))
    mean = untrained()
    mean.model.load_state_dict(state, strict=False)
    assert torch.allclose(mean(x, *orders)[0], mean.model.backbone.ln2(last.mean(1)), atol=1e-6)
    assert mean.model.backbone.layers[0].mamba.d_inner == 12
    with pytest.raises(ConfigError, match="1 orders were given to 2 layers"):
        raw(x, orders[0])


def test_the_mixers_own_options_are_read():
    options = {"state_size": 5, "conv_kernel": 3, "time_step_rank": 2, "use_conv_bias": False, "use_bias": True}
    mamba = untrained(layer_cfgs={**options, "use_mambapy": False}).model.backbone.layers[0].mamba
    assert (mamba.d_state, mamba.d_conv, mamba.dt_rank, mamba.d_inner) == (5, 3, 2, 12)
    assert mamba.conv1d.bias is None and mamba.in_proj.bias is not None and mamba.out_proj.bias is not None


@pytest.mark.parametrize("size", [24, 20])
def test_a_classifier_reads_what_the_official_code_takes_for_the_class_token(size):
    """The middle of all tokens, which of an odd number of patches (20 pixels: 5 x 5) is the one behind the class's."""
    model, x = small(img_size=size, pool="middle"), torch.randn(2, 3, size, size)
    body = {"arch": {"embed_dims": 8, "num_layers": 2}, "img_size": size, "patch_size": 8, "patch_cfg": {"stride": 4}}
    config = {
        "backbone": {**body, "layer_cfgs": {"state_size": 3}, "cls_position": "middle", "out_type": "cls_token"},
        "head": {"num_classes": 4},
    }
    official = from_official("KyanChen/RSMamba:ImageClassifier", config, classifier_state(model))
    tokens = model.forward_features(x)
    assert tokens.shape[1] == (size // 4) ** 2 + 1
    assert torch.equal(official(x)[0], model.head(tokens[:, tokens.shape[1] // 2]))


def classifier_state(model: RSMamba) -> dict[str, Tensor]:
    """Our state under the names of the official classifier."""
    names = {"patch_embed.proj": "patch_embed.projection", ".mamba.": ".", "head.": "head.fc."}
    state = {}
    for key, value in model.state_dict().items():
        layer, gate, _ = key.partition(".gate.")
        name = f"{layer.replace('layers', 'gate_layers')}.0.weight" if gate else key
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name if name.startswith("head") else f"backbone.{name}"] = value
    return state


def test_a_whole_classifier_is_read():
    model = small(img_size=24)
    state = classifier_state(model)
    body = {"arch": {"embed_dims": 8, "num_layers": 2}, "img_size": 24, "patch_size": 8, "patch_cfg": {"stride": 4}}
    config = {
        "backbone": {"type": "RSMamba", **body, "layer_cfgs": {"state_size": 3}, "init_cfg": [{"type": "Kaiming"}]},
        "head": {"type": "LinearClsHead", "num_classes": 4, "in_channels": 8},
    }
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(from_official("KyanChen/RSMamba:ImageClassifier", config, state)(x)[0], model(x))
    with pytest.raises(ConfigError, match="out_type"):
        from_official("KyanChen/RSMamba:ImageClassifier", config | {"backbone": body | {"out_type": "raw"}}, state)
    with pytest.raises(ConfigError, match="option 'head' has 'n_classes'"):
        from_official("KyanChen/RSMamba:ImageClassifier", config | {"head": {"n_classes": 4}}, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path_type": "reverse"}, "option 'path_type' is 'reverse'; it takes 'forward'"),
        ({"arch": "tiny"}, "option 'arch' is 'tiny'; it takes 's', 'small'"),
        ({"arch": {"embed_dims": 8, "layers": 3}}, "option 'arch' has 'layers'"),
        ({"cls_position": "head_tail"}, "option 'cls_position' is 'head_tail'"),
        ({"pe_type": "sine"}, "option 'pe_type' is 'sine'"),
        ({"patch_cfg": {"padding": 1}}, "option 'patch_cfg' has 'padding'; it takes stride"),
        ({"layer_cfgs": {"hidden_act": 1}}, "option 'layer_cfgs' has 'hidden_act'"),
        ({"norm_cfg": {"type": "BN"}}, "option 'norm_cfg' has type 'BN'"),
        ({"out_indices": [3]}, r"option 'out_indices' is \[3\]"),
        ({"out_type": "cls_token"}, "there is no class token"),
        ({"drop_rate": 0.1}, "option 'drop_rate' is 0.1"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_official(SOURCE, {**CONFIG, **changes}, {})
