"""xT: what is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selectra.errors import ConfigError
from selectra.layers.positions import GridPositions, sincos_grid
from selectra.models.xt import XT, Context, ContextHead
from selectra.official import from_official, readers
from selectra.registry import models
from selectra.spec import Spec
from tests.golden import PRECISIONS, Golden

DECODER = "bair-climate-initiative/xT:LLMClassificationDecoder"
CONTEXTS = ("mamba", "hyper", "xl", "none")


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["xt_block", "xt_context_mamba", "xt_context_lowvar"])
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    Golden.read(golden, name, dtype).check_all()


# Of the context encoders and classifiers of 284 classes, by the width of the region encoder's features.
SIZES = {768: (3_241_244, 19_694_876, 15_900_956), 1024: (5_370_140, 19_891_484, 16_097_564),
         1536: (11_200_796, 20_284_700, 16_490_780)}  # fmt: skip


@pytest.mark.parametrize("d_in", SIZES)
def test_published_sizes(d_in):
    with torch.device("meta"):
        heads = [ContextHead(each, 284) for each in (Context("hyper", d_in, 768, 2), Context("mamba", d_in, 768, 4))]
    counts = [sum(p.numel() for p in head.parameters()) for head in heads]
    assert counts == list(SIZES[d_in][1:])


def test_the_size_without_context():
    with torch.device("meta"):
        model = models.build(Spec("xt", context="none", n_classes=284))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert count == SIZES[768][0]


def build(**arguments: Any) -> Any:
    torch.manual_seed(0)
    model = models.build(Spec("xt_smoke", **arguments), {"n_classes": 5, "in_channels": 3, "img_size": (32, 32)}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_context_learns_on_images_of_any_size(context):
    model, x = build(context=context, chunk=3), torch.randn(2, 3, 40, 23, requires_grad=True)
    y = model(x)
    assert y.shape == (2, 5)
    y.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert x.grad is not None and x.grad.isfinite().all()
    # The padding below and on the right is no part of the grids.
    assert [tuple(grid.shape[1:3]) for grid in model.features(x)] == [(10, 6), (5, 3)]


def test_regions_are_encoded_by_themselves_and_put_back_in_place():
    model, x = build(context="none"), torch.randn(2, 3, 32, 48)
    for whole, stride, level in zip(model.features(x), model.feature_strides, (0, 1), strict=True):
        side = 16 // stride
        for row in range(2):
            for column in range(3):
                one = x[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                own = model.backbone.features(one)[level]
                there = whole[:, side * row : side * row + side, side * column : side * column + side]
                assert torch.allclose(there, own, atol=1e-5)


@pytest.mark.parametrize("context", CONTEXTS)
def test_only_a_context_lets_regions_see_each_other(context):
    model, x = build(context=context, chunk=4), torch.randn(1, 3, 32, 32)
    other = x.clone()
    other[:, :, :16, :16] += 1
    first, second = (model.features(image)[-1] for image in (x, other))
    changed = (first - second).abs().amax((0, 3)) > 1e-7
    assert changed[:2, :2].any() and bool(changed[2:, 2:].any()) == (context != "none")


def test_memory_reaches_one_chunk_back_in_each_layer():
    context = Context("xl", 4, 128, 2, chunk=4)
    x = torch.randn(1, 1, 16, 4)
    other = x.clone()
    other[:, :, 0] += 1
    changed = [(context(each)[0][0, 0]) for each in (x, other)]
    differs = (changed[0] - changed[1]).abs().amax(1) > 1e-6
    # Two layers: the first chunk, by itself, and two chunks further.
    assert differs[:12].all() and not differs[12:].any()


def test_one_chunk_is_the_plain_attention():
    torch.manual_seed(0)
    chunked = Context("xl", 4, 128, 2, chunk=64)
    whole = Context("hyper", 4, 128, 2)
    whole.load_state_dict(chunked.state_dict())
    x = torch.randn(2, 4, 5, 4)
    for one, other in zip(chunked(x), whole(x), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_some_regions_at_once_are_the_same_and_need_less_memory():
    whole, x = build(), torch.randn(2, 3, 32, 48)
    parts = build(at_once=2)
    assert torch.allclose(parts(x), whole(x), atol=1e-5)
    for model in (whole, parts):
        model(x).square().sum().backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    held: list[int] = []
    for model in (whole, parts):
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encoded(torch.randn(1, 3, 64, 64))
        held.append(total)
    assert held[1] < 0.5 * held[0]


def test_a_share_of_the_regions_trains_the_encoder():
    model, x = build(grad_ratio=0.5), torch.randn(2, 3, 32, 48)
    whole = build()
    # In evaluation, and in the values, there is no difference.
    assert torch.equal(model(x), whole(x))
    assert torch.allclose(model.train().encoded(x)[-1], whole.train().encoded(x)[-1], atol=1e-6)
    x = x.requires_grad_()
    model.encoded(x)[0].sum().backward()
    of_regions = (x.grad != 0).unflatten(2, (2, 16)).unflatten(4, (3, 16)).any(5).any(3).any(1)
    # Six of the twelve regions.
    assert of_regions.shape == (2, 2, 3) and of_regions.sum() == 6


def test_a_decoder_stands_above_it():
    spec = Spec("upernet_smoke", backbone=Spec("xt_smoke", backbone=Spec("vim_smoke"), region=32))
    model = models.build(spec, {"n_classes": 4, "in_channels": 3, "img_size": (64, 64)})
    found, _ = model.train()(torch.randn(2, 3, 48, 64))
    assert found.shape == (2, 4, 48, 64)
    found.square().sum().backward()
    names = [name for name, _ in model.named_parameters()]
    assert not any(
        name.startswith(("backbone.context.cls_token", "backbone.norm_head", "backbone.head")) for name in names
    )
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("aux_head"))


def test_positions_are_of_columns_and_rows():
    table = sincos_grid(8, 3, 5)
    assert table.shape == (3, 5, 8) and table.dtype == torch.float32
    assert (table[:, 2, :4] == table[0, 2, :4]).all() and (table[1, :, 4:] == table[1, 0, 4:]).all()
    assert torch.allclose(table[2, 3, :2], torch.tensor([3.0, 0.03]).sin())
    assert torch.allclose(table[2, 3, 6:], torch.tensor([2.0, 0.02]).cos())
    kept = GridPositions(8)
    assert torch.equal(kept(3, 5, torch.device("cpu")), table) and torch.equal(
        kept(5, 3, torch.device("cpu")), sincos_grid(8, 5, 3)
    )
    assert not kept.state_dict() and len(kept.kept) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("context", ["mamba", "hyper", "xl"])
def test_a_cuda_graph_holds_a_forward_pass(context):
    model = models.build(Spec("xt_smoke", context=context)).cuda().eval()
    x = torch.randn(1, 3, 40, 56, device="cuda")
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        graph.replay()
    torch.testing.assert_close(found, expected)


def test_a_region_encoder_is_built_for_regions():
    model = models.build(
        Spec("xt_smoke", backbone=Spec("vim_smoke"), region=32), {"n_classes": 3, "img_size": (64, 96)}
    )
    assert model.backbone.grid == (4, 4) and model(torch.randn(1, 3, 64, 96)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": "lstm"}, "context"),
        ({"region": 17}, "region=17: needs a multiple of the region encoder's stride"),
        ({"grad_ratio": 0.0}, "grad_ratio=0.0"),
        ({"at_once": 0}, "at_once=0"),
        ({"d_model": 6}, "d_model=6: positions by sines and cosines need a multiple of 4"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(**arguments)(torch.randn(1, 3, 32, 32))


def test_a_backbone_must_be_an_image_model():
    with pytest.raises(ConfigError, match="backbone is a Linear"):
        XT(backbone=nn.Linear(2, 2))


CONFIG: dict[str, Any] = {"in_dim": 20, "num_classes": 5, "hidden_size": 24, "n_layers": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_context_patches": 64}, "option 'in_context_patches' is 64; the official code loses its memory"),
        ({"attention_method": "naive"}, "option 'attention_method' is 'naive'"),
        ({"hidden": 24}, "no supported option 'hidden'"),
    ],
)
def test_what_is_not_supported_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        from_official(DECODER, {**CONFIG, **config}, {})


def test_official_hyper_layers_are_read():
    """Their hash directions, which the state may hold, are our own."""
    config = {**CONFIG, "hidden_size": 128, "attention_method": "hyper"}
    ours = readers[DECODER](**config).model.state_dict()
    state = {key.removeprefix("context."): value for key, value in ours.items()}
    state["layers.0.attn.attn.lsh.proj_dir"] = torch.randn(1, 1, 128, 7)
    official, x = from_official(DECODER, config, state), torch.randn(2, 20, 3, 4)
    assert official(x)[0].shape == (2, 5)
    # Made in parts on a device, as large ones are.
    assert torch.equal(from_official(DECODER, config, state, device="cpu")(x)[0], official(x)[0])


def test_large_images_give_the_same_at_every_call_and_after_loading():
    """More than 4,096 tokens, where HyperAttention samples."""
    torch.manual_seed(0)
    context, grid = Context("hyper", 4, 8, 2).eval(), torch.randn(1, 65, 64, 4)
    loaded = Context("hyper", 4, 8, 2).eval()
    loaded.load_state_dict(context.state_dict())
    with torch.no_grad():
        tokens, cls = context(grid)
        for other in (context, loaded):
            for one, wanted in zip(other(grid), (tokens, cls), strict=True):
                assert torch.equal(one, wanted)
