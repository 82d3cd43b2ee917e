"""The CUDA kernels of the selective scan with all of their host code, on an emulated device."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.ops import cuda as room
from selectra.ops import selective_scan
from selectra.ops.selective_scan import cuda, geometry, plans, registration, wide
from selectra.ops.selective_scan.call import prepare
from selectra.ops.selective_scan.faults import faults
from tests.ops import cases
from tests.ops.emulator import emulated
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]
ACTIVATIONS = ("u", "delta", "B", "C", "z")
# The tensor cores cut the digits of what they multiply in bfloat16 and float16 calls; sums over positions and channels
# keep this much of it.
CUT_DIGITS = 5e-4


def scan(**arguments: Any) -> Any:
    """The operator on the emulated device."""
    return registration.run(prepare(**arguments), "cuda")


@pytest.fixture(autouse=True)
def gpu(emulated_gpu: EmulatedGpu) -> Iterator[EmulatedGpu]:
    """The emulated device; new memory holds NaN."""
    forget_plans()
    faults.of(-1).word.value = 0
    before = torch.are_deterministic_algorithms_enabled()
    # With torch.utils.deterministic.fill_uninitialized_memory, which is on.
    torch.use_deterministic_algorithms(True)
    yield emulated_gpu
    torch.use_deterministic_algorithms(before)
    forget_plans()


def forget_plans() -> None:
    """A plan keeps its kernels, and with them what they were emulated with."""
    cuda.forward_plans.clear()
    cuda.backward_plans.clear()


def drawn(
    batch: int, length: int, d: int, n: int, dtype: torch.dtype = torch.float32, groups: int = 1, gated: bool = True
) -> dict[str, Tensor]:
    """Tensors of a call in float64, of numbers that their types hold."""
    generator = torch.Generator().manual_seed(length * d + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {name: normal(batch, length, d) for name in ("u", "delta", "z")}
    tensors |= {name: normal(batch, length, groups, n) for name in ("B", "C")}
    tensors |= {name: normal(d) for name in ("D", "delta_bias")}
    tensors |= {"A": -normal(d, n).exp(), "initial_state": normal(batch, d, n)}
    if not gated:
        del tensors["z"]
    return {name: t.to(dtype if name in ACTIVATIONS else torch.float32).double() for name, t in tensors.items()}


def results(
    op: Callable[..., Any], tensors: dict[str, Tensor], types: dict[str, torch.dtype], **flags: Any
) -> dict[str, Tensor]:
    """Outputs and gradients."""
    leaves = {name: relaid(tensor, types[name]).requires_grad_() for name, tensor in tensors.items()}
    outputs = op(**leaves, **{"delta_softplus": True, "return_final_state": True} | flags)
    generator = torch.Generator().manual_seed(5)
    # Numbers of few digits, which all types hold.
    grads = [(torch.randint(-4, 5, out.shape, generator=generator) / 4).to(out.dtype) for out in outputs]
    found = torch.autograd.grad(list(outputs), list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return {"y": outputs[0].detach(), "final_state": outputs[1].detach()} | dict(zip(leaves, found, strict=True))


def relaid(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype` that lies in memory as `tensor` does, at the same place of a storage of as many numbers."""
    storage = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=dtype)
    storage.copy_(tensor.as_strided(storage.shape, (1,), 0))
    return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def compare(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, **flags: Any) -> dict[str, Tensor]:
    """Outputs and gradients against the reference in float64; activations in `dtype`."""
    with selective_scan.using("reference"):
        want = results(selective_scan, tensors, dict.fromkeys(tensors, torch.float64), **flags | {"out_dtype": None})
    types = {name: dtype if name in ACTIVATIONS else torch.float32 for name in tensors}
    got = results(scan, tensors, types, **flags)
    types |= {"y": flags.get("out_dtype", dtype), "final_state": torch.float32}
    assert {name: found.dtype for name, found in got.items()} == types
    outputs = {name: want.pop(name) for name in ("y", "final_state")}
    if dtype == torch.float32:
        cases.assert_close(got, outputs, cases.FLOAT32_OUTPUT, "float32")
        cases.assert_close(got, want, cases.FLOAT32_GRADIENT, "float32")
        return got
    cases.assert_close(got, outputs | want, 4 * torch.finfo(dtype).eps, str(dtype))
    for name, truth in (outputs | want).items():
        least = max(rms(truth.to(types[name]).double() - truth), CUT_DIGITS * rms(truth))
        error = rms(got[name].double() - truth)
        # Of few numbers the mean tells little.
        assert error <= (1.1 if truth.numel() > 200 else 1.3) * least, f"{dtype}: {name}: {error / least:.2f} roundings"
    return got


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return x.square().mean().sqrt().item()


def compile_side_by_side(calls: Sequence[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernels that calls will ask for."""
    wanted: dict[Any, None] = {}
    nothing = SimpleNamespace(launch=lambda grid, threads, words: None)

    def note(source: str, name: str, defines: Any, device_index: int, shared_bytes: int = 0) -> Any:
        wanted[source, defines, name] = None
        return nothing

    with monkeypatch.context() as patch:
        patch.setattr(room, "kernel", note)
        for call in calls:
            call()
    forget_plans()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: emulated(*kernel), wanted))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_agrees_with_the_reference(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    these = {seed: cases.scan_case(seed) for seed in range(first, first + 20)}
    compile_side_by_side([partial(cases.run, scan, case, torch.float32) for case in these.values()], monkeypatch)
    for seed, case in these.items():
        with selective_scan.using("reference"):
            outputs, grads = cases.run(selective_scan, case, torch.float64)
        got, got_grads = cases.run(scan, case, torch.float32)
        cases.assert_close(got, outputs, cases.FLOAT32_OUTPUT, f"case {seed}")
        cases.assert_close(got_grads, grads, cases.FLOAT32_GRADIENT, f"case {seed}")


# The random cases have other numbers.
@pytest.mark.parametrize("n", [6, 7, 9, 33])
def test_states_of_any_number(n: int) -> None:
    compare(drawn(1, 35, 21, n))


@pytest.mark.parametrize(
    ("dtype", "n", "gated"),
    [
        (torch.bfloat16, 16, True),
        # Checkpoints so far apart that an interval has several tiles.
        (torch.bfloat16, 24, False),
        (torch.float16, 16, False),
        (torch.bfloat16, 3, True),
        (torch.float16, 1, False),
    ],
)
def test_half_types(dtype: torch.dtype, n: int, gated: bool) -> None:
    for length, d in ((67, 24), (1, 24), (160, 8)) if n != 3 else ((67, 19), (1, 19)):
        compare(drawn(2, length, d, n, dtype, gated=gated), dtype)


@pytest.mark.parametrize("kind", ["65", "reverse", "packed", "masked"])
def test_more_states_than_a_block_holds(kind: str) -> None:
    tensors = drawn(1, 34, 6, 65 if kind == "65" else 128, torch.bfloat16, groups=2, gated=kind != "packed")
    flags: dict[str, Any] = {"reverse": kind == "reverse"}
    if kind == "packed":
        flags["cu_seqlens"] = torch.tensor([0, 0, 33, 34], dtype=torch.int32)
        tensors["initial_state"] = tensors["initial_state"].repeat(3, 1, 1)
    if kind == "masked":
        flags["mask"] = torch.arange(34).unsqueeze(0) % 3 > 0
        for name in ACTIVATIONS:
            tensors[name][~flags["mask"]] = math.nan
    compare(tensors, **flags)
    compare(tensors, torch.bfloat16, **flags)


@pytest.mark.parametrize("n", [2, 16])
def test_layouts_in_memory(n: int) -> None:
    tensors = drawn(2, 37, 16, n)
    along_time = {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "delta", "z")}
    got = compare(tensors | along_time)
    assert got["y"].stride() == got["u"].stride() == along_time["u"].stride()
    compare(tensors | {"u": along_time["u"]})
    for start in (16, 3):
        parts = {
            name: torch.cat([t[..., :1]] * start + [t, t], -1) for name, t in tensors.items() if name in ACTIVATIONS
        }
        compare(tensors | {name: t[..., start : start + tensors[name].shape[-1]] for name, t in parts.items()})
    rows = {name: torch.cat([t, t], 1)[:, 1:38] for name, t in tensors.items() if name in ACTIVATIONS}
    compare(tensors | rows)
    # Nothing but the sums of their gradients tells whether numbers were repeated.
    tensors["A"] = tensors["A"].t().contiguous().t()
    compare(tensors | {"D": torch.stack([tensors["D"]] * 2, -1)[:, 0]})


@pytest.mark.parametrize("n", [2, 16])
def test_constant_in_time_and_over_channels(n: int) -> None:
    tensors = drawn(2, 37, 16, n)
    tensors |= {"B": tensors["B"][:, :1].expand_as(tensors["B"]), "A": tensors["A"][:1].expand_as(tensors["A"])}
    whole: dict[str, Any] = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with selective_scan.using("reference"):
        want = selective_scan(**whole, delta_softplus=True)
    got = scan(**{k: relaid(v, torch.float32) for k, v in tensors.items()}, delta_softplus=True)
    cases.assert_close({"y": got}, {"y": want}, cases.FLOAT32_OUTPUT, "expanded")


def test_mixed_types_and_types_of_the_output() -> None:
    tensors = drawn(1, 33, 8, 16, torch.bfloat16)
    types = dict.fromkeys(tensors, torch.float32) | {"u": torch.bfloat16, "B": torch.float16}
    with selective_scan.using("reference"):
        want = results(selective_scan, tensors, dict.fromkeys(tensors, torch.float64))
    got = results(scan, tensors, types)
    assert got["y"].dtype == got["u"].dtype == torch.bfloat16 and got["delta"].dtype == torch.float32
    exact = {name: got[name] for name in ("delta", "A", "C", "D", "z", "delta_bias", "initial_state")}
    cases.assert_close(exact, {name: want[name] for name in exact}, cases.FLOAT32_GRADIENT, "mixed")
    for out_dtype in (torch.float32, torch.float16, torch.float64):
        compare(tensors, torch.bfloat16, out_dtype=out_dtype)


def test_strides_beyond_the_kernels_count_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn(2, 37, 16, 16)
    want = compare(tensors)
    monkeypatch.setattr(plans, "LARGEST_STRIDE", 47)
    forget_plans()
    got = compare(tensors | {"u": torch.cat([tensors["u"]] * 3, -1)[..., :16]})
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert None in cuda.forward_plans.values() and None in cuda.backward_plans.values()


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (2, 5, 0), (0, 0, 0), (1, 0, 6)])
@pytest.mark.parametrize("n", [2, 16, 70])
def test_nothing_to_do(shape: tuple[int, int, int], n: int) -> None:
    tensors = drawn(*shape, n)
    compare(tensors)
    del tensors["initial_state"]
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    flags: dict[str, Any] = {"cu_seqlens": torch.zeros(4, dtype=torch.int32)} if shape[0] == 1 else {}
    y, state = scan(**leaves, **flags, return_final_state=True)
    grads = torch.autograd.grad(y.sum() + state.sum(), list(leaves.values()))
    assert not state.any() and state.shape == (3 if flags else shape[0], shape[2], n)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in leaves.values()]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("n", [2, 8])
def test_the_length_in_chunks(n: int, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "FEWEST_STEPS_OF_CHUNK", 64)
    gpu.multiprocessors = 40
    tensors = drawn(1, 261, 10, n)
    compare(tensors)
    compare(tensors, reverse=True)
    plan = next(iter(cuda.backward_plans.values()))
    assert plan is not None and plan.words[plans.PLACES["n_chunks"]] > 2
    tensors["initial_state"] = tensors["initial_state"].repeat(4, 1, 1)
    compare(tensors, cu_seqlens=torch.tensor([0, 3, 3, 250, 261], dtype=torch.int32))


@pytest.mark.parametrize(("n", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (3, torch.float32)])
def test_warps_of_a_block_take_tiles_in_turn(n: int, dtype: torch.dtype, gpu: EmulatedGpu) -> None:
    gpu.multiprocessors = 1
    # Nine tiles: at the last turn most warps have none.
    tensors = drawn(1, 131, 72, n, dtype)
    compare(tensors, dtype)
    compare(tensors, dtype, reverse=True, out_dtype=torch.float32)
    plans_made = [plan for plan in (*cuda.forward_plans.values(), *cuda.backward_plans.values()) if plan is not None]
    assert {max(one.threads for one in plan.passes if "reduce" not in one.kernel.name) > 32 for plan in plans_made} == {
        True
    }
    tensors["initial_state"] = tensors["initial_state"].repeat(4, 1, 1)
    compare(tensors, dtype, cu_seqlens=torch.tensor([0, 3, 3, 100, 131], dtype=torch.int32))


@pytest.mark.parametrize("n", [1, 4])
def test_many_blocks(n: int, gpu: EmulatedGpu) -> None:
    gpu.multiprocessors = 1
    tensors = drawn(3, 35, 136, n)
    compare(tensors)


@pytest.mark.parametrize(
    ("n", "flags"),
    [
        (16, {"reverse": True}),
        (16, {"cu_seqlens": torch.tensor([0, 3, 3, 210, 261], dtype=torch.int32)}),
        (13, {"mask": torch.arange(261).unsqueeze(0) % 5 > 0, "delta_softplus": False}),
    ],
)
@pytest.mark.parametrize("layout", ["channels", "time"])
def test_thin_warps(n: int, flags: dict[str, Any], layout: str, gpu: EmulatedGpu) -> None:
    gpu.multiprocessors, gpu.seed = 40, 3
    tensors = drawn(1, 261, 24, n, torch.bfloat16)
    if "delta_softplus" in flags:
        tensors["delta"] = tensors["delta"].abs() / 8
        tensors["delta_bias"] = tensors["delta_bias"].abs() / 8
    if "cu_seqlens" in flags:
        tensors["initial_state"] = tensors["initial_state"].repeat(4, 1, 1)
    if layout == "time":
        tensors |= {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "delta", "z")}
    compare(tensors, torch.bfloat16, **flags)
    (plan,) = cuda.forward_plans.values()
    assert plan is not None and plan.passes[-1].threads == geometry.THIN_LAYOUT.threads
    assert any(kernel.shared_bytes == geometry.thin_shared(geometry.THIN_LAYOUT) for kernel in gpu.kernels)


@pytest.mark.parametrize(
    ("dtype", "processors", "flags"),
    [
        (torch.bfloat16, 1, {"reverse": True}),
        (torch.float32, 1, {"mask": torch.arange(3 * 197).view(3, 197) % 5 > 0}),
        (torch.bfloat16, 40, {}),
    ],
)
def test_the_backward_in_slices(
    dtype: torch.dtype, processors: int, flags: dict[str, Any], gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "FEWEST_STEPS_OF_CHUNK", 64)
    gpu.multiprocessors = processors
    tensors = drawn(3, 197, 16, 12, dtype, groups=2)
    whole = compare(tensors, dtype, **flags)
    forget_plans()
    monkeypatch.setattr(wide, "FEWEST_BYTES_OF_SUMS", 1)
    monkeypatch.setattr(wide, "SHARE_OF_SUMS", 24)
    monkeypatch.setattr(wide, "FEWEST_STEPS_OF_SLICE", 32)
    slices = compare(tensors, dtype, **flags)
    (plan,) = cuda.backward_plans.values()
    assert plan is not None
    parts = {one.part for one in plan.passes if one.part.steps}
    assert len({part.first_step for part in parts}) > 1
    chunks = plan.words[plans.PLACES["n_chunks"]]
    assert (len({part.first_sequence for part in parts}) > 1, chunks > 1) == (processors == 1, processors > 1)
    # The same sums in the same order, but for those of a thread's own steps.
    for name in whole.keys() - {"D", "delta_bias"}:
        assert torch.equal(whole[name], slices[name]), name


@pytest.mark.parametrize(("n", "processors"), [(1, 1), (2, 64), (6, 64), (12, 1)])
def test_sums_over_many_sequences(n: int, processors: int, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of rows, the last one of them shorter, and with slices of the work or chunks of the length."""
    gpu.multiprocessors = processors
    for name, value in (("MOST_ROWS_AT_ONCE", 20), ("FEWEST_STEPS_OF_CHUNK", 32), ("FEWEST_BYTES_OF_SUMS", 1)):
        monkeypatch.setattr(wide, name, value)
    monkeypatch.setattr(wide, "SHARE_OF_SUMS", 24)
    compare(drawn(23, 35, 10, n, groups=2))
    assert "scan_fold" in {kernel.name for kernel in gpu.kernels}
    (plan,) = cuda.backward_plans.values()
    assert plan is not None and plan.words[plans.PLACES["fold"]] >= 4


@pytest.mark.parametrize("n", [3, 16])
def test_results_are_equal_bit_by_bit_in_any_order(n: int, gpu: EmulatedGpu) -> None:
    found = []
    for gpu.seed in (0, 1, 2):
        forget_plans()
        found.append(compare(drawn(2, 37, 40, n, groups=1)))
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:])


def test_a_dimension_of_one_may_have_any_stride(emulated_gpu: EmulatedGpu) -> None:
    u = torch.randn(2, 1, 8)
    wide = u.as_strided(u.shape, (8, 2**40, 1))
    A, BC = -torch.ones(8, 5), torch.randn(2, 1, 1, 5)
    calls = [prepare(x, u, A, BC, BC, delta_softplus=True) for x in (u, wide)]
    first, second = (cuda.forward(call, False)[0] for call in calls)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("n", "shared_limit"), [(64, 163 * 1024), (20, 99 * 1024), (64, 99 * 1024)])
def test_smaller_blocks_where_there_is_less_shared_memory(gpu: EmulatedGpu, n: int, shared_limit: int) -> None:
    gpu.shared_limit = shared_limit
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {name: normal(1, 70, 24) for name in ("u", "delta", "z")} | {name: normal(1, 70, n) for name in "BC"}
    tensors["A"] = -normal(24, n).exp()

    def found(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        y = op(**leaves, delta_softplus=True)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    with selective_scan.using("reference"):
        want = found(selective_scan, torch.float64)
    for got, truth in zip(found(scan, torch.float32), want, strict=True):
        assert (got.double() - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert max(kernel.shared_bytes for kernel in gpu.kernels) <= shared_limit
