"""The Mamba block: causal, the same whole, in chunks and step by step, and blind to what is absent."""

import copy
import math
import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers import S6, Bidirectional, SelectiveChannel, State
from selectra.spec import Optim
from selectra.train.optim import make_optimizer

without_hook = pytest.mark.skipif(
    bool(os.environ.get("SELECTRA_CHECK_SHAPES")), reason="the shape-checking hook refuses before the mixer does"
)

D_MODEL = 6
SIZES: dict[str, Any] = {"d_model": D_MODEL, "d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 2}


@pytest.mark.parametrize(
    ("d_model", "d_state", "expected"),
    [
        *((192, 16, 251_520), (768, 16, 3_770_880), (64, 64, 51_072), (128, 64, 153_344)),
        *((320, 64, 767_360), (448, 64, 1_432_704), (512, 64, 1_842_176)),
    ],
)
def test_the_official_blocks_sizes(d_model, d_state, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in S6(d_model, d_state).parameters()) == expected


def block(**changes) -> S6:
    """A small block whose every parameter is away from its initial value."""
    mixer = S6(**{**SIZES, **changes}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def inputs(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, D_MODEL, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance).all())


def by_hand(mixer: S6, x: Tensor) -> Tensor:
    """The block written out from the paper, position by position."""
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    before = F.pad(u, (0, 0, mixer.d_conv - 1, 0))
    state = x.new_zeros(len(x), mixer.d_inner, mixer.d_state)
    outputs = []
    for t in range(x.shape[1]):
        window = before[:, t : t + mixer.d_conv].transpose(1, 2)
        assert mixer.conv1d.bias is not None
        u_t = F.silu((window * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
        dt, B, C = mixer.x_proj(u_t).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        delta = F.softplus(mixer.dt_proj(dt))[..., None]
        state = torch.exp(-delta * mixer.A_log.exp()) * state + delta * B[:, None] * u_t[..., None]
        y = (state * C[:, None]).sum(-1) + mixer.D * u_t
        outputs.append(mixer.out_proj(y * F.silu(z[:, t])))
    return torch.stack(outputs, 1)


def test_is_the_paper_s_block():
    mixer, x = block(), inputs()
    assert close(mixer(x), by_hand(mixer, x))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_causal(length):
    mixer, x = block(), inputs(length=9)
    changed = x.clone()
    changed[:, length:] = torch.randn_like(changed[:, length:])
    assert close(mixer(x)[:, :length], mixer(changed)[:, :length])
    assert not close(mixer(x)[:, length:], mixer(changed)[:, length:])


def test_reverse_is_flip_forward_flip():
    mixer, x = block(), inputs()
    assert close(mixer(x, reverse=True), mixer(x.flip(1)).flip(1))


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 5], [2, 0, 6, 1]])
def test_chunks_are_the_whole_with_gradients_through_the_state(cuts):
    whole, x = block(), inputs()
    chunked = copy.deepcopy(whole)
    weight = torch.randn(x.shape, dtype=x.dtype)
    x_whole, x_chunked = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = whole(x_whole)
    state, ys = chunked.init_state(len(x)), []
    for piece in x_chunked.split(cuts, dim=1):
        y_piece, state = chunked.scan(piece, state)
        ys.append(y_piece)
    assert close(torch.cat(ys, 1), y)
    (y * weight).sum().backward()
    (torch.cat(ys, 1) * weight).sum().backward()
    assert x_whole.grad is not None and x_chunked.grad is not None
    assert close(x_chunked.grad, x_whole.grad)
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert close(q.grad, p.grad), name


def test_float32_chunks_and_steps_stay_close():
    mixer, x = block().float(), inputs(length=33).float()
    y, state, ys = mixer(x), mixer.init_state(2), []
    for piece in x.split([10, 22, 1], dim=1):
        y_piece, state = mixer.scan(piece, state)
        ys.append(y_piece)
    assert close(torch.cat(ys, 1), y, 1e-5)
    stepped = mixer.init_state(2)
    steps = [mixer.step_(x[:, t : t + 1], stepped) for t in range(33)]
    assert close(torch.cat(steps, 1), y, 1e-5)
    assert all(close(a, b, 1e-5) for a, b in zip(state, stepped, strict=True))


def test_step_writes_into_the_given_tensors_without_gradient():
    mixer, x = block(), inputs()
    state = mixer.init_state(2)
    places = [tensor.data_ptr() for tensor in state]
    ys = [mixer.step_(x[:, t : t + 1], state) for t in range(9)]
    assert [tensor.data_ptr() for tensor in state] == places
    assert not any(y.requires_grad for y in ys)
    assert close(torch.cat(ys, 1), mixer(x))


def test_a_state_is_saved_forked_and_reordered(tmp_path):
    mixer, x = block(), inputs(batch=3)
    _, state = mixer.scan(x[:, :5], mixer.init_state(3))
    torch.save(tuple(state), tmp_path / "state.pt")
    loaded = State(*torch.load(tmp_path / "state.pt"))
    expected, _ = mixer.scan(x[:, 5:], state)
    assert close(mixer.scan(x[:, 5:], loaded)[0], expected)
    order = torch.tensor([2, 0, 0])
    chosen = State(*(tensor[order] for tensor in state))
    assert close(mixer.scan(x[order, 5:], chosen)[0], expected[order])


def test_the_convolution_s_state_is_the_last_inputs_zero_padded_on_the_left():
    mixer, x = block(d_conv=4), inputs(length=2)
    _, state = mixer.scan(x, mixer.init_state(2))
    u = mixer.in_proj(x).chunk(2, dim=-1)[0].transpose(1, 2)
    assert close(state.conv, F.pad(u, (2, 0)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_has_no_influence_even_if_it_is_nan(bias, side, reverse):
    mixer, x = block(bias=bias), inputs(length=5)
    padding = torch.full((2, 3, D_MODEL), math.nan, dtype=x.dtype)
    absent = torch.zeros(2, 3, dtype=torch.bool)
    parts = ((padding, x), (absent, ~absent[:, :1].expand(2, 5)))
    padded, mask = (torch.cat(p if side == "left" else p[::-1], 1) for p in parts)
    padded.requires_grad_()
    y = mixer(padded, mask=mask, reverse=reverse)
    assert close(y[mask].view(2, 5, -1), mixer(x, reverse=reverse))
    assert (y[~mask] == 0).all()
    y.sum().backward()
    assert padded.grad is not None and (padded.grad[~mask] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_an_absent_position_passes_the_recurrence_s_state_on():
    mixer, x = block(d_conv=1), inputs()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 4] = False
    kept = [t for t in range(9) if t != 4]
    y, state = mixer.scan(x, mixer.init_state(2), mask=mask)
    expected, expected_state = mixer.scan(x[:, kept], mixer.init_state(2))
    assert close(y[:, kept], expected)
    assert close(state.ssm, expected_state.ssm)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate(reverse):
    mixer, x = block(), inputs(batch=1, length=12)
    borders = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)
    y = mixer(x, cu_seqlens=borders, reverse=reverse)
    pieces = [mixer(x[:, a:b], reverse=reverse) for a, b in pairwise(borders)]
    assert close(y, torch.cat(pieces, 1))


def test_gradients_are_right():
    mixer = block(d_model=3, d_state=2, d_conv=2, expand=1, dt_rank=1)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    start = [t.add(torch.randn_like(t)).requires_grad_() for t in mixer.init_state(2)]

    def function(x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, ...]:
        y, state = mixer.scan(x, State(conv, ssm))
        return (y, *state)

    assert torch.autograd.gradcheck(function, (x, *start))


def test_initial_values_are_the_official_ones():
    mixer = S6(64, dt_min=0.01, dt_max=0.5)
    assert (mixer.d_inner, mixer.dt_rank, mixer.d_state) == (128, 4, 16)
    assert close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-5)
    assert (mixer.D == 1).all()
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.03 and 0.2 < steps.max() < 0.5001
    assert mixer.dt_proj.weight.abs().max() <= 4**-0.5
    assert (S6(64, dt_init="constant").dt_proj.weight == 0.5).all()
    assert (S6(64, dt_max=0.001, dt_init_floor=0.2).dt_proj.bias.sub(math.log(math.expm1(0.2))).abs() < 1e-5).all()


def test_copies_and_materialised_mixers_keep_their_recurrence_out_of_weight_decay():
    mixer = nn.Sequential(S6(**SIZES), Bidirectional(**SIZES))
    decayed = {"conv1d.weight", "x_proj.weight", "dt_proj.weight"}
    projections = {"in_proj.weight", "out_proj.weight"}
    expected = {f"0.{name}" for name in decayed | projections} | {f"1.{name}" for name in projections}
    expected |= {f"1.{path}.{name}" for path in ("ahead", "back") for name in decayed}
    for model in (mixer, copy.deepcopy(mixer), copy.deepcopy(mixer).to("meta").to_empty(device="cpu")):
        with_decay, without = make_optimizer(model, Optim(weight_decay=0.1)).param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert {names[id(parameter)] for parameter in with_decay["params"]} == expected
        assert with_decay["weight_decay"] == 0.1 and without["weight_decay"] == 0.0
    assert S6.no_decay == ("A_log", "D", "dt_proj.bias")


@pytest.mark.parametrize(("d_model", "rank"), [(1, 1), (16, 1), (17, 2), (768, 48)])
def test_automatic_rank(d_model, rank):
    assert S6(d_model, d_state=1).dt_rank == rank


def test_low_precision_keeps_the_recurrence_in_float32():
    mixer, x = block().float(), inputs(length=20).float()
    y = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, state = mixer.scan(x, mixer.init_state(2))
    assert low.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert close(low.float(), y, 0.05 * float(y.detach().abs().max()))
    half = copy.deepcopy(mixer).bfloat16()
    low, state = half.scan(x.bfloat16(), half.init_state(2))
    assert low.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert close(low.float(), y, 0.05 * float(y.detach().abs().max()))


@pytest.mark.parametrize("kind", [S6, Bidirectional, SelectiveChannel])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 0}, "d_model=0: needs at least 1"),
        ({"d_state": 0}, "d_state=0: needs at least 1"),
        ({"d_conv": 0}, "d_conv=0: needs at least 1"),
        ({"dt_rank": 0}, "dt_rank=0: needs at least 1"),
        ({"expand": 0.01}, "expand=0.01 gives d_inner=0 for d_model=6: needs at least 1"),
        ({"d_model": 8.0}, "d_model=8.0: needs a whole number"),
        ({"d_state": True}, "d_state=True: needs a whole number"),
        ({"dt_rank": 2.5}, "dt_rank=2.5: needs a whole number"),
        ({"dt_rank": "aut"}, "dt_rank='aut': takes 'auto' .* Did you mean 'auto'?"),
        ({"expand": math.nan}, "expand=nan: needs a finite number above 0"),
        ({"expand": math.inf}, "expand=inf: needs a finite number above 0"),
        ({"expand": "2"}, "expand='2': needs a finite number above 0"),
    ],
)
@without_hook
def test_a_size_that_cannot_be_is_named_before_anything_is_built(kind, wrong, message, monkeypatch):
    monkeypatch.setattr(nn.Linear, "__init__", lambda *_, **__: pytest.fail("a projection was built"))
    with pytest.raises(ConfigError, match=message):
        kind(**{**SIZES, **wrong})


@pytest.mark.parametrize("kind", [S6, Bidirectional, SelectiveChannel])
@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(1, 5, 6), torch.ones(1, 5), "mask is torch.float32; it must be bool"),
        (torch.zeros(2, 5, 6), torch.ones(2, 4).bool(), r"mask has shape \(2, 4\); it must be \(b, l\) = \(2, 5\)"),
        (torch.zeros(2, 5, 7), None, r"x has shape \(2, 5, 7\); it must be \(b, l, d_model\) with d_model = 6"),
        (torch.zeros(5, 6), None, r"x has shape \(5, 6\); it must be \(b, l, d_model\)"),
    ],
)
@without_hook
def test_an_input_or_a_mask_that_does_not_fit_is_named(kind, x, mask, message):
    mixer = kind(**SIZES)
    with pytest.raises(ConfigError, match=message):
        mixer(x, mask=mask)
    if kind is S6:
        with pytest.raises(ConfigError, match=message):
            mixer.scan(x, mixer.init_state(len(x)), mask=mask)


def test_borders_beside_a_mask_are_refused():
    mask, borders = torch.ones(1, 5).bool(), torch.tensor([0, 5], dtype=torch.int32)
    for kind in (S6, Bidirectional):
        with pytest.raises(ConfigError, match="mask and cu_seqlens were both given"):
            kind(**SIZES)(torch.zeros(1, 5, 6), mask=mask, cu_seqlens=borders)


def test_a_wrong_start_of_the_step_is_named():
    # The shape-checking hook, where it runs, refuses the value before the constructor does.
    with pytest.raises((ConfigError, TypeCheckError), match="'uniform'"):
        S6(8, dt_init="uniform")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="dt_min"):
        S6(8, dt_min=0.2)
