"""The compiled convolution's walks in registers: chunks within a sequence, at its ends, and where none is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.ops import causal_conv1d
from tests.ops.compiled import loaded, needs_library

__all__ = ["loaded"]

# Whole vectors of every build and a rest; several chunks of steps and a rest.
CHANNELS, LENGTH = 40, 97
BORDERS = (0, 3, 40, 40, 97)


def results(backend: str, arguments: dict[str, Tensor], rest: dict[str, Any]) -> list[Tensor]:
    """y, the final state and every gradient."""
    with causal_conv1d.using(backend):
        y, final = causal_conv1d(**arguments, **rest, return_final_state=True)  # pyright: ignore[reportArgumentType]
    weights = (torch.linspace(-1, 1, y.numel()).to(y).view_as(y), torch.linspace(1, -1, final.numel()).to(final))
    loss = (y * weights[0]).sum() + (final.flatten() * weights[1]).sum()
    return [y, final, *torch.autograd.grad(loss, list(arguments.values()))]


@needs_library
@pytest.mark.parametrize("build", range(3))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("width", "activation"), [(2, "silu"), (3, None), (4, "silu"), (4, None), (5, "silu")])
def test_every_chunk_agrees_with_the_reference(
    loaded: Any, build: int, packed: bool, reverse: bool, width: int, activation: str | None
) -> None:
    if build >= len(loaded.isas) or not loaded.runs[build]:
        pytest.skip("this processor or library has no such build")
    loaded.build = build
    torch.manual_seed(0)
    batch, sequences = (1, len(BORDERS) - 1) if packed else (2, 2)
    shapes = {"x": (batch, LENGTH, CHANNELS), "weight": (CHANNELS, width), "bias": (CHANNELS,)}
    shapes["initial_state"] = (sequences, CHANNELS, width)
    single = {name: torch.randn(*shape, requires_grad=True) for name, shape in shapes.items()}
    double = {name: value.detach().double().requires_grad_() for name, value in single.items()}
    rest: dict[str, Any] = {"activation": activation, "reverse": reverse}
    if packed:
        rest["cu_seqlens"] = torch.tensor(BORDERS, dtype=torch.int32)
    for got, truth in zip(results("cpu", single, rest), results("reference", double, rest), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())
