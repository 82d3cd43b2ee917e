"""The operators on a CUDA device: `pytest -m gpu`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from selectra.ops import causal_conv1d, selective_scan
from selectra.ops.dispatch import Op
from tests.ops import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
# CUDA's exp may be off by two units in the last place, and the error of a decay grows along the length.
FLOAT32_OUTPUT = 4e-6


def on_gpu(op: Op[Any, Any, Any]) -> Callable[..., Any]:
    """The operator with arguments moved to the GPU and results moved back."""

    def run(**arguments: Any) -> Any:
        moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        return tuple(out.cpu() for out in op(**moved))

    return run


@pytest.mark.parametrize("first", range(0, 200, 50))
@pytest.mark.parametrize(
    ("op", "draw"), [(selective_scan, cases.scan_case), (causal_conv1d, cases.conv_case)], ids=["scan", "conv"]
)
def test_the_chosen_backend_agrees_with_the_reference(
    op: Op[Any, Any, Any], draw: Callable[[int], cases.Case], first: int
) -> None:
    for seed in range(first, first + 50):
        case = draw(seed)
        with op.using("reference"):
            outputs, grads = cases.run(op, case, torch.float64)
        for dtype, at_most, grads_at_most in (
            (torch.float64, cases.FLOAT64, 10 * cases.FLOAT64),
            (torch.float32, FLOAT32_OUTPUT, cases.FLOAT32_GRADIENT),
        ):
            got, got_grads = cases.run(on_gpu(op), case, dtype)
            cases.assert_close(got, outputs, at_most, f"case {seed}, cuda, {dtype}")
            cases.assert_close(got_grads, grads, grads_at_most, f"case {seed}, cuda, {dtype}")


def test_the_backends_that_refuse_a_gpu_say_so() -> None:
    u = torch.zeros(1, 2, 3, device=DEVICE)
    reasons = selective_scan.explain(u, u, -torch.ones(3, 2, device=DEVICE), u[..., :2], u[..., :2])
    assert reasons["cpu"] == "tensors are on cuda, it needs cpu"
    assert reasons["portable"] == "ok"
