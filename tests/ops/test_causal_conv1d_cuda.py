"""The CUDA kernels of the causal convolution: on an emulated device everywhere, on a real one with `pytest -m gpu`."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import BackendError
from selectra.ops import causal_conv1d
from selectra.ops.causal_conv1d import cuda
from selectra.ops.causal_conv1d.call import prepare
from tests.ops import cases
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]
Convolution = Callable[..., Any]
NAMES = ("x", "weight", "bias", "initial_state")
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
# The device's exponential may be off by two units in the last place.
FLOAT32_OUTPUT = 2e-6
# Half a unit in the last place, relative to the largest number, and what SiLU's float32 may add at a tie.
ROUNDING = {torch.float32: FLOAT32_OUTPUT, torch.bfloat16: 2.1e-3 * 2, torch.float16: 2.6e-4 * 2}


class _Emulated(torch.autograd.Function):
    """The backend's two functions without the registration, which takes no CPU tensor for it."""

    @staticmethod
    def forward(ctx: Any, flags: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        arguments: dict[str, Any] = dict(zip(NAMES, tensors, strict=True))
        ctx.call = prepare(**arguments, **flags)
        y, final_state = cuda.forward(*ctx.call[:-1])
        assert final_state is not None
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *cuda.backward(dy, dfinal, *ctx.call[:-1])


def _emulated(**arguments: Any) -> Any:
    tensors = [arguments.pop(name, None) for name in NAMES]
    return _Emulated.apply(arguments, *tensors)


def _on_gpu(**arguments: Any) -> Any:
    moved: dict[str, Any] = {k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with causal_conv1d.using("cuda"):
        return tuple(out.cpu() for out in causal_conv1d(**moved))


@pytest.fixture(params=["emulated", GPU])
def convolution(request: pytest.FixtureRequest) -> Iterator[Convolution]:
    """The operator on CPU tensors, returning the final state too."""
    if request.param == "cuda":
        yield _on_gpu
        return
    request.getfixturevalue("emulated_gpu")
    forget_launches()
    yield _emulated
    forget_launches()


def forget_launches() -> None:
    """A launch keeps its kernel, and with it what it was emulated with."""
    cuda.forward_launch.cache_clear()
    cuda.backward_launch.cache_clear()


def drawn(d: int, k: int, length: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Any]:
    """Tensors of a call in float64, of numbers that `dtype` holds."""
    shapes = {"x": (batch, length, d), "weight": (d, k), "bias": (d,), "initial_state": (batch, d, k)}
    generator = torch.Generator().manual_seed(d * k + length)
    found = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.to(dtype if name == "x" else torch.float32).double() for name, tensor in found.items()}


def compare(
    convolution: Convolution, tensors: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any
) -> dict[str, Tensor]:
    """Outputs and gradients against the reference in float64; x and y in `dtype`, the rest in float32."""
    flags = {"activation": "silu", "return_final_state": True} | flags
    generator = torch.Generator().manual_seed(5)
    borders = flags.get("cu_seqlens")
    n_states = len(tensors["x"]) if borders is None else len(borders) - 1
    dy = torch.randn(tensors["x"].shape, generator=generator).to(dtype)
    dstate = torch.randn(n_states, *tensors["weight"].shape, generator=generator)
    found: dict[bool, dict[str, Tensor]] = {}
    for truth in (True, False):
        types = {name: torch.float64 if truth else dtype if name == "x" else torch.float32 for name in tensors}
        leaves: dict[str, Any] = {
            name: torch.empty_strided(t.size(), t.stride(), dtype=types[name]).copy_(t).requires_grad_()
            for name, t in tensors.items()
        }
        with causal_conv1d.using("reference"):
            outputs = (causal_conv1d if truth else convolution)(**leaves, **flags)
        y, state = outputs
        grads = torch.autograd.grad([y, state], list(leaves.values()), [dy.to(y.dtype), dstate.to(state.dtype)])
        found[truth] = {"y": y.detach(), "state": state.detach()} | {
            f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
        }
    for name, want in found[True].items():
        rounded = name in ("y", "dx")
        at_most = ROUNDING[dtype] if rounded else cases.FLOAT32_GRADIENT
        cases.assert_close({name: found[False][name]}, {name: want}, at_most, f"{dtype}")
        assert found[False][name].dtype == (dtype if rounded else torch.float32)
    return found[False]


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_agrees_with_the_reference(convolution: Convolution, first: int) -> None:
    for seed in range(first, first + 10):
        case = cases.conv_case(seed)
        with causal_conv1d.using("reference"):
            outputs, grads = cases.run(causal_conv1d, case, torch.float64)
        got, got_grads = cases.run(convolution, case, torch.float32)
        cases.assert_close(got, outputs, FLOAT32_OUTPUT, f"case {seed}")
        cases.assert_close(got_grads, grads, cases.FLOAT32_GRADIENT, f"case {seed}")


# Channels that are read one, two, four and eight at a time.
@pytest.mark.parametrize("d", [5, 6, 20, 24, 264])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_types_and_widths(convolution: Convolution, dtype: torch.dtype, d: int) -> None:
    compare(convolution, drawn(d, 4, 19, dtype), dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 8, 9, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_filters_of_any_length(convolution: Convolution, k: int, reverse: bool) -> None:
    compare(convolution, drawn(8, k, 21), reverse=reverse)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("reverse", [False, True])
def test_positions_side_by_side(convolution: Convolution, dtype: torch.dtype, reverse: bool) -> None:
    tensors = drawn(6, 4, 40, dtype)
    tensors["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    compare(convolution, tensors, dtype, reverse=reverse)
    # Their rows begin anywhere.
    tensors["x"] = tensors["x"][:, 1:39]
    compare(convolution, tensors, dtype, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_wider_rows(convolution: Convolution, dtype: torch.dtype) -> None:
    tensors = drawn(48, 4, 17, dtype)
    for start, width in ((0, 16), (16, 16), (3, 16), (4, 12)):
        part = {name: t[:, start : start + width] if name == "initial_state" else t for name, t in tensors.items()}
        part |= {"x": tensors["x"][..., start : start + width]}
        part |= {name: tensors[name][start : start + width] for name in ("weight", "bias")}
        compare(convolution, part, dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_many_rows_of_blocks(convolution: Convolution, masked: bool) -> None:
    tensors = drawn(128, 4, 301)
    flags: dict[str, Any] = {"mask": torch.rand(2, 301) < 0.7} if masked else {}
    compare(convolution, tensors, **flags)


def test_many_packed_sequences(convolution: Convolution) -> None:
    tensors = drawn(24, 4, 203, batch=1)
    borders = torch.tensor([0, 0, 1, 3, 3, 20, 84, 85, 200, 203, 203], dtype=torch.int32)
    tensors["initial_state"] = torch.randn(10, 24, 4, dtype=torch.float32).double()
    for reverse in (False, True):
        compare(convolution, tensors, cu_seqlens=borders, reverse=reverse)
        compare(convolution, tensors, cu_seqlens=borders.repeat_interleave(2)[::2], reverse=reverse)


def test_nothing_to_do(convolution: Convolution) -> None:
    for batch, length, d in ((0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)):
        tensors = drawn(d, 4, length, batch=batch)
        leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
        y, state = convolution(**leaves, return_final_state=True)
        grads = torch.autograd.grad([y.sum() + state.sum()], list(leaves.values()))
        assert [g.shape for g in grads] == [t.shape for t in leaves.values()]
        assert all(torch.isfinite(g).all() for g in (y, state, *grads))


@pytest.mark.parametrize("wrong", [[0, 20, 10, 30], [3, 30], [0, 29], [0, 99], [-7, 30]])
def test_wrong_borders_give_no_number(convolution: Convolution, wrong: list[int]) -> None:
    # Memory that nobody fills is not NaN here.
    torch.use_deterministic_algorithms(False)
    tensors = {name: t.float().requires_grad_() for name, t in drawn(8, 4, 30, batch=1).items()}
    tensors["initial_state"] = torch.zeros(len(wrong) - 1, 8, 4, requires_grad=True)
    outputs = convolution(**tensors, cu_seqlens=torch.tensor(wrong, dtype=torch.int32), return_final_state=True)
    grads = torch.autograd.grad([out.sum() for out in outputs], list(tensors.values()))
    assert all(found.isnan().all() for found in (*outputs, *grads))


def test_gradients_are_equal_bit_by_bit(emulated_gpu: EmulatedGpu) -> None:
    found = []
    for emulated_gpu.seed in (0, 1, 2):
        forget_launches()
        found.append(compare(_emulated, drawn(40, 4, 301)))
    forget_launches()
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:])
    assert {kernel.name for kernel in emulated_gpu.kernels} == {"conv_forward", "conv_backward", "conv_sum"}


def test_what_it_does_not_take_is_said() -> None:
    cpu = causal_conv1d.explain(torch.zeros(1, 2, 3), torch.zeros(3, 4))["cuda"]
    assert cpu == "tensors are on cpu, it needs cuda"
    x = torch.zeros(1, 2, 3, device="meta")
    with pytest.raises(BackendError, match="a tensor is on meta, it needs cuda; move the tensors"):
        cuda.require_cuda((x, None))


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def large(dtype: torch.dtype = torch.bfloat16, length: int = 1021, device: str = "cuda") -> dict[str, Any]:
    """Tensors of a call that fills a GPU."""
    tensors = drawn(512, 4, length, dtype)
    return {
        name: tensor.to(device, dtype if name == "x" else torch.float32).requires_grad_()
        for name, tensor in tensors.items()
    }


def gradients(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
    with causal_conv1d.using("cuda"):
        y = causal_conv1d(**tensors, activation="silu")
        assert isinstance(y, Tensor)
        return torch.autograd.grad(y.float().square().sum(), list(tensors.values()))


@gpu
@needs_gpu
def test_gpu_refusals() -> None:
    x, weight = torch.zeros(1, 2, 3, device="cuda"), torch.zeros(3, 65, device="cuda")
    assert causal_conv1d.explain(x, weight)["cuda"] == "it takes filters of up to 64 taps, not 65"
    reason = causal_conv1d.explain(x.double(), weight[:, :4].double())["cuda"]
    assert reason == "it takes float32, bfloat16 and float16, not torch.float64"
    assert causal_conv1d.backend_for(x, weight[:, :4]) == "cuda"


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gpu_gradients_are_equal_bit_by_bit(dtype: torch.dtype) -> None:
    tensors = large(dtype)
    first = gradients(tensors)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(tensors), strict=True))


@gpu
@needs_gpu
def test_gpu_long() -> None:
    compare(_on_gpu, drawn(24, 4, 65_537, torch.bfloat16, batch=1), torch.bfloat16)


@gpu
@needs_gpu
def test_gpu_streams() -> None:
    tensors = large(length=8191)
    want = gradients(tensors)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(gradients(tensors))
        torch.cuda.synchronize()
        for got in found:
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@gpu
@needs_gpu
def test_gpu_allocates_nothing_more() -> None:
    tensors = large()
    gradients(tensors)
    # What earlier tests left in cycles may be freed at any time.
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        gradients(tensors)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device at most")
def test_gpu_second_device() -> None:
    first, second = gradients(large()), gradients(large(device="cuda:1"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


@gpu
@needs_gpu
def test_gpu_graph() -> None:
    tensors: dict[str, Any] = {name: tensor.detach() for name, tensor in large().items()}
    with causal_conv1d.using("cuda"):
        want = causal_conv1d(**tensors, activation="silu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = causal_conv1d(**tensors, activation="silu")
    assert isinstance(got, Tensor)
    got.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert isinstance(want, Tensor)
    assert torch.equal(got, want)


@gpu
@needs_gpu
def test_gpu_opcheck() -> None:
    a = large(torch.float32, 37)
    tensors = (*(a[name] for name in NAMES), None, None)
    torch.library.opcheck(torch.ops.selectra.causal_conv1d.default, (*tensors, True, False, "cuda"))


@gpu
@needs_gpu
@pytest.mark.compile
def test_gpu_compiles_without_graph_breaks() -> None:
    a = large(torch.float32, 37)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return causal_conv1d(x, weight, bias, "silu", return_final_state=True)

    torch._dynamo.reset()
    leaves = [a["x"], a["weight"], a["bias"]]
    with causal_conv1d.using("cuda"):
        want = convolve(*leaves)
        got = torch.compile(convolve, fullgraph=True, backend="aot_eager")(*leaves)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got[0].sum() + got[1].sum(), leaves),
            torch.autograd.grad(want[0].sum() + want[1].sum(), leaves),
        )
