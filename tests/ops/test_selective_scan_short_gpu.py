"""The scan's kernels for many short sequences of few channels on a device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.ops import selective_scan
from selectra.ops.selective_scan import cuda, short
from tests.ops.test_selective_scan_cuda import ACTIVATIONS, drawn, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(**arguments: Any) -> Any:
    """The operator on the device, from and to the CPU."""
    moved: dict[str, Any] = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with selective_scan.using("cuda"):
        return tuple(x.cpu() for x in selective_scan(**moved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 10, 20, 40, 64])
def test_agrees_with_the_reference(length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And twice the same bits."""
    monkeypatch.setattr(short, "MOST_STEPS", 64)
    monkeypatch.setattr(short, "FEWEST_ROWS", 1)
    cuda.forward_plans.clear()
    cuda.backward_plans.clear()
    tensors = drawn(1001, length, 16, 16, dtype)
    assert short.takes(1001, length, 16, 1, 16)
    types = {name: dtype if name in ACTIVATIONS else torch.float32 for name in tensors}
    with selective_scan.using("reference"):
        want = results(selective_scan, tensors, dict.fromkeys(tensors, torch.float64))
    got, again = results(on_gpu, tensors, types), results(on_gpu, tensors, types)
    for name, true in want.items():
        error = (got[name].double() - true).norm() / true.norm()
        assert error <= (3e-6 if dtype == torch.float32 else 4e-3), f"{name}: {error:.1e}"
        assert torch.equal(got[name], again[name]), name


def test_sizes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of one kind that need different amounts of shared memory take nothing from each other."""
    monkeypatch.setattr(short, "MOST_STEPS", 64)
    monkeypatch.setattr(short, "FEWEST_ROWS", 1)
    for length in (40, 10, 20, 40, 10):
        drawn_here = drawn(99, length, 16, 16)
        tensors: dict[str, Any] = {name: x.float().cuda().requires_grad_() for name, x in drawn_here.items()}
        y: Any = selective_scan(**tensors, delta_softplus=True)
        assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), list(tensors.values())))
