"""One position in one call: what `scan` gives, at every size and type, and the ordinary path where it must be seen."""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers import S6, State, step_blocks_, streaming
from selectra.ops import native, selective_scan

pytestmark = pytest.mark.skipif(not native.status().available, reason="no compiled library")

SIZES: dict[str, dict[str, Any]] = {
    "odd": {"d_model": 7, "d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 2, "bias": True},
    "one": {"d_model": 1, "d_state": 1, "d_conv": 1, "expand": 1, "conv_bias": False},
    "usual": {"d_model": 40},
    "wide state": {"d_model": 24, "d_state": 37, "dt_rank": 19, "d_conv": 6},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def changed(module: nn.Module) -> Any:
    """Every parameter away from its initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def filled(mixer: S6, batch: int) -> State:
    return State(*(torch.randn_like(tensor) for tensor in mixer.init_state(batch)))


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-3)).item()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call that goes to the kernel."""
    found: list[int] = []
    call = streaming.StepPlan.call

    def counting(self: Any, words: bytes) -> None:
        found.append(1)
        call(self, words)

    monkeypatch.setattr(streaming.StepPlan, "call", counting)
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_is_scan_of_length_one(size, dtype, batch, threads, calls):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    mixer = changed(S6(**SIZES[size])).to(dtype)
    exact = copy.deepcopy(mixer).double()
    state = filled(mixer, batch)
    truth = State(*(tensor.double() for tensor in state))
    for _ in range(3):
        x = torch.randn(batch, 1, mixer.d_model, dtype=dtype)
        with torch.no_grad(), selective_scan.using("reference"):
            want, truth = exact.scan(x.double(), truth)
        y = mixer.step_(x, state)
        assert y.shape == x.shape and y.dtype == dtype
        for got, true in zip((y, *state), (want, *truth), strict=True):
            assert error(got, true) <= TOLERANCE[dtype]
    assert len(calls) == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_and_stream_are_joined(dtype, in_fp32, calls):
    block = changed(PreNorm(AddNorm(40, residual_in_fp32=in_fp32), S6(40))).to(dtype)
    exact = copy.deepcopy(block).double()
    state = filled(block.mixer, 3)
    truth = State(*(tensor.double() for tensor in state))
    residual, stream = None, None
    for _ in range(3):
        x = torch.randn(3, 1, 40).to(dtype)
        with torch.no_grad():
            want, stream = exact.norm(x.double(), stream)
            want, truth = exact.mixer.scan(want, truth)
        y, residual = block.step_(x, residual, state)
        assert y.dtype == dtype
        assert residual.dtype == (torch.promote_types(dtype, torch.float32) if in_fp32 else dtype)
        for got, true in zip((y, residual, *state), (want, stream, *truth), strict=True):
            assert error(got, true) <= TOLERANCE.get(dtype, 3e-2)
    assert len(calls) == 3


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_of_blocks_is_one_call(dtype, stream, calls):
    blocks: Any = nn.ModuleList(changed(PreNorm(AddNorm(24), S6(24, d_state=n))).to(dtype) for n in (3, 16, 8))
    x, residual = torch.randn(2, 1, 24).to(dtype), torch.randn(2, 1, 24, dtype=torch.float64)
    residual = residual.to(torch.promote_types(dtype, torch.float32)) if stream else None
    states = [filled(block.mixer, 2) for block in blocks]
    again = [State(*(tensor.clone() for tensor in state)) for state in states]
    y, total = step_blocks_(blocks, x, residual, states)
    assert len(calls) == 1
    blocks[1].mixer.in_proj.register_forward_hook(lambda module, x, y: None)
    want, want_total = step_blocks_(blocks, x, residual, again)
    assert len(calls) == 3 and y.dtype == want.dtype and total.dtype == want_total.dtype
    tolerance = 10 * TOLERANCE.get(dtype, 3e-3)
    for got, true in ((y, want), (total, want_total), *zip(chain(*states), chain(*again), strict=True)):
        assert error(got, true) <= tolerance


def test_bfloat16_is_closer_to_float64_than_the_parts_one_by_one(calls):
    mixer = changed(S6(64)).bfloat16()
    exact, state = copy.deepcopy(mixer).double(), filled(mixer, 4)
    x = torch.randn(4, 1, 64).bfloat16()
    with torch.no_grad():
        parts, _ = mixer.scan(x, state)
        want, _ = exact.scan(x.double(), State(*(tensor.double() for tensor in state)))
    y = mixer.step_(x, state)
    assert calls and state.conv.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert error(y, want) <= error(parts, want) + 1e-6
    assert error(y, want) < 1e-2


def test_weights_may_change_between_steps(calls):
    mixer, x = changed(S6(24)), torch.randn(2, 1, 24)
    for change in (
        lambda: mixer.A_log.data.add_(0.5),
        lambda: setattr(mixer.in_proj.weight, "data", torch.randn_like(mixer.in_proj.weight)),
        lambda: setattr(mixer, "out_proj", nn.Linear(48, 24)),
        mixer.double,
        mixer.bfloat16,
        mixer.float,
    ):
        change()
        x = x.to(mixer.in_proj.weight.dtype)
        state = filled(mixer, 2)
        with torch.no_grad():
            want, after = mixer.scan(x, state)
        y = mixer.step_(x, state)
        tolerance = 3e-2 if x.dtype == torch.bfloat16 else 1e-5
        assert all(error(got, true) <= tolerance for got, true in zip((y, *state), (want, *after), strict=True))
    assert len(calls) == 6


class Adapter(nn.Module):
    """A low-rank addition, as LoRA makes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.addition = base, nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.addition(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Halved(S6):
    def scan(self, x: Tensor, state: State, **options: Any) -> Any:
        y, state = super().scan(x, state, **options)
        return y / 2, state


def doubled(module: nn.Module, x: Any, y: Any) -> Any:
    return 2 * y


UNUSUAL: dict[str, Callable[[S6], Any]] = {
    "hook": lambda mixer: mixer.out_proj.register_forward_hook(doubled),
    "hook before": lambda mixer: mixer.in_proj.register_forward_pre_hook(lambda module, x: (2 * x[0],)),
    "another forward": lambda mixer: setattr(
        mixer.out_proj, "forward", lambda x: 2 * nn.functional.linear(x, mixer.out_proj.weight)
    ),
    "adapter": lambda mixer: setattr(mixer, "in_proj", Adapter(mixer.in_proj)),
    "parametrised": lambda mixer: parametrize.register_parametrization(mixer.x_proj, "weight", Doubled()),
    "parametrised own": lambda mixer: parametrize.register_parametrization(mixer, "A_log", Doubled()),
    "transposed": lambda mixer: setattr(mixer.x_proj.weight, "data", mixer.x_proj.weight.data.t().contiguous().t()),
    "float16": lambda mixer: mixer.half(),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_must_be_seen_keeps_the_ordinary_path(name, calls):
    mixer = changed(S6(24))
    UNUSUAL[name](mixer)
    x, state = torch.randn(2, 1, 24).to(mixer.out_proj.weight.dtype), filled(mixer, 2)
    with torch.no_grad():
        want, after = mixer.scan(x, state)
    y = mixer.step_(x, state)
    assert torch.equal(y, want) and all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    assert not calls


def test_other_calls_keep_the_ordinary_path(calls):
    mixer = changed(S6(24))
    state, x = filled(mixer, 2), torch.randn(2, 1, 24)
    halved = copy.deepcopy(mixer)
    halved.__class__ = Halved
    again = State(*(tensor.clone() for tensor in state))
    assert halved.step_(x, again).shape == x.shape
    mixer.step_(torch.randn(2, 3, 24), state)
    with selective_scan.using("portable"):
        mixer.step_(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        mixer.step_(x, state)
    mixer.step_(x, State(state.conv, state.ssm.transpose(1, 2).contiguous().transpose(1, 2)))
    assert not calls
    mixer.step_(x, state)
    assert calls


def test_a_gradient_that_needs_the_state_is_refused():
    mixer, x = changed(S6(24)), torch.randn(2, 1, 24)
    state = mixer.init_state(2)
    state.ssm.requires_grad_()
    y, _ = mixer.scan(x, state)
    loss = (y * y).sum() + (state.ssm * state.ssm).sum()
    mixer.step_(x, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_inside_inference_mode():
    mixer, x = changed(S6(24)), torch.randn(2, 1, 24)
    state = filled(mixer, 2)
    with torch.no_grad():
        want, _ = mixer.scan(x, state)
    with torch.inference_mode():
        inner = State(*(tensor.clone() for tensor in state))
        assert error(mixer.step_(x, inner), want) < 1e-6
        assert error(mixer.step_(x, state), want) < 1e-6


def test_a_stepped_module_is_copied_and_saved(tmp_path):
    mixer, x = changed(S6(24)), torch.randn(2, 1, 24)
    mixer.step_(x, mixer.init_state(2))
    torch.save(mixer, tmp_path / "mixer.pt")
    for twin in (copy.deepcopy(mixer), torch.load(tmp_path / "mixer.pt", weights_only=False)):
        assert torch.equal(twin.step_(x, twin.init_state(2)), mixer.step_(x, mixer.init_state(2)))
