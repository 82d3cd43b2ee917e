"""What every registered image model keeps, found by itself: shapes, sizes, features, gradients, independence."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import selectra.models  # noqa: F401
from selectra.errors import ConfigError
from selectra.layers.drop import DropPath
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.optim import without_decay

NAMES = [name for name in models.names("image") if name.endswith("_smoke")]
EACH = pytest.mark.parametrize("name", NAMES)
# Models whose weights fix the number of tokens.
ONE_SIZE = {"mlp_mixer_smoke"}
FACTS: dict[str, Any] = {"n_classes": 5, "in_channels": 3, "img_size": (32, 32)}


def build(name: str, **arguments: object) -> Any:
    """A model whose parameters all matter: what starts at 0 or 1 is moved away from there."""
    facts = {key: value for key, value in FACTS.items() if key not in arguments}
    if "backbone" in models.entry(name).parameters() and "in_channels" in arguments:
        # What is inside has as many.
        facts["in_channels"] = arguments.pop("in_channels")
    model = models.build(Spec(name, **arguments), facts).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def image(batch: int = 3, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, channels, height, width)


@EACH
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (33, 47), (64, 16)])
def test_any_size_and_aspect(name, size):
    """Positions, where there are any, are those of another size."""
    if name in ONE_SIZE and size != FACTS["img_size"]:
        with pytest.raises(ConfigError, match=rf"the image is {size[0]} x {size[1]} pixels.*built for 32 x 32"):
            build(name)(image(2, 3, *size))
        return
    model = build(name)
    y = model(image(2, 3, *size))
    assert y.shape == (2, 5) and y.dtype == torch.float32 and y.isfinite().all()
    grids = model.features(image(2, 3, *size))
    assert len(grids) == len(model.feature_dims) == len(model.feature_strides)
    assert list(model.feature_strides) == sorted(model.feature_strides)
    for grid, d, stride in zip(grids, model.feature_dims, model.feature_strides, strict=True):
        assert grid.shape[0] == 2 and grid.shape[3] == d and grid.isfinite().all()
        for side, pixels in zip(grid.shape[1:3], size, strict=True):
            # Patches may overlap, leave a rest out or be padded.
            assert pixels // stride - 1 <= side <= -(-pixels // stride) + 1


@EACH
@pytest.mark.parametrize("channels", [1, 13])
def test_any_number_of_channels(name, channels):
    model = build(name, in_channels=channels)
    assert model(image(1, channels)).shape == (1, 5)
    with pytest.raises(ConfigError, match=rf"shape \(1, 3, 32, 32\).*in_channels = {channels}"):
        model(image(1, 3))


@EACH
def test_what_is_no_image_is_named(name):
    with pytest.raises(ConfigError, match="the image"):
        build(name)(torch.randn(3, 32, 32))
    with pytest.raises(ConfigError, match="the image is 0 x 8 pixels"):
        build(name)(torch.randn(1, 3, 0, 8))


# Parameters of recurrences that reach what is read as its first token, so that nothing recurs.
ONE_TOKEN = {"simba_smoke": "class_block.mamba.A_log", "videomamba_smoke": "layers.1.mixer.ahead.A_log"}


@EACH
def test_every_parameter_gets_a_gradient(name):
    model, x = build(name), image().requires_grad_()
    model(x).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    zero = [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert without == []
    assert [key for key in zero if key not in ONE_TOKEN.get(name, "")] == []
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


@EACH
def test_batch_elements_do_not_see_each_other(name):
    model, x = build(name), image()
    together = model(x)
    for i in range(len(x)):
        assert torch.allclose(model(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)


@EACH
def test_the_head_reads_the_embedding_and_has_the_last_width(name):
    model, x = build(name), image()
    assert isinstance(model.head, nn.Linear) and model.head.in_features == model.feature_dims[-1]
    assert model.embed(x).shape == (3, model.head.in_features)


@EACH
def test_weights_are_saved_and_loaded(name, tmp_path):
    model, other, x = build(name), build(name), image()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


@EACH
def test_bfloat16_autocast_stays_near(name):
    model, x = build(name), image()
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.isfinite().all()
    assert (low.float() - y).abs().max() <= 0.05 * y.abs().max()


@EACH
def test_half_precision_throughout(name):
    model, x = build(name), image()
    y, low = model(x), model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and (low.float() - y).abs().max() <= 0.1 * y.abs().max()
    low.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EACH
def test_float64_stays_float64(name):
    y = build(name).double()(image().double())
    assert y.dtype == torch.float64 and y.isfinite().all()


@pytest.mark.compile
@EACH
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    model, x = build(name), image()
    y, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    gradients, wanted = (torch.autograd.grad(output.square().sum(), parameters) for output in (y, expected))
    for got, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)


@EACH
def test_dropped_paths_are_for_training_alone(name):
    model, x = build(name, drop_path=0.5), image(8)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    # timm's own class.
    rates += [module.drop_prob for module in model.modules() if type(module).__module__ == "timm.layers.drop"]
    assert max(rate for rate in rates if rate) == pytest.approx(0.5)
    assert torch.equal(model(x), model(x))
    for module in model.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.manual_seed(0)
    first = model(x)
    assert not torch.allclose(first, model(x))
    with pytest.raises(ConfigError, match=r"drop_path=1"):
        build(name, drop_path=1.0)


@EACH
def test_recurrences_and_positions_do_not_decay(name):
    model = build(name)
    left_out = without_decay(model)
    for key, p in model.named_parameters():
        if key.rpartition(".")[2] in ("A_log", "D", "dt_bias", "pos_embed", "cls_token"):
            assert id(p) in left_out, key


@EACH
def test_blocks_are_what_repeats(name):
    blocks = build(name).blocks()
    assert blocks and all(isinstance(block, nn.Module) for block in blocks)


@EACH
def test_a_batch_may_be_empty(name):
    model, x = build(name).eval(), image(2)
    assert model(x[:0]).shape == (0, *model(x).shape[1:])
    assert [len(grid) for grid in model.features(x[:0])] == [0] * len(model.features(x))
