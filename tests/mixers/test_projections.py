"""Linear maps with gradients that add up in place: the same numbers as PyTorch's own backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selectra.mixers import S6, projections, s6
from selectra.ops import causal_conv1d, dispatch, selective_scan


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(projections, "_DEVICES", ("cpu", "cuda"))


def gradients(mixer: S6, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """The output's and all gradients."""
    x = x.detach().requires_grad_()
    y = (mixer if run is None else run)(x)
    return [y, *torch.autograd.grad(y, [x, *mixer.parameters()], torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))]


def nodes(y: Tensor) -> set[str]:
    """Names of the graph's backward functions."""
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.add(node.name())
            left += [after for after, _ in node.next_functions]
    return found


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_plain_maps(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = S6(8, d_state=3, dt_rank=2, bias=bias).double(), torch.randn(2, 7, 8, dtype=torch.float64)
    got = gradients(mixer, x)
    assert "_InnerBackward" in nodes(mixer(x))
    assert ("_HalvesBackward" in nodes(mixer(x.requires_grad_()))) != bias
    monkeypatch.setattr(projections, "_DEVICES", ())
    monkeypatch.setattr(s6, "mixed_at_once", lambda *_, **__: None)
    for mine, theirs in zip(got, gradients(mixer, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("anywhere")
def test_a_hook_or_an_adapter_is_called() -> None:
    class Adapter(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    x = torch.randn(1, 4, 8).requires_grad_()
    mixer = S6(8)
    called: list[Any] = []
    mixer.in_proj.register_forward_hook(lambda *_: called.append(1))
    mixer.x_proj.register_forward_hook(lambda *_: called.append(2))
    y = mixer(x)
    assert called == [1, 2]
    adapter = Adapter(8, 32, bias=False)
    adapter.load_state_dict(mixer.in_proj.state_dict())
    mixer.in_proj = adapter
    assert not torch.allclose(mixer(x), y)


@pytest.mark.usefixtures("anywhere")
def test_another_forward_and_hooks_of_all_modules_are_called() -> None:
    x, mixer = torch.randn(1, 4, 8).requires_grad_(), S6(8)
    y, called = mixer(x), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module)):
        mixer(x)
    assert mixer.in_proj in called and mixer.x_proj in called
    # As libraries do that move weights before a call.
    forward = mixer.in_proj.forward
    mixer.in_proj.forward = lambda input: 2 * forward(input)
    assert not torch.allclose(mixer(x), y)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    mixer, x = S6(8).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    mixer(x.requires_grad_()).square().sum().backward()
    want = [p.grad for p in mixer.parameters()]
    mixer.zero_grad()
    y: Any = checkpoint(mixer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close([p.grad for p in mixer.parameters()], want)


@pytest.mark.usefixtures("anywhere")
def test_a_backward_under_autocast_and_batches_of_gradients() -> None:
    mixer, x = S6(8), torch.randn(2, 5, 8).requires_grad_()
    y = mixer(x)
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.02 * float(want.abs().max()))
    (many,) = torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)
    torch.testing.assert_close(many, want.expand(3, -1, -1, -1))


@pytest.mark.usefixtures("anywhere")
def test_second_gradients_of_the_reference_however_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = S6(8, d_state=3, dt_rank=2).double(), torch.randn(1, 4, 8, dtype=torch.float64)

    def penalty() -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(mixer(leaf).square().sum(), mixer.dt_proj.weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    with selective_scan.using("reference"), causal_conv1d.using("reference"):
        want = penalty()
    choices = {"selective_scan": "reference", "causal_conv1d": "reference"}
    monkeypatch.setattr(dispatch._environment, "choices", choices)
    torch.testing.assert_close(penalty(), want, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("anywhere")
def test_a_recorded_program_holds_no_function_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    monkeypatch.setattr(torch._C, "_get_tracing_state", lambda: True)
    assert not {"_HalvesBackward", "_InnerBackward"} & nodes(S6(8)(torch.randn(1, 4, 8).requires_grad_()))


@pytest.mark.usefixtures("anywhere")
def test_frozen_maps_give_gradients_to_the_rest() -> None:
    mixer, x = S6(8), torch.randn(1, 4, 8).requires_grad_()
    mixer.in_proj.requires_grad_(False)
    mixer.x_proj.requires_grad_(False)
    mixer(x).sum().backward()
    assert mixer.in_proj.weight.grad is None
    assert x.grad is not None and mixer.dt_proj.weight.grad is not None


@pytest.mark.usefixtures("anywhere")
def test_under_autocast_the_gradients_have_the_parameters_types() -> None:
    mixer, x = S6(8), torch.randn(1, 4, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        wide = mixer.mix_whole(torch.randn(1, 4, 16, requires_grad=True))
    y.float().sum().backward()
    assert {"_HalvesBackward", "_InnerBackward"} <= nodes(y)
    # A wide input of the scan is not rounded.
    assert wide.dtype == torch.float32 and "_InnerBackward" not in nodes(wide)
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())


@pytest.mark.usefixtures("anywhere")
@pytest.mark.compile
def test_compiles_without_graph_breaks() -> None:
    mixer, x = S6(8, d_state=3), torch.randn(2, 5, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(mixer, x, compiled), gradients(mixer, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_any_module_may_stand_in_a_projections_place():
    mixer: Any = S6(8, d_state=4)
    plain = S6(8, d_state=4)
    plain.load_state_dict(mixer.state_dict())
    mixer.in_proj, mixer.x_proj = nn.Sequential(mixer.in_proj), nn.Sequential(mixer.x_proj)
    x = torch.randn(2, 5, 8, requires_grad=True)
    torch.testing.assert_close(mixer(x), plain(x))
