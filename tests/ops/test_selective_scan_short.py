"""The scan's kernels for many short sequences of few channels, on an emulated device against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.ops import selective_scan
from selectra.ops.selective_scan import cuda, short
from selectra.ops.selective_scan.call import prepare
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu
from tests.ops.test_selective_scan_cuda import compare, drawn, gpu, scan

__all__ = ["emulated_gpu", "gpu"]


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows suffice."""
    monkeypatch.setattr(short, "MOST_STEPS", 64)
    monkeypatch.setattr(short, "FEWEST_ROWS", 1)


def ran(device: EmulatedGpu) -> set[str]:
    """The kernels that a call asked for."""
    return {kernel.name for kernel in device.kernels}


@pytest.mark.parametrize(
    ("batch", "length", "d", "n", "groups", "flags"),
    [
        (3, 10, 16, 16, 1, {}),
        (19, 1, 5, 6, 1, {"reverse": True}),
        (2, 20, 16, 16, 1, {"reverse": True}),
        (5, 40, 12, 9, 1, {"delta_softplus": False}),
        (3, 13, 6, 16, 3, {}),
        (2, 64, 3, 5, 1, {}),
    ],
)
def test_agrees_with_the_reference(
    batch: int, length: int, d: int, n: int, groups: int, flags: dict[str, Any], gpu: EmulatedGpu
) -> None:
    tensors = drawn(batch, length, d, n, groups=groups)
    if "delta_softplus" in flags:
        tensors["delta"], tensors["delta_bias"] = tensors["delta"].abs() * 0.3, tensors["delta_bias"].abs() * 0.1
    compare(tensors, **flags)
    assert ran(gpu) == {"scan_short_forward", "scan_short_backward", "scan_short_sum"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    compare(drawn(20, 11, 16, 16, dtype), dtype)
    compare(drawn(4, 20, 16, 16, dtype, gated=False), dtype, out_dtype=torch.float32)


def test_what_is_not_given() -> None:
    tensors = drawn(9, 10, 16, 16, gated=False)
    compare({name: tensors[name] for name in ("u", "delta", "A", "B", "C")})


@pytest.mark.parametrize("length", [9, 30])
def test_absent_positions(length: int) -> None:
    tensors = drawn(6, length, 16, 7)
    mask = torch.rand(6, length) < 0.6
    mask[2], mask[3] = False, True
    poisoned = {**tensors, "u": torch.where(mask[..., None], tensors["u"], torch.nan)}
    compare(poisoned, mask=mask)


def test_layouts_in_memory() -> None:
    """z a part of a wider product, B and C parts of rows of an odd width, as a mixer of channels has them."""
    tensors = drawn(6, 10, 16, 16)
    wide, projected = torch.randn(6, 10, 48), torch.randn(6, 10, 33)
    tensors["z"] = wide.double()[..., 32:]
    tensors["B"], tensors["C"] = (projected.double()[..., None, at : at + 16] for at in (1, 17))
    compare(tensors)
    compare({**tensors, "u": tensors["u"].transpose(0, 1).contiguous().transpose(0, 1)})


def test_blocks_take_sequences_until_none_is_left(gpu: EmulatedGpu) -> None:
    gpu.multiprocessors = 1
    for gpu.seed in (0, 3):
        compare(drawn(70, 4, 16, 16))


def test_the_state_that_nobody_uses_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither checkpoints nor zeros for the final state's gradient."""
    seen: list[Any] = []
    original = cuda.backward_at_once

    def spy(call: Any, dy: Tensor, dfinal: Any, checkpoints: Tensor, interval: int) -> Any:
        seen.append((dfinal, checkpoints.numel()))
        return original(call, dy, dfinal, checkpoints, interval)

    monkeypatch.setattr(cuda, "backward_at_once", spy)
    tensors = drawn(9, 10, 16, 16)
    leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
    y = scan(**leaves, delta_softplus=True)
    found = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    with selective_scan.using("reference"):
        doubles: dict[str, Any] = {name: x.requires_grad_() for name, x in tensors.items()}
        wanted = torch.autograd.grad(
            selective_scan(**doubles, delta_softplus=True).square().sum(), list(doubles.values())
        )
    assert seen == [(None, 0)]
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_which_calls_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, taken in [
        ((9, 10, 16, 1, 16), True),
        ((9, 10, 32, 2, 16), True),
        ((9, 10, 17, 1, 16), False),
        ((9, 65, 16, 1, 16), False),
        ((9, 10, 16, 1, 17), False),
        ((9, 10, 16, 1, 4), False),
        ((9, 0, 16, 1, 16), False),
    ]:
        assert short.takes(*sizes) == taken, sizes
    packed = prepare(
        **{name: x.float() for name, x in drawn(1, 10, 16, 16).items() if name != "initial_state"},  # pyright: ignore[reportArgumentType]
        cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32),
    )
    assert not cuda.is_short(packed)
    monkeypatch.setattr(short, "FEWEST_ROWS", 10)
    assert not short.takes(9, 10, 16, 1, 16)
