"""Sum and norm: every backend against the reference in float64, the kernels on an emulated device and a real one."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selectra.errors import BackendError, ConfigError
from selectra.ops import add_norm
from selectra.ops.add_norm import cuda, reference, registration
from selectra.ops.add_norm.call import prepare
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Relative to the largest number; half a unit in the last place of the result's type, and float32 sums.
CLOSE = {torch.float64: 1e-12, F32: 3e-6, BF16: 4.5e-3, F16: 6e-4}
# Types of x, residual, weight and the outgoing residual.
TYPES = (
    (F32, F32, F32, None),
    (BF16, F32, BF16, None),
    (BF16, BF16, F32, None),
    (F16, F16, F16, F32),
    (BF16, None, BF16, F32),
    (BF16, None, None, None),
)


def _emulated(*tensors: Tensor | None, **flags: Any) -> tuple[Tensor, Tensor]:
    """Past the dispatcher, which takes no CPU tensor for this backend."""
    return registration.run_with_gradient(prepare(*tensors, **flags))  # pyright: ignore[reportArgumentType]


def _on_gpu(*tensors: Tensor | None, **flags: Any) -> tuple[Tensor, Tensor]:
    with add_norm.using("cuda"):
        y, total = add_norm(*(None if t is None else t.cuda() for t in tensors), **flags)  # pyright: ignore[reportArgumentType]
    return y.cpu(), total.cpu()


@pytest.fixture(params=["emulated", GPU])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operator's kernels on CPU tensors."""
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


def drawn(
    shape: tuple[int, ...], types: tuple[Any, ...], kind: str, biased: bool | None = None
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Tensors and flags of a call."""
    x, residual, weight, stream = types
    biased = kind == "layer" and weight is not None if biased is None else biased
    shapes = (shape, shape, shape[-1:], shape[-1:])
    dtypes = (x, residual, weight, (weight or F32) if biased else None)
    tensors = [None if t is None else (torch.randn(s) + 0.3).to(t) for s, t in zip(shapes, dtypes, strict=True)]
    return tensors, {"kind": kind, "residual_dtype": stream}


def results(
    run: Any, tensors: list[Tensor | None], flags: dict[str, Any], grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Both outputs and all gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = run(*leaves, **flags)
    found = torch.autograd.grad(
        outputs, [t for t in leaves if t is not None], [g.to(o) for g, o in zip(grads, outputs, strict=True)]
    )
    return [*outputs, *found]


def compare(run: Any, tensors: list[Tensor | None], flags: dict[str, Any]) -> None:
    """Hold a backend to the reference in float64, on the same numbers."""
    assert tensors[0] is not None
    shape, x = tensors[0].shape, tensors[0].dtype
    stream = flags["residual_dtype"] or (x if tensors[1] is None else tensors[1].dtype)
    grads = (torch.randn(shape).to(x), torch.randn(shape).to(stream))
    got = results(run, tensors, flags, grads)
    double = [None if t is None else t.double() for t in tensors]
    with add_norm.using("reference"):
        want = results(add_norm, double, {"kind": flags["kind"]}, grads)
    assert got[0].dtype == x and got[1].dtype == stream
    assert [g.dtype for g in got[2:]] == [t.dtype for t in tensors if t is not None]
    # A rounded stream is normalised as it is.
    least = max(CLOSE[x], 2 * CLOSE[stream])
    for index, (mine, true) in enumerate(zip(got, want, strict=True)):
        error = ((mine.double() - true).abs().max() / true.abs().max().clamp_min(1e-30)).item()
        # "not" for the sake of not-a-number.
        assert error <= least, f"result {index}: off by {error:.1e} of the largest, allowed {least:.1e}"


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [2, 7, 96, 97, 1024])
def test_kernels_agree_with_the_reference(kernels: Any, width: int, kind: Literal["rms", "layer"]) -> None:
    for types in TYPES:
        compare(kernels, *drawn((3, 5, width), types, kind))


def test_wide_rows_and_many(kernels: Any) -> None:
    compare(kernels, *drawn((2, 8192), TYPES[1], "layer"))
    compare(kernels, *drawn((3, 1500), TYPES[2], "rms", biased=True))
    # More rows than the blocks hold at once.
    compare(kernels, *drawn((40_000, 8), TYPES[0], "rms"))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("types", [*TYPES, (torch.float64, torch.float64, torch.float64, None)])
def test_portable_agrees_with_the_reference(types: tuple[Any, ...], kind: str) -> None:
    with add_norm.using("portable"):
        compare(add_norm, *drawn((3, 5, 24), types, kind))


def test_slices_are_read_right(kernels: Any) -> None:
    wide = torch.randn(4, 6, 40)
    tensors, flags = drawn((4, 6, 16), TYPES[0], "rms")
    compare(kernels, [wide[..., 3:19], wide.transpose(0, 1)[:4, :4].new_zeros(4, 6, 16) + 1, *tensors[2:]], flags)
    compare(kernels, [torch.randn(6, 4, 16).transpose(0, 1), wide[..., 8:24], *tensors[2:]], flags)


def test_one_use_of_the_results_is_enough(kernels: Any) -> None:
    for index in (0, 1):
        tensors, flags = drawn((3, 24), TYPES[0], "rms")
        leaves: list[Any] = [None if t is None else t.requires_grad_() for t in tensors]
        (got,) = torch.autograd.grad(kernels(*leaves, **flags)[index].sum(), leaves[:1])
        (want,) = torch.autograd.grad(reference.run(prepare(*leaves, **flags))[index].sum(), leaves[:1])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("types", [(BF16, BF16, F32), (F16, F16, F32), (BF16, F32, F32), (F16, BF16, F32)])
def test_a_wider_stream_holds_the_sum_as_it_is(kernels: Any, types: tuple[torch.dtype, ...]) -> None:
    x, residual = (torch.randn(5, 24).to(dtype) for dtype in types[:2])
    want = x.float() + residual.float()
    with add_norm.using("portable"):
        found = add_norm(x, residual, residual_dtype=types[2])
    for _, total in (found, kernels(x, residual, residual_dtype=types[2])):
        assert torch.equal(total, want)


def test_no_rows(kernels: Any) -> None:
    tensors, flags = drawn((0, 24), TYPES[1], "layer")
    y, total, *grads = results(kernels, tensors, flags, (torch.zeros(0, 24), torch.zeros(0, 24)))
    assert y.shape == total.shape == (0, 24)
    assert all((grad == 0).all() for grad in grads)


def test_checkpointing_gives_the_same_gradients(kernels: Any) -> None:
    tensors, flags = drawn((5, 24), TYPES[1], "layer")
    grads = (torch.randn(5, 24), torch.randn(5, 24))
    want = results(kernels, tensors, flags, grads)

    def again(*tensors: Tensor | None, **flags: Any) -> Any:
        return checkpoint(partial(kernels, **flags), *tensors, use_reentrant=False)

    assert all(torch.equal(a, b) for a, b in zip(results(again, tensors, flags, grads), want, strict=True))


def test_gradients_are_equal_bit_by_bit(emulated_gpu: EmulatedGpu) -> None:
    tensors, flags = drawn((50, 96), TYPES[1], "layer")
    grads = (torch.randn(50, 96), torch.randn(50, 96))
    found = []
    for emulated_gpu.seed in (0, 1, 2):
        forget_launches()
        found.append(results(_emulated, tensors, flags, grads))
    forget_launches()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert {kernel.name for kernel in emulated_gpu.kernels} == {"norm_forward", "norm_backward"}


def test_reference_is_differentiated_right() -> None:
    tensors, flags = drawn((3, 5), (torch.float64,) * 3 + (None,), "layer")
    leaves = [t.double().requires_grad_() for t in tensors if t is not None]
    with add_norm.using("reference"):
        assert torch.autograd.gradcheck(partial(add_norm, **flags), leaves)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\); it must be \(d,\) = \(4,\)"),
        ({"residual": torch.ones(3, 4)}, r"residual has shape \(3, 4\); it must be the shape of x"),
        ({"kind": "batch"}, "kind is 'batch'; allowed are 'rms' and 'layer'"),
        ({"residual_dtype": torch.float64}, "float64 goes with float64 alone"),
        ({"weight": torch.ones(4, dtype=torch.float64)}, "mixes float64 with other types"),
        ({"x": torch.tensor(1.0)}, r"it must be \(..., d\)"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 4), **changes}
    with pytest.raises(ConfigError, match=said):
        add_norm(**arguments)


def test_backends_say_why_not() -> None:
    x = torch.zeros(2, 4)
    assert add_norm.explain(x) == {"cuda": "tensors are on cpu, it needs cuda", "portable": "ok", "reference": "ok"}
    with add_norm.using("cuda"), pytest.raises(BackendError, match="tensors are on cpu"):
        add_norm(x)
    with pytest.raises(BackendError, match="a tensor is on cpu, it needs cuda"):
        torch.ops.selectra.add_norm(x, None, None, None, 1e-5, False, torch.float32, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("types", TYPES)
def test_gpu_opcheck(types: tuple[Any, ...]) -> None:
    tensors, flags = drawn((3, 5, 24), types, "layer")
    leaves = [None if t is None else t.cuda().requires_grad_() for t in tensors]
    call = prepare(*leaves, **flags)  # pyright: ignore[reportArgumentType]
    torch.library.opcheck(torch.ops.selectra.add_norm.default, (*call, "cuda"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("types", TYPES)
def test_gpu_with_and_without_the_dispatcher(types: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, flags = drawn((3, 5, 24), types, "rms")
    grads = (torch.randn(3, 5, 24), torch.randn(3, 5, 24))
    got = results(_on_gpu, tensors, flags, grads)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(_on_gpu(*tensors, **flags), got, strict=False))
    monkeypatch.setattr(registration, "needs_dispatcher", lambda tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(results(_on_gpu, tensors, flags, grads), got, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_gpu_refusals() -> None:
    wide = torch.zeros(1, cuda.MOST_WIDTH + 1, device="cuda")
    assert "rows of up to" in add_norm.explain(wide)["cuda"]
    assert add_norm.explain(wide[:, :8].double())["cuda"].startswith("it takes float32, bfloat16 and float16")
    assert add_norm.backend_for(wide) == "portable"
    x = torch.zeros(2, 4, device="cuda", requires_grad=True)
    (dx,) = torch.autograd.grad(add_norm(x)[0].sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="a gradient of its gradient"):
        dx.sum().backward()


@pytest.mark.gpu
@needs_gpu
def test_gpu_gradients_are_equal_bit_by_bit() -> None:
    tensors, flags = drawn((5000, 1024), TYPES[1], "rms")
    grads = (torch.randn(5000, 1024), torch.randn(5000, 1024))
    first, second = (results(_on_gpu, tensors, flags, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
