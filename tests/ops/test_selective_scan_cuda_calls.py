"""What lies around the CUDA kernels of the selective scan: faults told, plans kept, refusals; on an emulated device."""

import math
from typing import Any

import pytest
import torch

from selectra.errors import BackendError
from selectra.ops import selective_scan
from selectra.ops.selective_scan import cuda, registration
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu
from tests.ops.test_selective_scan_cuda import ACTIVATIONS, drawn, gpu, scan

__all__ = ["emulated_gpu", "gpu"]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("n", [2, 16])
def test_a_decay_that_is_not_finite_is_told_at_the_next_call(n: int, bad: float) -> None:
    tensors = {name: t.float() for name, t in drawn(1, 5, 6, n).items()}
    good = tensors["A"].clone()
    tensors["A"][3, 1] = bad
    y = scan(**tensors, delta_softplus=True)
    assert y[..., 3].isnan().all()
    with pytest.raises(BackendError, match="A held infinite or not-a-number values in an earlier call"):
        scan(**tensors | {"A": good}, delta_softplus=True)
    assert scan(**tensors | {"A": good}, delta_softplus=True).isfinite().all()


def test_plans_are_kept_and_do_not_pile_up(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: t.float().requires_grad_() for name, t in drawn(1, 5, 6, 16).items()}
    for _ in range(3):
        scan(**tensors).sum().backward()
    assert [kernel.name for kernel in gpu.kernels] == ["scan_forward", "scan_backward", "scan_reduce"]
    monkeypatch.setattr(cuda, "MOST_PLANS", 2)
    for length in range(1, 6):
        scan(**{name: t.detach()[:, :length] if name in ACTIVATIONS else t.detach() for name, t in tensors.items()})
        assert len(cuda.forward_plans) <= 2


def test_without_a_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, Any] = {name: t.float() for name, t in drawn(1, 5, 6, 16).items()}
    saved: list[bool] = []
    kernel = registration.KERNELS["cuda"]

    def spy(call: Any, save: bool) -> Any:
        saved.append(save)
        return kernel.forward(call, save)

    monkeypatch.setitem(registration.KERNELS, "cuda", kernel._replace(forward=spy))
    scan(**tensors)
    tensors["A"].requires_grad_()
    with torch.no_grad():
        scan(**tensors)
    scan(**tensors)
    assert saved == [False, False, True]


def test_what_it_does_not_take_is_said() -> None:
    u = torch.zeros(1, 2, 3)
    arguments = (u, u, -torch.ones(3, 2), u[..., :2], u[..., :2])
    assert selective_scan.explain(*arguments)["cuda"] == "tensors are on cpu, it needs cuda"
    with (
        selective_scan.using("cuda"),
        pytest.raises(BackendError, match="backend 'cuda' was asked for and cannot take this call: tensors are on cpu"),
    ):
        selective_scan(*arguments)
    with pytest.raises(BackendError, match="a tensor is on meta, it needs cuda; move the tensors"):
        cuda.require_cuda((u.to("meta"), None))
    with pytest.raises(BackendError, match="a tensor is on cpu, it needs cuda; move the tensors"):
        torch.ops.selectra.selective_scan(
            *arguments[:3], *(x.unsqueeze(2) for x in arguments[3:]), *[None] * 6, True, False, u.dtype, "cuda", False
        )
