"""A two-directional mixer as one node: the numbers of the operators called one by one, on the emulated device."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.mixers import Bidirectional
from selectra.mixers.both_ways import Projections, mixed_both_ways, mixed_one_by_one_both_ways
from selectra.models.vim import Halved
from selectra.ops import causal_conv1d, cross_scan, selective_scan, whole
from selectra.ops.causal_conv1d.cuda import TYPES
from selectra.ops.cross_scan import line
from selectra.ops.selective_scan import wide as wide_scan
from selectra.ops.selective_scan.plans import GRID_PLACES
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]

D_MODEL, LENGTH = 8, 11
SIZES: dict[str, Any] = {"d_model": D_MODEL, "d_state": 4, "d_conv": 3, "expand": 2, "dt_rank": 2}


@pytest.fixture(autouse=True)
def gpu(emulated_gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """The emulated device, which takes CPU tensors of the types that a GPU takes."""

    def refuse(call: Any) -> str | None:
        return None if call[0].dtype in TYPES else f"not {call[0].dtype}"

    for op in (causal_conv1d, cross_scan):
        own: Any = dataclasses.replace(op.backends["cuda"], refuse=refuse)
        monkeypatch.setitem(op.backends, "cuda", own)
    line.plans.clear()
    return emulated_gpu


def build(kind: type[Bidirectional] = Bidirectional, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    mixer = kind(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, D_MODEL).to(dtype).requires_grad_()


def arguments(mixer: Any) -> tuple[Any, Any, Any]:
    return Projections(mixer.in_proj.weight, mixer.out_proj.weight), mixer.ahead.weights(), mixer.back.weights()


def at_once(mixer: Any, x: Tensor) -> Tensor | None:
    return mixed_both_ways(x, *arguments(mixer), mixer.mean)


def one_by_one(mixer: Any, x: Tensor) -> Tensor:
    return mixed_one_by_one_both_ways(x, *arguments(mixer), mixer.mean)


def results(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output and every gradient."""
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def truth(mixer: nn.Module, x: Tensor, **sizes: Any) -> list[Tensor]:
    """In float64, operation by operation."""
    double: Any = build(type(mixer), **sizes).double()  # pyright: ignore[reportArgumentType]
    double.load_state_dict({name: t.double() for name, t in mixer.state_dict().items()})
    leaf = x.detach().double().requires_grad_()
    y = one_by_one(double, leaf)
    return results(y, [leaf, *double.parameters()])


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine.double() - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def assert_as_close(got: list[Tensor], other: list[Tensor], want: list[Tensor]) -> None:
    """Not much farther from the truth than what the operators give in the same types."""
    for mine, theirs, true in zip(got, other, want, strict=True):
        assert mine.dtype == theirs.dtype
        errors = [float((t.double() - true).abs().max() / true.abs().max()) for t in (mine, theirs)]
        assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", [Bidirectional, Halved])
def test_agrees_with_the_operators(kind: type[Bidirectional]) -> None:
    mixer, x = build(kind), inputs()
    y = at_once(mixer, x)
    assert y is not None and y.grad_fn is not None and y.grad_fn.name() == "_BothWaysBackward"
    assert_close(results(y, [x, *mixer.parameters()]), truth(mixer, x), 2e-5)
    with torch.no_grad():
        again = at_once(mixer, x)
    assert again is not None and torch.equal(again, y)


@pytest.mark.parametrize("wide", [True, False])
def test_odd_sizes(wide: bool) -> None:
    sizes: dict[str, Any] = {"d_model": 5, "expand": 1, "d_state": 3, "dt_rank": 3, "d_conv": 4}
    mixer, x = build(Halved, **sizes), torch.randn(1, 67, 5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
        y, other = at_once(mixer, x), one_by_one(mixer, x if wide else x.bfloat16())
    assert y is not None
    leaves = [x, *mixer.parameters()]
    got, want = results(y, leaves), truth(mixer, x, **sizes)
    if wide:
        assert_close(got, want, 2e-5)
    else:
        assert_as_close(got, results(other, leaves), want)


def test_many_states() -> None:
    mixer, x = build(d_state=16), torch.randn(1, 40, D_MODEL).requires_grad_()
    y = at_once(mixer, x)
    assert y is not None
    assert_close(results(y, [x, *mixer.parameters()]), truth(mixer, x, d_state=16), 2e-5)


def test_the_length_in_chunks_and_sums_of_many_rows(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_scan, "FEWEST_STEPS_OF_CHUNK", 64)
    gpu.multiprocessors = 100
    mixer, x = build(d_state=8), torch.randn(1, 270, D_MODEL).requires_grad_()
    y = at_once(mixer, x)
    assert y is not None
    assert_close(results(y, [x, *mixer.parameters()]), truth(mixer, x, d_state=8), 2e-5)
    (kept,) = line.plans.values()
    assert all(plan.words[GRID_PLACES["n_chunks"]] > 2 for plan in (kept.forward, kept.backward))
    assert "conv_sum" in {kernel.name for kernel in gpu.kernels}


@pytest.mark.parametrize("wide", [True, False])
def test_under_autocast(wide: bool) -> None:
    mixer, x = build(Halved), inputs(torch.float32 if wide else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = at_once(mixer, x)
        other = one_by_one(mixer, x.bfloat16())
    assert y is not None and y.dtype == torch.bfloat16
    leaves = [x, *mixer.parameters()]
    assert_as_close(results(y, leaves), results(other, leaves), truth(mixer, x))


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_autocast_with_one_weight_in_its_type(name: str) -> None:
    mixer, x = build(), inputs()
    mixer.get_submodule(name).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, other = at_once(mixer, x), one_by_one(mixer, x.bfloat16())
    assert y is not None
    leaves = [x, *mixer.parameters()]
    assert_as_close(results(y, leaves), results(other, leaves), truth(mixer, x))


def test_a_model_in_bfloat16() -> None:
    mixer, x = build(Bidirectional, torch.bfloat16), inputs(torch.bfloat16)
    y = at_once(mixer, x)
    other = one_by_one(mixer, x)
    assert y is not None
    leaves = [x, *mixer.parameters()]
    assert_as_close(results(y, leaves), results(other, leaves), truth(mixer, x))


def test_without_biases_of_the_convolution() -> None:
    mixer, x = build(conv_bias=False), inputs()
    y = at_once(mixer, x)
    assert y is not None
    leaves = [x, *mixer.parameters()]
    want = results(one_by_one(mixer, x), leaves)
    assert_close(results(y, leaves), [t.double() for t in want], 2e-5)


def test_only_what_is_wanted_gets_a_gradient() -> None:
    mixer, x = build(), inputs()
    want = dict(zip(("x", *dict(mixer.named_parameters())), truth(mixer, x)[1:], strict=True))
    for parameter in mixer.parameters():
        parameter.requires_grad_(False)
    mixer.ahead.x_proj.weight.requires_grad_()
    mixer.back.dt_proj.weight.requires_grad_()
    y = at_once(mixer, x.detach())
    assert y is not None
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    found = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    assert set(found) == {"ahead.x_proj.weight", "back.dt_proj.weight"}
    assert_close([*found.values()], [want[name] for name in found], 2e-5)


def test_one_tensor_in_both_paths() -> None:
    mixer, x = build(), inputs()
    mixer.back = mixer.ahead
    leaves = [x, *mixer.parameters()]
    y = at_once(mixer, x)
    assert y is not None
    want = results(one_by_one(mixer, x), leaves)
    assert_close(results(y, leaves), [t.double() for t in want], 2e-5)


def test_its_output_can_be_written() -> None:
    mixer, x = build(), inputs()
    y = at_once(mixer, x)
    assert y is not None
    want = results(y, [x])
    again = at_once(mixer, x)
    assert again is not None
    assert torch.equal(results(again.add_(1), [x])[1], want[1])


def test_gradients_of_gradients() -> None:
    mixer, x = build(), inputs(batch=1)
    leaves = [x, *mixer.parameters()]
    y, want = at_once(mixer, x), truth(mixer, x)
    assert y is not None
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
    # Kernels have no second gradients, and say so.
    with causal_conv1d.using("reference"), selective_scan.using("reference"):
        grads = torch.autograd.grad(y, leaves, grad, create_graph=True)
        again = torch.autograd.grad([g.square().sum() for g in grads], leaves)
    assert_close([y.detach(), *(grad.detach() for grad in grads)], want, 2e-5)
    assert all(grad.isfinite().all() and grad.any() for grad in again)


def test_what_it_leaves_to_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build(), inputs()
    projections, ahead, back = arguments(mixer)
    assert mixed_both_ways(x.double(), projections, ahead, back, False) is None
    assert mixed_both_ways(x[0], projections, ahead, back, False) is None
    assert mixed_both_ways(x[:, :0], projections, ahead, back, False) is None
    assert mixed_both_ways(x.bfloat16(), projections, ahead, back, False) is None
    assert mixed_both_ways(x, projections, ahead, back._replace(D=ahead.D[:-1]), False) is None
    assert mixed_both_ways(x, projections, ahead, back._replace(conv_bias=None), False) is None
    assert mixed_both_ways(x, projections._replace(out=projections.out.t()), ahead, back, False) is None
    with cross_scan.wrapping(cross_scan.run):
        assert mixed_both_ways(x, projections, ahead, back, False) is None
    with cross_scan.using("cpu"):
        assert mixed_both_ways(x, projections, ahead, back, False) is None
    with monkeypatch.context() as patch:
        patch.setattr(whole, "splits", [object()])
        assert mixed_both_ways(x, projections, ahead, back, False) is None
    assert mixed_both_ways(x, projections, ahead, back, False) is not None


def test_plans_are_made_once(gpu: EmulatedGpu) -> None:
    mixer = build()
    for _ in range(3):
        x = inputs()
        y = at_once(mixer, x)
        assert y is not None
        y.sum().backward()
    assert len(line.plans) == 1
    names = [kernel.name for kernel in gpu.kernels]
    assert [names.count(name) for name in ("scan_forward", "scan_backward")] == [1, 1]
    y = mixed_both_ways(inputs(batch=3), *arguments(mixer), False)
    assert len(line.plans) == 2
