"""The CUDA path of the cross-scan with all of its host code, on an emulated device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import BackendError
from selectra.ops.cross_scan import cuda, registration
from selectra.ops.cross_scan.call import prepare
from selectra.ops.selective_scan import plans, wide
from selectra.ops.selective_scan.faults import faults
from selectra.train.record import BackendWatch
from tests.ops import cases
from tests.ops.cross import ALL, drawn, results, slow
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu
from tests.ops.test_cross_scan import strided

__all__ = ["emulated_gpu"]


def scan(**arguments: Any) -> Any:
    """The operator on the emulated device."""
    return registration.run(prepare(**arguments), "cuda")


@pytest.fixture(autouse=True)
def gpu(emulated_gpu: EmulatedGpu) -> Iterator[EmulatedGpu]:
    """The emulated device."""
    cuda.plans.clear()
    faults.of(-1).word.value = 0
    yield emulated_gpu
    cuda.plans.clear()


def compare(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, **flags: Any) -> dict[str, Tensor]:
    """Output and gradients against the loop in float64."""
    want = results(slow, tensors, torch.float64, **flags)
    got = results(scan, tensors, dtype, **flags)
    if dtype == torch.float32:
        y = {"y": want.pop("y")}
        cases.assert_close(got, y, 2 * cases.FLOAT32_OUTPUT, "float32")
        cases.assert_close(got, want, cases.FLOAT32_GRADIENT, "float32")
    else:
        cases.assert_close(got, want, 4 * torch.finfo(dtype).eps, str(dtype))
    return got


@pytest.mark.parametrize("n", [1, 3, 6, 16])
def test_agrees_with_a_loop_over_positions(n: int) -> None:
    compare(drawn((2, 5, 7), 4, 8, n, gate="shared"))
    compare(drawn((1, 6, 11), 3, 8, n, shared=False), routes=("up", "right", "down"), merge=False)


@pytest.mark.parametrize("n", [1, 16])
def test_odd_channels_and_a_gate_of_every_route(n: int) -> None:
    compare(drawn((1, 9, 4), 4, 19, n, gate="own"), merge=False)
    compare(drawn((1, 9, 4), 4, 67, n, gate="own"))


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize(
    ("shape", "routes"), [((2, 1, 37), ("right", "left")), ((1, 35, 1), ALL), ((1, 2, 17), ("up",))]
)
def test_lines_and_single_routes(shape: tuple[int, int, int], routes: tuple[str, ...], n: int) -> None:
    compare(drawn(shape, len(routes), 8, n, gate="shared"), routes=routes)


@pytest.mark.parametrize("n", [1, 16])
def test_half_types(n: int) -> None:
    compare(drawn((2, 6, 7), 4, 16, n, dtype=torch.bfloat16, gate="shared"), torch.bfloat16)
    compare(drawn((1, 6, 7), 2, 7, n, dtype=torch.float16, plain=True), torch.float16, routes=("left", "down"))


def test_parts_of_wider_tensors_of_other_sizes() -> None:
    wide = {name: t.float() for name, t in drawn((1, 3, 5), 2, 8, 4).items()}
    for n in (4, 2):
        parts: dict[str, Any] = {name: t[..., :n] if name in ("A", "B", "C") else t for name, t in wide.items()}
        got, want = (op(**parts, routes=("right", "up"), delta_softplus=True) for op in (scan, slow))
        cases.assert_close({"y": got}, {"y": want.double()}, 1e-5, f"{n} states")


@pytest.mark.parametrize("n", [2, 16])
def test_layouts_in_memory(n: int) -> None:
    tensors = drawn((2, 5, 7), 4, 16, n, gate="shared")
    compare(strided(tensors))
    first = {name: tensors[name].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for name in ("u", "z")}
    delta = tensors["delta"].permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    compare(tensors | first | {"delta": delta})
    routes_first = {name: tensors[name].movedim(3, 0).contiguous().movedim(0, 3) for name in ("delta", "B", "C")}
    compare(tensors | routes_first)
    own = drawn((2, 5, 7), 4, 16, n, shared=False, gate="own")
    columns_first = {name: own[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "z")}
    got = compare(own | columns_first | {"delta": own["delta"].movedim(3, 0).contiguous().movedim(0, 3)})
    assert got["u"].stride() == columns_first["u"].stride()


@pytest.mark.parametrize("n", [2, 8])
def test_the_length_in_chunks(n: int, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "FEWEST_STEPS_OF_CHUNK", 64)
    gpu.multiprocessors = 100
    compare(drawn((1, 13, 21), 4, 10, n, gate="shared"))
    chunks = [plan.words[plans.GRID_PLACES["n_chunks"]] for plan in cuda.plans.values()]
    assert len(chunks) == 2 and min(chunks) > 2


def test_mixed_types_are_computed_in_float32() -> None:
    tensors = drawn((1, 3, 5), 4, 8, 4, dtype=torch.bfloat16, gate="shared")
    want = slow(**tensors, delta_softplus=True)  # pyright: ignore[reportArgumentType]
    leaves = {name: t.float().requires_grad_() for name, t in tensors.items()}
    leaves["u"] = tensors["u"].bfloat16().requires_grad_()
    y = scan(**leaves, delta_softplus=True)
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert y.dtype == torch.bfloat16 and [g.dtype for g in grads] == [leaf.dtype for leaf in leaves.values()]
    torch.testing.assert_close(y, want.bfloat16(), rtol=1e-2, atol=1e-2)
    double: dict[str, Any] = {name: t.requires_grad_() for name, t in tensors.items()}
    truth = torch.autograd.grad(slow(**double, delta_softplus=True).sum(), list(double.values()))
    for name, got, grad in zip(leaves, grads, truth, strict=True):
        assert (got.double() - grad).abs().max() <= (1e-2 if name == "u" else 1e-5) * grad.abs().max(), name


@pytest.mark.parametrize("n", [2, 16])
def test_results_are_equal_bit_by_bit_in_any_order(n: int, gpu: EmulatedGpu) -> None:
    found = []
    for gpu.seed in (0, 1, 2):
        cuda.plans.clear()
        found.append(results(scan, drawn((1, 5, 7), 4, 24, n, gate="shared"), torch.float32))
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:])


@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    got = results(scan, drawn(shape, 4, 3, 2, gate="shared"), torch.float32)
    assert got["y"].shape == (*shape, 3) and not any(value.any() for value in got.values())


def test_one_scan_forward_and_one_back(gpu: EmulatedGpu) -> None:
    tensors: dict[str, Any] = {name: t.float().requires_grad_() for name, t in drawn((1, 2, 3), 4, 8, 16).items()}
    for _ in range(3):
        scan(**tensors, delta_softplus=True).sum().backward()
    names = [kernel.name for kernel in gpu.kernels]
    assert [names.count(name) for name in ("scan_forward", "scan_backward", "scan_reduce")] == [1, 1, 1]
    assert set(names) == {"scan_forward", "scan_backward", "scan_reduce", "sum_routes"}


def test_large_grids_are_divided_exactly() -> None:
    for height, width in ((2, 2**29), (3, 10_007), (46_341, 46_340), (2**15, 2**16 - 1), (7, 5), (2**30, 1)):
        call = prepare(*small_call(height, width))  # pyright: ignore[reportArgumentType]
        routes, grid_width, magic, shift = cuda._grid(call)
        assert grid_width == width and routes == (0x3210 if width > 1 else 0x1010)
        for s in (0, 1, height - 1, height, height + 1, height * width // 2, height * width - 1):
            assert s < 2**31 and (s * magic >> 32) >> shift == s // height


def small_call(height: int, width: int) -> tuple[Tensor, ...]:
    """Tensors that take no memory."""
    one = torch.zeros(1)
    u, delta = one.expand(1, height, width, 1), one.expand(1, height, width, 4, 1)
    return u, delta, one.expand(4, 1, 1), delta, delta


def test_a_decay_that_is_not_finite_is_told_at_the_next_call() -> None:
    tensors = {name: t.float() for name, t in drawn((1, 2, 3), 4, 6, 16).items()}
    good = tensors["A"].clone()
    tensors["A"][3, 1, 0] = float("inf")
    y = scan(**tensors, delta_softplus=True, merge=False)
    assert y[..., 3, 1].isnan().all() and y[..., :3, :].isfinite().all()
    with pytest.raises(BackendError, match="A held infinite or not-a-number values in an earlier call"):
        scan(**tensors | {"A": good}, delta_softplus=True)


def test_what_it_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    a: dict[str, Any] = {name: t.float() for name, t in drawn((1, 2, 3), 4, 6, 2).items()}
    call = prepare(**a)
    assert cuda.refuse(call) == "tensors are on cpu, it needs cuda"

    class OnGpu:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    on_gpu: Any = call._replace(u=OnGpu())  # pyright: ignore[reportArgumentType]
    assert cuda.refuse(on_gpu) is None
    assert cuda.refuse(on_gpu._replace(A=torch.zeros(4, 6, 65))) == "it takes up to 64 states, not 65"
    assert cuda.refuse(on_gpu._replace(routes=(0,) * 17)) == "it takes up to 16 routes, not 17"
    with pytest.raises(
        BackendError, match="cross_scan: backend 'cuda' is written into this program and a tensor is on"
    ):
        torch.ops.selectra.cross_scan(*call, "cuda", False)


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "require_cuda", lambda tensors, op: None)
    for merge, gate in ((True, "shared"), (False, "own")):
        a = drawn((1, 2, 3), 4, 6, 2, gate=gate, shared=merge)
        tensors = {name: t.float().requires_grad_() for name, t in a.items()}
        call = prepare(**tensors, merge=merge, delta_softplus=True)  # pyright: ignore[reportArgumentType]
        # Routes first, so that gradients lie in memory as inputs do.
        laid = call._replace(delta=call.delta.movedim(3, 0).contiguous().movedim(0, 3))
        laid = laid._replace(u=call.u.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4))
        detached = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in laid]
        torch.library.opcheck(torch.ops.selectra.cross_scan.default, (*detached, "cuda", True))


def test_the_backend_that_ran_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "require_cuda", lambda tensors, op: None)
    with BackendWatch() as watch:
        scan(**{name: t.float() for name, t in drawn((1, 2, 3), 4, 6, 2).items()})
    assert watch.noted == {"cross_scan": "cuda"}


@pytest.mark.compile
def test_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "require_cuda", lambda tensors, op: None)
    tensors = drawn((1, 2, 3), 4, 6, 2, gate="shared")

    torch._dynamo.reset()
    want = results(scan, tensors, torch.float32)
    got = results(torch.compile(scan, fullgraph=True, backend="aot_eager"), tensors, torch.float32)
    assert all(torch.equal(want[name], got[name]) for name in want)
