"""MambaVision, which only runs released weights: its layout, its sizes and its parts, written out."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError, DataError
from selectra.models.mambavision import Attention, HalfMamba, Level, MambaVision
from selectra.official import from_official, readers
from selectra.registry import models

SOURCE = "NVlabs/MambaVision:MambaVision"
WINDOWS: dict[str, Any] = {"window_size": [8, 8, 14, 7], "mlp_ratio": 4}
BIG: dict[str, Any] = {"num_heads": [4, 8, 16, 32], "in_dim": 64, "dim": 196, "layer_scale": 1e-5, **WINDOWS}
MID: dict[str, Any] = {"num_heads": [2, 4, 8, 16], "in_dim": 64, **WINDOWS}
SMALL: dict[str, Any] = {
    **{"dim": 8, "in_dim": 4, "depths": [1, 2, 3, 2], "num_heads": [1, 1, 2, 4], "window_size": [4, 4, 3, 2]},
    **{"mlp_ratio": 2, "num_classes": 5, "layer_scale": 1e-5, "layer_scale_conv": 0.1},
}


# Millions, as the repository prints them.
@pytest.mark.parametrize(
    ("config", "published"),
    [
        ({**MID, "in_dim": 32, "dim": 80, "depths": [1, 3, 8, 4]}, 31.8),
        ({**MID, "in_dim": 32, "dim": 80, "depths": [1, 3, 11, 4]}, 35.1),
        ({**MID, "dim": 96, "depths": [3, 3, 7, 5]}, 50.1),
        ({**MID, "dim": 128, "depths": [3, 3, 10, 5], "layer_scale": 1e-5}, 97.7),
        ({**BIG, "depths": [3, 3, 10, 5]}, 227.9),
        ({**BIG, "depths": [3, 3, 12, 5]}, 241.5),
    ],
)
def test_published_sizes(config, published):
    with torch.device("meta"):
        model = readers[SOURCE](**config).model
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - published) < 0.1


def small() -> MambaVision:
    model = readers[SOURCE](**SMALL).model
    assert isinstance(model, MambaVision)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def official_name(key: str) -> str:
    for ours, theirs in ((".scale1.gamma", ".gamma_1"), (".scale2.gamma", ".gamma_2"), (".scale.gamma", ".gamma")):
        key = key.replace(ours, theirs)
    return key.replace("stem.", "patch_embed.conv_down.").replace(".downsample.", ".downsample.reduction.0.")


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (33, 47)])
def test_a_state_of_the_official_layout_is_read(size):
    model, x = small(), torch.randn(2, 3, *size)
    state = {official_name(key): value for key, value in model.state_dict().items()}
    for key in (
        *("patch_embed.conv_down.4.running_var", "levels.0.blocks.0.gamma", "levels.2.downsample.reduction.0.weight"),
        *("levels.2.blocks.1.mixer.conv1d_z.weight", "levels.2.blocks.2.mixer.qkv.bias", "levels.3.blocks.1.gamma_2"),
    ):
        assert key in state
    official = from_official(SOURCE, SMALL, state)
    assert torch.equal(official(x)[0], model(x)) and model(x).shape == (2, 5)
    assert [grid.shape[3] for grid in model.features(x)] == [8, 16, 32, 64]
    del state["norm.weight"]
    with pytest.raises(DataError, match=r"lacks 'norm\.weight'"):
        from_official(SOURCE, SMALL, state)


def test_no_classes():
    """With 0 classes the official model has no head."""
    model, x = small(), torch.randn(2, 3, 64, 64)
    state = {official_name(key): value for key, value in model.state_dict().items() if not key.startswith("head.")}
    assert torch.equal(from_official(SOURCE, {**SMALL, "num_classes": 0}, state)(x)[0], model.embed(x))


def test_the_steps_bias_is_added_twice():
    mixer, x = HalfMamba(8, 3).double(), torch.randn(2, 5, 8).double()
    u, z = mixer.in_proj(x).mT.chunk(2, 1)
    u, z = F.silu(F.pad(u, (1, 1)).unfold(2, 3, 1).mul(mixer.conv1d_x.weight).sum(3)), F.silu(mixer.conv1d_z(z))
    dt, B, C = mixer.x_proj(u.mT).split([1, 3, 3], -1)
    delta = F.softplus(dt @ mixer.dt_proj.weight.T + 2 * mixer.dt_proj.bias)
    state, ys = torch.zeros(2, 4, 3).double(), []
    for t in range(5):
        state = (delta[:, t, :, None] * -mixer.A_log.exp()).exp() * state
        state = state + delta[:, t, :, None] * B[:, t, None] * u.mT[:, t, :, None]
        ys.append((state * C[:, t, None]).sum(2) + mixer.D * u.mT[:, t])
    expected = mixer.out_proj(torch.cat([torch.stack(ys, 1), z.mT], -1))
    assert torch.allclose(mixer(x), expected, rtol=1e-9)


def test_attention_is_softmax_attention():
    mixer, x = Attention(8, 2, True).double(), torch.randn(1, 5, 8).double()
    q, k, v = mixer.qkv(x).chunk(3, -1)
    heads = [((q[..., i] @ k[..., i].mT) / 2).softmax(-1) @ v[..., i] for i in (slice(0, 4), slice(4, 8))]
    assert torch.allclose(mixer(x), mixer.proj(torch.cat(heads, -1)), rtol=1e-9)


def test_windows_do_not_see_each_other():
    level, x = small().levels[2], torch.randn(1, 32, 5, 7, requires_grad=True)
    assert isinstance(level, Level) and level.window == 3
    y = level(x)
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad(y[0, :, 4, 6].square().sum(), x)
    seen = torch.zeros(5, 7, dtype=torch.bool)
    seen[3:, 6:] = True
    assert ((gradient[0] != 0).any(0) == seen).all()


def test_the_first_half_of_the_blocks_are_mambas():
    kinds = [type(m) for m in small().modules() if isinstance(m, HalfMamba | Attention)]
    assert kinds == [HalfMamba, HalfMamba, Attention, HalfMamba, Attention]


def test_it_is_not_for_training():
    assert not [name for name in models.names() if name.startswith("mambavision")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_scale": True}, "option 'qk_scale' is True"),
        ({"attn_drop_rate": 0.1}, "option 'attn_drop_rate' is 0.1"),
        ({"num_heads": [1, 1, 3, 4]}, "option 'num_heads' has 3; it must divide the width 32"),
        ({"depths": [1, 1]}, "needs up to four of each"),
        ({"window": 7}, "no supported option 'window'.*Did you mean 'window_size'"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str):
    state: dict[str, Tensor] = {}
    with pytest.raises(ConfigError, match=message):
        from_official(SOURCE, {**SMALL, **changes}, state)
