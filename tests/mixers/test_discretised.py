"""Other discretisations of the Mamba block: equal to their equations, and to each other where they must be."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.mixers import S6, Discretisation, DiscretisedS6, make_s6
from selectra.mixers.discretised import recurrence
from selectra.models import Simba, SimbaSeries
from selectra.spec import Optim
from selectra.train.optim import make_optimizer, without_decay

KINDS = get_args(Discretisation)
SIZES: dict[str, Any] = {"d_model": 6, "d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 2}


def block(kind: str, **changes: Any) -> DiscretisedS6:
    """A small block whose every parameter is away from its initial value."""
    torch.manual_seed(0)
    sizes = SIZES | changes
    mixer = DiscretisedS6(kind, sizes.pop("d_model"), **sizes).double()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def inputs(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, SIZES["d_model"], dtype=torch.float64)


def by_hand(mixer: DiscretisedS6, x: Tensor) -> Tensor:
    """Position by position, each channel and state as its equation has it."""
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    before, state = F.pad(u, (0, 0, mixer.d_conv - 1, 0)), x.new_zeros(len(x), mixer.d_inner, mixer.d_state)
    outputs = []
    for t in range(x.shape[1]):
        window = before[:, t : t + mixer.d_conv].transpose(1, 2)
        assert mixer.conv1d.bias is not None
        u_t = F.silu((window * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
        dt, B, C = mixer.x_proj(u_t).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        s = mixer.dt_proj(dt)[..., None]
        delta, drive = torch.log1p(torch.exp(s)), B[:, None] * u_t[..., None]
        if mixer.discretisation == "none":
            gate = 1 / (1 + torch.exp(-s))
            state = (1 - gate) * state + gate * drive
        else:
            A = -mixer.A_log.exp()
            if mixer.discretisation == "euler":
                state = state + delta * (A * state + drive)
            elif mixer.discretisation == "zoh":
                state = torch.exp(delta * A) * state + (torch.exp(delta * A) - 1) / A * drive
            else:
                state = torch.exp(delta * A) * state + delta * drive
        y = (state * C[:, None]).sum(-1) + mixer.D * u_t
        outputs.append(mixer.out_proj(y * F.silu(z[:, t])))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_equations(kind: str) -> None:
    mixer, x = block(kind), inputs(length=7).requires_grad_()
    torch.testing.assert_close(mixer(x), by_hand(mixer, x), rtol=1e-10, atol=1e-12)
    leaves = [x, *mixer.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (mixer(x), by_hand(mixer, x)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_mambas_own_is_s6() -> None:
    mixer, x = block("mamba"), inputs()
    plain = S6(**SIZES).double()
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-10, atol=1e-12)
    assert type(make_s6("mamba", **SIZES)) is S6


def test_a_plain_gate_is_zero_order_hold_with_a_decay_of_one() -> None:
    """Theorem 1 of Mamba's paper."""
    gate, hold, x = block("none"), block("zoh"), inputs()
    assert gate.A_log is None and "A_log" not in gate.state_dict()
    hold.load_state_dict(gate.state_dict() | {"A_log": torch.zeros_like(hold.A_log)})
    torch.testing.assert_close(gate(x), hold(x), rtol=1e-10, atol=1e-12)


def test_zero_order_hold_solves_the_differential_equation() -> None:
    """Under a constant input a few long steps end where very many short ones of Euler do."""
    A, B, u, seconds = torch.tensor(-1.7, dtype=torch.float64), 0.8, 1.3, 2.0
    mixer = block("zoh", d_state=1)
    with torch.no_grad():
        mixer.A_log.fill_((-A).log())
        mixer.dt_proj.bias.zero_()
    dt = torch.full((1, 4, mixer.d_inner), seconds / 4, dtype=torch.float64).expm1().log()
    ones = torch.ones_like(dt)
    decay, entering = mixer._discrete(dt, u * ones, B * ones[..., :1])
    h = recurrence(decay, entering, torch.zeros(1, mixer.d_inner, 1, dtype=torch.float64))[:, -1]
    exact = (1 - torch.exp(A * seconds)) * B * u / -A
    torch.testing.assert_close(h, exact.expand_as(h), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_all_meet_where_steps_are_short(kind: str) -> None:
    mixers, x = {name: block(name) for name in (kind, "mamba")}, inputs()
    for mixer in mixers.values():
        with torch.no_grad():
            mixer.dt_proj.weight.zero_()
            mixer.dt_proj.bias.fill_(-12.0)
            if mixer.A_log is not None:
                mixer.A_log.zero_()
    mixers[kind].load_state_dict(
        {name: value for name, value in mixers["mamba"].state_dict().items() if name in mixers[kind].state_dict()}
    )
    torch.testing.assert_close(mixers[kind](x), mixers["mamba"](x), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_steps_masks_and_packing(kind: str) -> None:
    mixer, x = block(kind), inputs()
    whole, state, pieces = mixer(x), mixer.init_state(2), []
    for piece in x.split([1, 5, 3], dim=1):
        y, state = mixer.scan(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)
    stepped = mixer.init_state(2)
    steps = torch.cat([mixer.step_(x[:, t : t + 1], stepped) for t in range(9)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-10, atol=1e-12)
    present = torch.tensor([[True] * 9, [False] * 2 + [True] * 7])
    padded = x.masked_fill(~present[..., None], torch.nan)
    torch.testing.assert_close(mixer(padded, mask=present)[1, 2:], mixer(x[1:, 2:])[0], rtol=1e-10, atol=1e-12)
    assert mixer(padded, mask=present)[1, :2].abs().max() == 0
    for reverse in (False, True):
        borders = torch.tensor([0, 0, 4, 9, 9], dtype=torch.int32)
        packed = mixer(x[:1], cu_seqlens=borders, reverse=reverse)
        alone = torch.cat([mixer(x[:1, :4], reverse=reverse), mixer(x[:1, 4:], reverse=reverse)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mixer(x, reverse=True), mixer_flipped(mixer, x), rtol=1e-10, atol=1e-12)


def mixer_flipped(mixer: DiscretisedS6, x: Tensor) -> Tensor:
    return mixer(x.flip(1)).flip(1)


def test_final_states_of_packed_sequences() -> None:
    mixer, x = block("zoh"), inputs(1)
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    _, packed = mixer.mix(u, z, cu_seqlens=torch.tensor([0, 4, 4, 9], dtype=torch.int32))
    _, first = mixer.mix(u[:, :4], z[:, :4])
    _, last = mixer.mix(u[:, 4:], z[:, 4:])
    torch.testing.assert_close(packed.ssm, torch.cat([first.ssm, torch.zeros_like(first.ssm), last.ssm]))


def test_the_recurrence_passes_gradcheck() -> None:
    decay, entering = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    start = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda a, x, h, r=reverse: recurrence(a, x, h, r), (decay, entering, start))


def test_euler_grows_where_steps_are_long() -> None:
    mixer, x = block("euler"), inputs(length=60)
    with torch.no_grad():
        mixer.dt_proj.bias.fill_(3.0)
        mixer.A_log.zero_()
    assert mixer(x).abs().max() > 1e6 * block("zoh")(x).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_models_take_it(kind: Any) -> None:
    series = SimbaSeries(seq_len=32, horizon=4, n_series=2, d_model=8, depth=1, d_state=4, patch_len=8, stride=4,
                         discretisation=kind)  # fmt: skip
    assert series(torch.randn(2, 32, 2)).shape == (2, 4, 2)
    image = Simba(n_classes=3, d_stem=4, dims=(8,), depths=(1,), mlp_ratios=(2,), d_state=4, discretisation=kind)
    assert image(torch.randn(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_trained_with_weight_decay(kind: Any) -> None:
    model = make_s6(kind, 8, 4)
    left_out = without_decay(model)
    assert {name for name, p in model.named_parameters() if id(p) in left_out} == {
        *(() if kind == "none" else ("A_log",)), "D", "dt_proj.bias",
    }  # fmt: skip
    assert make_optimizer(model, Optim(weight_decay=0.1)).param_groups


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="discretisation='tustin': takes 'mamba', 'zoh', 'euler', 'none'"):
        make_s6("tustin", 6)  # pyright: ignore[reportArgumentType]
