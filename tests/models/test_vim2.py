"""ViM2: what is its own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers import CrossPaths, SelectivePath, WeightedAverage
from selectra.models.vim2 import GridChannels, Residual, ViM2
from selectra.models.vmamba import VMamba
from selectra.registry import models
from selectra.spec import Spec

SIZES: dict[str, Any] = {
    **{"dims": (8, 12), "depths": (3, 2), "channel_dims": (16, 8), "channel_group": 4},
    **{"d_state": 4, "n_classes": 5},
}


def moved(model: Any, by: float = 0.1) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))
    return model


@pytest.mark.parametrize("averaging", [True, False])
def test_without_channel_mixers_it_is_vmamba(averaging):
    """The paper's claim, with the averaging at its start: outputs and every gradient."""
    vmamba = moved(VMamba(dims=(8, 12), depths=(3, 2), d_state=4, n_classes=5).double())
    vim2 = ViM2(**SIZES, channel_mixer="none", averaging=averaging).double()
    names = {key: key.replace(".blocks.", ".tokens.") for key in vmamba.state_dict()}
    missing, unexpected = vim2.load_state_dict(
        {names[key]: value for key, value in vmamba.state_dict().items()}, strict=False
    )
    assert unexpected == [] and all(".average." in key for key in missing) and bool(missing) == averaging
    x, weight = torch.randn(2, 3, 21, 34).double(), torch.randn(2, 5).double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(given) for model, given in zip((vmamba, vim2), inputs, strict=True)]
    assert torch.allclose(*outputs, rtol=1e-9, atol=0)
    for output in outputs:
        (output * weight).sum().backward()
    ours = dict(vim2.named_parameters()) | {"x": inputs[1]}
    for key, p in [*vmamba.named_parameters(), ("x", inputs[0])]:
        got, expected = ours[names.get(key, key)].grad, p.grad
        assert got is not None and expected is not None
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max(), key


def test_with_channel_mixers_it_is_not():
    torch.manual_seed(1)
    vim2 = moved(ViM2(**SIZES).eval())
    x = torch.randn(1, 3, 16, 16)
    y = vim2(x)
    for stage in vim2.layers:
        stage.channels = torch.nn.ModuleList(torch.nn.Identity() for _ in stage.channels)
    assert not torch.allclose(vim2(x), y, atol=1e-3)


def test_mixers_hear_the_papers_sums():
    """Sec. 3.2, written out for a stage of three layers of which the second and the last mix channels."""
    stage: Any = moved(ViM2(**SIZES).layers[0].double())
    assert isinstance(stage.average, WeightedAverage)
    assert [isinstance(channel, Residual) for channel in stage.channels] == [False, True, True]
    x = torch.randn(1, 3, 4, 8).double()
    y_token, y_channel, a = [x], [x], stage.average
    for layer in range(1, 4):
        x_token = sum(a.alpha[layer - 1][i] * y_token[i] + a.beta[layer - 1][i] * y_channel[i] for i in range(layer))
        y_token.append(x_token + stage.tokens[layer - 1].mixer(stage.tokens[layer - 1].norm(x_token)))
        x_channel = sum(a.theta[layer - 1][i] * y_token[i] for i in range(layer + 1))
        x_channel = x_channel + sum(a.gamma[layer - 1][i] * y_channel[i] for i in range(layer))
        y_channel.append(stage.channels[layer - 1](x_channel))
    assert torch.allclose(stage(x), y_channel[-1], rtol=1e-10)


@pytest.mark.parametrize("mixer", ["selective", "mlp", "none"])
def test_every_parameter_gets_a_gradient(mixer):
    model = moved(ViM2(**SIZES, channel_mixer=mixer))
    model(torch.randn(2, 3, 24, 16)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("mixer", "channels"), [("none", "selective"), ("none", "none"), ("selective", "none")])
def test_without_token_mixers_no_token_hears_of_another(mixer, channels):
    sizes = {**SIZES, "dims": (8,), "depths": (3,), "channel_dims": (16,)}
    model = moved(ViM2(**sizes, token_mixer=mixer, channel_mixer=channels)).eval()
    images = torch.randn(1, 3, 20, 12)
    others = images.clone()
    others[:, :, 4:8, 8:] += 1
    (grid,), (other,) = model.features(images), model.features(others)
    changed = (grid != other).any(-1)[0]
    assert changed.sum() == (1 if mixer == "none" else changed.numel())
    assert changed[1, 2]
    assert any(isinstance(m, CrossPaths) for m in model.modules()) == (mixer == "selective")


def test_channel_mixers_see_one_token_and_all_its_channels():
    mixer, x = moved(GridChannels(8, 16, 4, 3)), torch.randn(1, 3, 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 1, 2].square().sum(), x)
    seen = torch.zeros(3, 4, dtype=torch.bool)
    seen[1, 2] = True
    assert ((gradient[0] != 0).all(-1) == seen).all()
    u = torch.randn(1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer.mixer(u)[0, 1].square().sum(), u)
    assert (gradient != 0).all()


def kernel(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, length: int) -> Tensor:
    """The fixed map (d, l, l) of one scan whose step, B and C are constants: `C exp(A delta (t - s)) delta B`."""
    steps = torch.arange(length)[:, None] - torch.arange(length)
    powers = torch.exp(A[:, :, None, None] * delta[:, None, None, None] * steps.clamp(min=0)) * (steps >= 0)
    return torch.einsum("dnts,n,n,d->dts", powers, B, C, delta) + D[:, None, None] * torch.eye(length)


def test_static_selection_leaves_a_fixed_linear_map_over_tokens(monkeypatch):
    paths, (h, w, d, n) = moved(CrossPaths(3, 2).double()), (3, 4, 3, 2)
    delta, B, C = torch.randn(4, d).double(), torch.randn(4, n).double(), torch.randn(4, n).double()
    monkeypatch.setattr(paths, "select", lambda u: tuple(t.expand(*u.shape[:3], -1, -1) for t in (delta, B, C)))
    order = torch.arange(h * w).view(h, w)
    total = torch.zeros(d, h * w, h * w).double()
    for k, route in enumerate([order.flatten(), order.T.flatten(), order.flatten().flip(0), order.T.flatten().flip(0)]):
        step = F.softplus(delta[k] + paths.dt_bias[k])
        back = torch.argsort(route)
        total += kernel(step, -paths.A_log[k].exp(), B[k], C[k], paths.D[k], h * w)[:, back][:, :, back]
    for _ in range(2):
        u = torch.randn(2, h, w, d).double()
        activated = F.silu(paths.conv2d(u.permute(0, 3, 1, 2))).flatten(2)  # b d l
        expected = torch.einsum("dts,bds->btd", total, activated).view(2, h, w, d)
        assert torch.allclose(paths.mix(u), expected, rtol=1e-9)


class Constant(torch.nn.Module):
    """The same selection at every position."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, u: Tensor) -> Tensor:
        return self.value.expand(*u.shape[:2], -1)


def test_static_selection_leaves_a_fixed_linear_map_over_channels():
    path, (length, d, n) = moved(SelectivePath(3, 2, 4).double()), (6, 3, 2)
    dt, B, C = torch.randn(1).double(), torch.randn(n).double(), torch.randn(n).double()
    path.x_proj = Constant(torch.cat([dt, B, C]))
    step = F.softplus(path.dt_proj(dt))
    fixed = kernel(step, -path.A_log.exp(), B, C, path.D, length)
    for reverse in (False, True):
        u, z = torch.randn(2, 2, length, d).double()
        activated = path.convolve(u, reverse=reverse)[0]
        matrix = fixed.flip(1, 2) if reverse else fixed
        expected = torch.einsum("dts,bsd->btd", matrix, activated) * F.silu(z)
        assert torch.allclose(path.mix(u, z, reverse=reverse)[0], expected, rtol=1e-9)


def test_a_whole_channel_mixer_with_static_selection():
    """Of ViM2 as built: one fixed map for each direction and group, between its projections, for every token alike."""
    mixer = moved(GridChannels(8, 12, 4, 2).double())
    inner, total = mixer.mixer, torch.zeros(())
    x = torch.randn(2, 3, 5, 8).double()
    steps = mixer.in_proj(x).flatten(0, 2).unflatten(1, (3, 4))
    *inputs, z = inner.in_proj(steps).chunk(3, dim=-1)
    for path, u, reverse in zip((inner.ahead, inner.back), inputs, (False, True), strict=True):
        dt, B, C = torch.randn(1).double(), torch.randn(2).double(), torch.randn(2).double()
        path.x_proj = Constant(torch.cat([dt, B, C]))
        fixed = kernel(F.softplus(path.dt_proj(dt)), -path.A_log.exp(), B, C, path.D, 3)
        activated = path.convolve(u, reverse=reverse)[0]
        total = total + torch.einsum("dts,bsd->btd", fixed.flip(1, 2) if reverse else fixed, activated)
    expected = mixer.out_proj(inner.out_proj(total * F.silu(z)).reshape(2, 3, 5, 12))
    assert torch.allclose(mixer(x), expected, rtol=1e-9)


def test_a_whole_token_mixer_with_static_selection(monkeypatch):
    """Of ViM2 as built: the scan of an impulse at each position is the fixed map of all inputs."""
    stage: Any = moved(ViM2(**SIZES).layers[0].double())
    mixer, (h, w, d, n) = stage.tokens[0].mixer, (3, 4, 16, 4)
    constants = [torch.randn(4, size).double() for size in (d, n, n)]
    monkeypatch.setattr(mixer, "select", lambda u: tuple(t.expand(*u.shape[:3], -1, -1) for t in constants))
    scanned = []
    monkeypatch.setattr(F, "silu", lambda u: u)
    mixer.conv2d = torch.nn.Conv2d(d, d, 1, groups=d, bias=False).double()
    torch.nn.init.ones_(mixer.conv2d.weight)
    for i in range(h * w):
        impulse = torch.zeros(1, h * w, d).double()
        impulse[:, i] = 1
        scanned.append(mixer.mix(impulse.view(1, h, w, d)).flatten(1, 2)[0])
    fixed = torch.stack(scanned)  # s t d
    for _ in range(2):
        x = torch.randn(2, h, w, 8).double()
        u, z = mixer.in_proj(x).chunk(2, dim=3)
        mixed = torch.einsum("std,bsd->btd", fixed, u.flatten(1, 2)).view(2, h, w, d)
        assert torch.allclose(mixer(x), mixer.out_proj(mixer.out_norm(mixed) * z), rtol=1e-9, atol=1e-12)


# Ours, and the paper's in millions.
@pytest.mark.parametrize(
    ("size", "expected", "published"), [("tiny", 22_467_052, 20), ("small", 40_384_528, 43), ("base", 69_701_968, 74)]
)
def test_sizes(size, expected, published):
    with torch.device("meta"):
        model = models.build(Spec(f"vim2_{size}"))
    count = sum(p.numel() for p in model.parameters())
    assert count == expected
    assert abs(count / 1e6 / published - 1) < 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_group": 3}, "channel_dims has 16: needs multiples of channel_group=3"),
        ({"channel_dims": (16,)}, "needs one of each a stage"),
        ({"token_mixer": "mlp"}, "token_mixer='mlp': takes 'selective', 'none'"),
        ({"channel_mixer": "attention"}, "channel_mixer='attention': takes 'selective', 'mlp', 'none'"),
        ({"channel_every": 0}, "channel_every=0"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        ViM2(**{**SIZES, **changes})
