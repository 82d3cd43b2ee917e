"""The scan by other packages' names: values and gradients against a loop, layouts, and what is refused."""

# pyright: reportMissingImports=false

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selectra.errors import ConfigError
from tests.compat import references
from tests.compat.references import assert_same, random

pytestmark = pytest.mark.usefixtures("installed")
SHAPES = {
    "of all channels": lambda b, d, n, l: (b, n, l),
    "by groups": lambda b, d, n, l: (b, d // 2 if d % 2 == 0 else d, n, l),
    "constant": lambda b, d, n, l: (d, n),
}


def scan_inputs(b: int, d: int, n: int, l: int, of_B: str, of_C: str, gate: bool = True) -> dict[str, Any]:
    """Random arguments in float64; A negative."""
    return {
        "u": random(b, d, l, seed=1),
        "delta": random(b, d, l, seed=2),
        "A": -random(d, n, seed=3).abs() - 0.1,
        "B": random(*SHAPES[of_B](b, d, n, l), seed=4),
        "C": random(*SHAPES[of_C](b, d, n, l), seed=5),
        "D": random(d, seed=6),
        "z": random(b, d, l, seed=7) if gate else None,
        "delta_bias": random(d, seed=8),
    }


@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_ref"])
@pytest.mark.parametrize("of_B", SHAPES)
@pytest.mark.parametrize("of_C", SHAPES)
def test_scan_by_call(name: str, of_B: str, of_C: str) -> None:
    function = getattr(importlib.import_module("mamba_ssm.ops.selective_scan_interface"), name)

    def ours(**inputs: Any) -> Any:
        return function(**inputs, delta_softplus=True, return_last_state=True)

    def loop(**inputs: Any) -> Any:
        return references.scan(**inputs, delta_softplus=True)[1:]

    assert_same(ours, loop, scan_inputs(2, 6, 3, 7, of_B, of_C))


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias"])
def test_optional_arguments(left_out: str) -> None:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    inputs = {**scan_inputs(1, 3, 5, 4, "of all channels", "of all channels"), left_out: None}
    inputs["delta"] = inputs["delta"].abs()
    assert_same(selective_scan_fn, lambda **given: references.scan(**given)[1], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_those_of_the_original(dtype: torch.dtype) -> None:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    parameters = ("A", "D", "delta_bias")
    inputs = {
        name: x.to(torch.float32 if name in parameters else dtype).requires_grad_()
        for name, x in scan_inputs(2, 4, 3, 6, "of all channels", "by groups").items()
    }
    y, state = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    y.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype and x.grad.shape == x.shape for x in inputs.values())


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_complex_values_are_refused_in_words(name: str) -> None:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    inputs = scan_inputs(1, 2, 2, 3, "of all channels", "of all channels")
    inputs[name] = inputs[name].to(torch.complex128)
    with pytest.raises(ConfigError, match=f"{name} is torch.complex128; selectra.compat covers real"):
        selective_scan_fn(**inputs)


def module_call(name: str, inputs: dict[str, Any], softplus: bool, **also: Any) -> Any:
    """A pair (fwd, bwd) of a compiled module's stand-in, with the arguments that it takes."""
    module = importlib.import_module(name)
    first = [inputs[key] for key in ("u", "delta", "A", "B", "C", "D")]
    if name == "selective_scan_cuda":
        first.append(inputs["z"])
    first.append(inputs["delta_bias"])
    rest = {"selective_scan_cuda": (), "selective_scan_cuda_oflex": (1, also.get("out_float", True))}.get(name, (1,))
    made = module.fwd(*first, softplus, *rest)

    def backward(dout: Tensor, x: Tensor) -> Any:
        if name == "selective_scan_cuda":
            dz = also.get("dz")
            return module.bwd(*first, dout, x, made[0], dz, softplus, also.get("recompute", False))
        return module.bwd(*first, dout, x, softplus, 1)

    return made, backward


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    "name", ["selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_nrow", "selective_scan_cuda_oflex"]
)
def test_compiled_modules_by_call(name: str, softplus: bool, kept: bool) -> None:
    gate = name == "selective_scan_cuda"
    # B constant in time and C of all channels where it is the one, both by groups where it is the other.
    shapes = ("constant", "of all channels") if kept else ("by groups", "by groups")
    inputs = scan_inputs(2, 4, 3, 9, *shapes, gate)
    if not softplus:
        inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs(), inputs["delta_bias"].abs()
    place = torch.empty_like(inputs["u"])
    made, backward = module_call(name, inputs, softplus, dz=place if kept and gate else None, recompute=gate)
    leaves: Any = {key: None if x is None else x.clone().requires_grad_() for key, x in inputs.items()}
    open_, gated, state = references.scan(**leaves, delta_softplus=softplus)
    torch.testing.assert_close(made[0], open_.detach())
    assert made[1].shape == (2, 4, 1, 6)
    torch.testing.assert_close(made[1][:, :, -1, 1::2], state.detach())
    dout = random(2, 4, 9, seed=9)
    # Another tensor with the same numbers has lost what travels with the first.
    grads = backward(dout, made[1] if kept else made[1].clone())
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", *(("z",) if gate else ()))
    want = torch.autograd.grad((gated * dout).sum(), [leaves[key] for key in order])
    for key, got, expected in zip(order, grads, want, strict=False):
        torch.testing.assert_close(got, expected, msg=lambda text, key=key: f"{key}: {text}")
    if gate:
        torch.testing.assert_close(made[2], gated.detach())
        torch.testing.assert_close(grads[8], gated.detach())
        assert (grads[7] is place) == kept


def test_absent_parameters_have_no_gradient() -> None:
    import selective_scan_cuda

    inputs = scan_inputs(1, 2, 2, 3, "constant", "constant", gate=False)
    first = [inputs[key] for key in ("u", "delta", "A", "B", "C")]
    out, x = selective_scan_cuda.fwd(*first, None, None, None, True)
    grads = selective_scan_cuda.bwd(*first, None, None, None, torch.ones_like(out), x, None, None, True, False)
    assert len(grads) == 7 and grads[5] is None and grads[6] is None
    assert grads[3].shape == inputs["B"].shape


def test_one_state_without_its_axis() -> None:
    import selective_scan_cuda_ndstate as module

    inputs = scan_inputs(2, 4, 1, 5, "by groups", "by groups", gate=False)
    A, B, C = inputs["A"][:, 0], inputs["B"][:, :, 0], inputs["C"][:, :, 0]
    first = (inputs["u"], inputs["delta"], A, B, C, inputs["D"], inputs["delta_bias"])
    out, x = module.fwd(*first, True, 1)
    leaves = {key: None if t is None else t.clone().requires_grad_() for key, t in inputs.items()}
    want = references.scan(**leaves, delta_softplus=True)[0]  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(out, want.detach())
    grads = module.bwd(*first, torch.ones_like(out), x, True, 1)
    want.sum().backward()
    for got, key in zip(grads, ("u", "delta", "A", "B", "C", "D", "delta_bias"), strict=True):
        leaf = leaves[key]
        assert leaf is not None and leaf.grad is not None
        torch.testing.assert_close(got, leaf.grad.reshape(got.shape))
    assert grads[2].shape == A.shape and grads[3].shape == B.shape


def test_oflex_types_and_shared_steps() -> None:
    import selective_scan_cuda_oflex as module

    inputs = scan_inputs(2, 6, 2, 5, "by groups", "by groups", gate=False)
    half = {key: None if x is None else x.to(torch.bfloat16) for key, x in inputs.items()}
    first = [half["u"], half["delta"], inputs["A"].float(), half["B"], half["C"], None, None]
    assert module.fwd(*first, True, 1, True)[0].dtype == torch.float32
    assert module.fwd(*first, True, 1, False)[0].dtype == torch.bfloat16
    # One step for three channels.
    delta, bias = inputs["delta"][:, ::3], inputs["delta_bias"][::3]
    shared = [inputs["u"], delta, inputs["A"], inputs["B"], inputs["C"], inputs["D"], bias]
    out, x = module.fwd(*shared, True, 1, True)
    leaf, bias_leaf = delta.clone().requires_grad_(), bias.clone().requires_grad_()
    wide = {**inputs, "delta": leaf.repeat_interleave(3, 1), "delta_bias": bias_leaf.repeat_interleave(3)}
    want = references.scan(**wide, delta_softplus=True)[0]
    torch.testing.assert_close(out, want.detach())
    want.sum().backward()
    grads = module.bwd(*shared, torch.ones_like(out), x, True, 1)
    torch.testing.assert_close(grads[1], leaf.grad)
    torch.testing.assert_close(grads[6], bias_leaf.grad)


class Made(TorchDispatchMode):
    """Notes every operator that makes a tensor of a given number of entries out of others of that number."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.names = entries, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name()
        copies = ("aten::clone", "aten::copy_", "aten::contiguous", "aten::_to_copy", "aten::_reshape_copy")
        if name in copies and isinstance(found, Tensor) and found.numel() >= self.entries:
            self.names.append(name)
        return found


def test_no_copy_between_layouts() -> None:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    inputs = {
        name: x.float().requires_grad_()
        for name, x in scan_inputs(2, 16, 3, 32, "of all channels", "of all channels").items()
    }
    with Made(inputs["u"].numel()) as mode:
        y = selective_scan_fn(**inputs, delta_softplus=True)
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    assert mode.names == []
    # The mode sees copies: those of a caller that asks for them.
    with Made(inputs["u"].numel()) as mode:
        selective_scan_fn(inputs["u"].clone(), *[inputs[name] for name in ("delta", "A", "B", "C")])
    assert mode.names == ["aten::clone"]


def test_no_copy_in_the_kernels_of_forks() -> None:
    import selective_scan_cuda_oflex as module

    inputs = {
        n: x.float() for n, x in scan_inputs(2, 16, 3, 32, "by groups", "by groups", gate=False).items() if n != "z"
    }
    first = [inputs[key] for key in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    with Made(inputs["u"].numel()) as mode:
        out, x = module.fwd(*first, True, 1, True)
        module.bwd(*first, torch.ones_like(out), x, True, 1)
    assert mode.names == []


def test_what_the_forward_kept_survives_autograd() -> None:
    """The tensor that carries it comes back from a Function as the same object, so that nothing is made twice."""
    import selective_scan_cuda

    from selectra.compat import scan_kernels

    seen = []

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *first: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            out, x = selective_scan_cuda.fwd(*first, None, None, None, True)
            ctx.save_for_backward(*first, x)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            *first, x = ctx.saved_tensors
            seen.append(hasattr(x, scan_kernels._KEPT))
            return tuple(selective_scan_cuda.bwd(*first, None, None, None, dout, x, None, None, True, False)[:5])

    inputs = scan_inputs(1, 2, 2, 3, "of all channels", "of all channels")
    leaves = [inputs[key].clone().requires_grad_() for key in ("u", "delta", "A", "B", "C")]
    found: Any = Scan.apply(*leaves)
    found.sum().backward()
    assert seen == [True]


def test_the_reference_backend_serves_the_compiled_modules_too() -> None:
    import selective_scan_cuda

    from selectra import selective_scan

    inputs = scan_inputs(1, 2, 2, 3, "of all channels", "of all channels", gate=False)
    first = [inputs[key] for key in ("u", "delta", "A", "B", "C", "D")]

    def both() -> list[Tensor]:
        out, x = selective_scan_cuda.fwd(*first, None, inputs["delta_bias"], True)
        taken = (*first, None, inputs["delta_bias"], torch.ones_like(out), x, None, None, True, False)
        return [out, *selective_scan_cuda.bwd(*taken)]

    want = both()
    with selective_scan.using("reference"):
        got = both()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
