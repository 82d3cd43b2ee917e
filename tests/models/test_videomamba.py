"""VideoMamba: what is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from selectra.layers.norm import PreNorm
from selectra.mixers import S6, Bidirectional
from selectra.models.videomamba import VideoMamba
from selectra.official import from_official, readers
from selectra.registry import models
from selectra.spec import Spec
from tests.golden import PRECISIONS, Golden

IMAGE, VIDEO = "OpenGVLab/VideoMamba:image.VisionMamba", "OpenGVLab/VideoMamba:video.VisionMamba"
FIXTURES = ["videomamba_image", "videomamba_video", "videomamba_video_lowvar"]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    Golden.read(golden, name, dtype).check_all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(("videomamba_tiny", 7_148_008), ("videomamba_small", 25_796_584)),
        *(("videomamba_middle", 74_217_448), ("videomamba_base", 97_598_440)),
    ],
)
def test_published_sizes_for_images(size, expected):
    with torch.device("meta"):
        model = models.build(Spec(size))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("size", "expected"), [("tiny", 7_033_744), ("small", 25_568_656), ("middle", 73_875_856)])
def test_published_sizes_for_clips(size, expected):
    with torch.device("meta"):
        model = models.build(Spec(f"videomamba_clip_{size}", n_classes=400))
    assert sum(p.numel() for p in model.parameters()) == expected


SIZES: dict[str, Any] = {"d_model": 12, "depth": 2, "d_state": 3, "patch_size": 8, "img_size": (16, 24), "n_classes": 4}


def small(**changes: Any) -> VideoMamba:
    model = VideoMamba(**{**SIZES, **changes}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def clip(n_frames: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(2, 3, n_frames, height, width, dtype=torch.float64)


def test_tokens_go_frame_after_frame_behind_the_class_token():
    model, x, seen = small(n_frames=3), clip(), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    (tokens,) = seen
    assert tokens.shape == (2, 1 + 3 * 6, 12) and model.time_embed is not None
    assert torch.equal(tokens[:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1))
    weight, bias = model.patch_embed.proj.weight[:, :, 0], model.patch_embed.proj.bias
    frame = torch.nn.functional.conv2d(x[:, :, 2], weight, bias, stride=8).flatten(2).transpose(1, 2)
    expected = frame + model.pos_embed[:, 1:] + model.time_embed[:, 2:3]
    assert torch.allclose(tokens[:, 13:], expected)


def test_a_clip_of_one_frame_is_an_image():
    image, video = small(), small(n_frames=1)
    state = image.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)
    video.load_state_dict({**state, "time_embed": torch.zeros(1, 1, 12)})
    x = clip(1)
    assert torch.allclose(video(x), image(x[:, :, 0]), rtol=1e-10)


@pytest.mark.parametrize("shape", [(3, 16, 24), (5, 16, 24), (2, 40, 17), (8, 8, 8)])
def test_clips_of_any_length_and_size(shape):
    model = small(n_frames=4, tubelet=2)
    frames, height, width = shape
    x = clip(frames, height, width)
    assert model(x).shape == (2, 4)
    grid = (2, frames // 2, height // 8, width // 8, 12)
    assert [features.shape for features in model.features(x)] == [grid] * 2


def test_a_clips_model_learns_in_every_parameter():
    model = small(n_frames=3)
    model(clip()).square().sum().backward()
    # Of the last block only the class token is read, and the forward scan reaches it first.
    zero = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert zero == ["layers.1.mixer.ahead.A_log"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 24), r"the clip has shape \(2, 3, 16, 24\)"),
        ((2, 3, 1, 16, 24), "at least 2 frames"),
        ((2, 4, 4, 16, 24), "in_channels = 3"),
        ((2, 3, 4, 16, 4), "each side must be at least 8"),
    ],
)
def test_what_is_no_clip_is_named(shape, message):
    with pytest.raises(ConfigError, match=message):
        small(n_frames=4, tubelet=2)(torch.zeros(shape).double())


def test_the_start_as_shipped_has_one_step_everywhere():
    mamba, shipped = (VideoMamba(**SIZES, start=start) for start in ("mamba", "shipped"))
    for model, is_shipped in ((mamba, False), (shipped, True)):
        biases = [p for name, p in model.named_parameters() if name.endswith("dt_proj.bias")]
        assert len(biases) == 4 and all((bias == 0).all() == is_shipped for bias in biases)


CONFIG: dict[str, Any] = {"img_size": (16, 24), "patch_size": 8, "depth": 2, "embed_dim": 12, "num_classes": 4}


@pytest.mark.parametrize(("bimamba", "mixer"), [(True, Bidirectional), (False, S6)])
def test_every_mixer_norm_and_eps_is_read(bimamba, mixer):
    options = {"bimamba": bimamba, "rms_norm": False, "norm_epsilon": 1e-3, "residual_in_fp32": False}
    options["ssm_cfg"] = {"d_state": 5, "expand": 1}
    model = readers[VIDEO](**CONFIG, **options, num_frames=4, kernel_size=2).model
    assert isinstance(model, VideoMamba) and model.time_embed is not None and model.time_embed.shape[1] == 2
    for block in model.layers:
        assert isinstance(block, PreNorm) and type(block.mixer) is mixer
        assert next(p.shape for name, p in block.named_parameters() if name.endswith("A_log")) == (12, 5)
        assert (block.norm.kind, block.norm.eps, block.norm.residual_in_fp32) == ("layer", 1e-3, False)
    assert model(torch.randn(1, 3, 4, 16, 24)).shape == (1, 4)


@pytest.mark.parametrize(("source", "shape"), [(IMAGE, (1, 3, 16, 24)), (VIDEO, (1, 3, 8, 16, 24))])
def test_no_classes(source, shape):
    """With 0 classes the official model has no head."""
    model = readers[source](**{**CONFIG, "num_classes": 0}).model.eval()
    x = torch.randn(shape)
    assert isinstance(model, VideoMamba) and not any(key.startswith("head") for key in model.state_dict())
    assert torch.equal(model(x), model.embed(x))


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (IMAGE, {"num_frames": 8}, "no supported option 'num_frames'"),
        (IMAGE, {"ssm_cfg": {"dconv": 3}}, "option 'ssm_cfg' has 'dconv'.*Did you mean 'd_conv'"),
        (VIDEO, {"stride": 8}, "no supported option 'stride'"),
        (VIDEO, {"fc_drop_rate": 0.5}, "option 'fc_drop_rate' is 0.5"),
        (VIDEO, {"num_frames": 1, "kernel_size": 2}, "n_frames=0: needs at least 1"),
    ],
)
def test_what_is_not_supported_is_named(source, changes, message):
    with pytest.raises(ConfigError, match=message):
        from_official(source, {**CONFIG, **changes}, {})
