"""The gate before every timing: a backend against the float64 reference, outputs and every gradient."""

from typing import Any

import torch
from torch import Tensor

from selectra.ops.dispatch import Op

# Errors relative to each tensor's maximum, in float32.
AT_MOST_OUTPUT, AT_MOST_GRADIENT = 1e-6, 1e-5

Arguments = dict[str, Tensor]


def scan_arguments(
    batch: int, d: int, length: int, n: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Arguments:
    """Random inputs as they stand in a Mamba block: gate, skip and step bias present, delta before softplus."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    arguments = {name: normal(batch, length, d) for name in ("u", "delta", "z")}
    arguments |= {name: normal(batch, length, n) for name in ("B", "C")}
    arguments |= {"A": -normal(d, n).exp(), "D": normal(d), "delta_bias": normal(d) - 3}
    return {name: value.to(device, dtype).requires_grad_() for name, value in arguments.items()}


def conv_arguments(batch: int, d: int, length: int, k: int, device: torch.device) -> Arguments:
    """Random inputs of the causal convolution."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (batch, length, d), "weight": (d, k), "bias": (d,)}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float32).to(device).requires_grad_()
        for name, shape in shapes.items()
    }


def errors(op: Op[Any, Any, Any], backend: str, arguments: Arguments, flags: dict[str, Any]) -> dict[str, float]:
    """Largest error of y, the final state and each gradient, relative to the maximum of the truth."""
    double = {name: value.detach().cpu().double().requires_grad_() for name, value in arguments.items()}
    with op.using("reference"):
        truth = _results(op, double, flags)
    with op.using(backend):
        got = _results(op, arguments, flags)
    return {
        name: ((got[name].detach().cpu().double() - value).abs().max() / value.abs().max().clamp_min(1e-30)).item()
        for name, value in truth.items()
    }


def _results(op: Op[Any, Any, Any], arguments: Arguments, flags: dict[str, Any]) -> dict[str, Tensor]:
    y, state = op(**arguments, **flags, return_final_state=True)
    leaves = list(arguments.values())
    grads = torch.autograd.grad(y.square().sum() + state.square().sum(), leaves)
    return {"y": y, "final state": state, **{f"d{name}": g for name, g in zip(arguments, grads, strict=True)}}


def problems(found: dict[str, float]) -> list[str]:
    """What is out of tolerance, in words; not-a-number is."""
    limits = {name: AT_MOST_OUTPUT if name in ("y", "final state") else AT_MOST_GRADIENT for name in found}
    return [
        f"{name} is off by {error:.1e} of its maximum, allowed {limits[name]:.0e}"
        for name, error in found.items()
        if not error <= limits[name]
    ]
