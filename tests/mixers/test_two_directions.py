"""Mixers that scan both ways: symmetric in their directions, blind to padding, and gated as their papers say."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.mixers import Bidirectional, SelectiveChannel
from selectra.ops import whole

D_MODEL = 6
SIZES: dict[str, Any] = {"d_model": D_MODEL, "d_state": 3, "d_conv": 2, "expand": 1}
BOTH = pytest.mark.parametrize("kind", [Bidirectional, SelectiveChannel])


def build(kind: type[nn.Module], **changes) -> Any:
    mixer = kind(**{**SIZES, **changes}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def inputs(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randn(batch, length, D_MODEL, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-10).all())


def swapped(mixer: Any) -> Any:
    """The same mixer with its directions exchanged."""
    other = copy.deepcopy(mixer)
    other.ahead, other.back = other.back, other.ahead
    if isinstance(mixer, SelectiveChannel):
        ahead, back, gate = mixer.in_proj.weight.chunk(3)
        other.in_proj.weight = nn.Parameter(torch.cat([back, ahead, gate]))
    return other


@BOTH
def test_reversing_the_input_exchanges_the_directions(kind):
    mixer, x = build(kind), inputs()
    assert close(mixer(x.flip(1)).flip(1), swapped(mixer)(x))
    assert not close(mixer(x.flip(1)).flip(1), mixer(x))


@BOTH
def test_every_position_reaches_every_other(kind):
    mixer, x = build(kind), inputs(batch=1).requires_grad_()
    for t in (0, 3, 6):
        (gradient,) = torch.autograd.grad(mixer(x)[0, t].sum(), x)
        assert (gradient[0].abs().sum(-1) > 0).all()


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence_even_if_it_is_nan(kind, side):
    mixer, x = build(kind), inputs()
    padding = torch.full((2, 2, D_MODEL), math.nan, dtype=x.dtype)
    absent = torch.zeros(2, 2, dtype=torch.bool)
    parts = ((padding, x), (absent, ~absent[:, :1].expand(2, 7)))
    padded, mask = (torch.cat(p if side == "left" else p[::-1], 1) for p in parts)
    y = mixer(padded, mask=mask)
    assert close(y[mask].view(2, 7, -1), mixer(x))
    assert (y[~mask] == 0).all()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_absent_positions_give_zero_with_biases_too():
    mixer = build(Bidirectional, bias=True)
    mask = torch.tensor([[True, True, False, True, False, False, True]] * 2)
    assert (mixer(inputs(), mask=mask)[~mask] == 0).all()


def test_packed_sequences_are_separate():
    mixer, x = build(Bidirectional), inputs(batch=1, length=9)
    borders = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    assert close(mixer(x, cu_seqlens=borders), torch.cat([mixer(x[:, :2]), mixer(x[:, 2:])], 1))


@BOTH
def test_gradients_are_right(kind):
    mixer = build(kind, d_model=2, d_state=2, expand=1)
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, (x,))


def test_bidirectional_is_the_sum_of_two_scans_between_shared_projections():
    mixer, x = build(Bidirectional), inputs()
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    ahead, _ = mixer.ahead.mix(u, z)
    back, _ = mixer.back.mix(u.flip(1), z.flip(1))
    assert close(mixer(x), mixer.out_proj(ahead + back.flip(1)))


@pytest.mark.parametrize("tied", [False, True])
def test_both_directions_at_once_are_the_sum_of_two_scans(tied: bool):
    mixer = build(Bidirectional, d_conv=3, expand=2)
    if tied:
        mixer.back = mixer.ahead
    leaves = [*mixer.parameters()]
    u, z = mixer.in_proj(inputs(batch=2, length=5)).chunk(2, dim=-1)
    apart = mixer.ahead.mix(u, z)[0] + mixer.back.mix(u, z, reverse=True)[0]
    at_once = mixer._mix_at_once(u, z)
    assert close(at_once, apart)
    with torch.no_grad():
        assert close(mixer._mix_at_once(u, z), apart)
    found, want = (
        torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, retain_graph=True, materialize_grads=True)
        for y in (at_once, apart)
    )
    assert all(close(a, b) for a, b in zip(found, want, strict=True))


def test_adapted_projections_are_not_mixed_at_once():
    mixer = build(Bidirectional)
    assert mixer._is_plain()
    handle = mixer.back.x_proj.register_forward_hook(lambda *_: None)
    assert not mixer._is_plain()
    handle.remove()
    mixer.ahead.x_proj = nn.Sequential(mixer.ahead.x_proj)
    assert not mixer._is_plain()


def test_parts_of_a_split_sequence_are_not_mixed_at_once(monkeypatch):
    mixer = build(Bidirectional)
    monkeypatch.setattr(whole, "splits", [object()])
    assert not mixer._is_plain()


def test_the_selective_channel_mixer_has_two_scans_and_one_gate_that_is_not_flipped():
    mixer, x = build(SelectiveChannel), inputs()
    w_ahead, w_back, w_gate = mixer.in_proj.weight.chunk(3)
    gate = torch.nn.functional.silu(x @ w_gate.T)
    ahead, _ = mixer.ahead.mix(x @ w_ahead.T)
    back, _ = mixer.back.mix(x.flip(1) @ w_back.T)
    assert close(mixer(x), mixer.out_proj(ahead * gate + back.flip(1) * gate))


def test_each_direction_has_its_own_scan_parameters():
    for kind in (Bidirectional, SelectiveChannel):
        names = {name for name, _ in kind(**SIZES).named_parameters()}
        own = {name.removeprefix("ahead.") for name in names if name.startswith("ahead.")}
        assert own == {name.removeprefix("back.") for name in names if name.startswith("back.")}
        assert {"A_log", "D", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"} <= own
