"""Mamba-2's recurrence: every backend against the loop in float64, the kernels on an emulated device and a real one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import BackendError, ConfigError
from selectra.ops.ssd import chunks, cuda, portable, ssd
from selectra.ops.ssd.call import prepare
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
NAMES = ("x", "dt", "A", "B", "C", "initial_state")
Run = Callable[..., tuple[Tensor, Tensor]]


class _Emulated(torch.autograd.Function):
    """Past the dispatcher, which takes no CPU tensor for this backend."""

    @staticmethod
    def forward(ctx: Any, sequence: Tensor | None, *tensors: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, first = tensors
        ctx.call = prepare(*inputs, initial_state=first, sequence=sequence)  # pyright: ignore[reportArgumentType]
        return cuda.forward(ctx.call)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = cuda.backward(ctx.call, *grads)
        return (None, *(None if x is None else g.to(x.dtype) for x, g in zip(ctx.call.tensors, found, strict=True)))


def _emulated(inputs: list[Tensor | None], sequence: Tensor | None) -> Any:
    return _Emulated.apply(sequence, *inputs)


def _dispatched(backend: str) -> Any:
    def run(inputs: list[Tensor | None], sequence: Tensor | None) -> tuple[Tensor, Tensor]:
        *given, first = inputs
        with ssd.using(backend):
            return ssd(*given, initial_state=first, sequence=sequence)  # pyright: ignore[reportArgumentType]

    return run


def _on_gpu(inputs: list[Tensor | None], sequence: Tensor | None) -> tuple[Tensor, Tensor]:
    *given, first = (None if x is None else x.cuda() for x in inputs)
    with ssd.using("cuda"):
        found = ssd(*given, initial_state=first, sequence=None if sequence is None else sequence.cuda())  # pyright: ignore[reportArgumentType]
    return found[0].cpu(), found[1].cpu()


@pytest.fixture(params=["emulated", GPU])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The `cuda` backend on CPU tensors."""
    if request.param == "cuda":
        return _on_gpu
    request.getfixturevalue("emulated_gpu")
    return _emulated


def drawn(
    batch: int, length: int, heads: int, groups: int, p: int, n: int, dtype: torch.dtype, first: bool = True
) -> list[Tensor | None]:
    """Arguments of a call: steps that remember some ten positions."""
    double = dtype if dtype == F64 else F32
    return [
        torch.randn(batch, length, heads, p).to(dtype),
        torch.rand(batch, length, heads, dtype=double) * 0.3,
        -torch.rand(heads, dtype=double) - 0.1,
        torch.randn(batch, length, groups, n).to(dtype),
        torch.randn(batch, length, groups, n).to(dtype),
        torch.randn(batch, heads, p, n, dtype=double) if first else None,
    ]


def results(run: Any, inputs: list[Tensor | None], sequence: Tensor | None, grads: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = run(leaves, sequence)
    given = [(name, x) for name, x in zip(NAMES, leaves, strict=True) if x is not None]
    found = torch.autograd.grad(outputs, [x for _, x in given], [g.to(o) for g, o in zip(grads, outputs, strict=True)])
    return dict(zip(("y", "state", *(name for name, _ in given)), (*outputs, *found), strict=True))


def compare(run: Any, inputs: list[Tensor | None], sequence: Tensor | None = None, close: float = 2e-6) -> None:
    """Hold a backend to the loop in float64: all results by their norms."""
    x, B = inputs[0], inputs[3]
    assert x is not None and B is not None
    state = x.shape[0], *x.shape[2:], B.shape[3]
    grads = [torch.randn(x.shape, dtype=F64), torch.randn(state, dtype=F64)]
    got = results(run, inputs, sequence, grads)
    doubles = [None if tensor is None else tensor.double() for tensor in inputs]
    want = results(_dispatched("reference"), doubles, sequence, grads)
    for name, true in want.items():
        error = ((got[name].double() - true).norm() / true.norm().clamp_min(1e-30)).item()
        # "not" for the sake of not-a-number.
        assert error <= close, f"{name}: off by {error:.1e} of the norm, allowed {close:.1e}"


def packed(batch: int, length: int, sizes: tuple[int, ...]) -> Tensor:
    """Sequences of these lengths, over and over, each row begun at another place."""
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rounds = -(-(length + batch) // len(index))
    many = torch.cat([index + k * len(sizes) for k in range(rounds)])
    return torch.stack([many[row : row + length] for row in range(batch)])


SHAPES = [
    # batch, length, heads, groups, p, n
    (2, 7, 2, 1, 4, 4),
    (1, 65, 3, 1, 8, 5),
    (2, 200, 4, 2, 4, 8),
    (1, 130, 2, 2, 2, 70),
    (2, 64, 6, 1, 2, 2),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [True, False])
def test_portable_agrees_with_the_loop(shape: tuple[int, ...], first: bool) -> None:
    compare(_dispatched("portable"), drawn(*shape, F64, first=first), close=1e-12)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_portable_agrees_on_packed_sequences() -> None:
    sequence = packed(2, 200, (1, 3, 60, 2, 64, 130))
    compare(_dispatched("portable"), drawn(2, 200, 4, 2, 3, 5, F64), sequence, close=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_the_loop(kernels: Any, shape: tuple[int, ...]) -> None:
    compare(kernels, drawn(*shape, F32))  # pyright: ignore[reportCallIssue, reportArgumentType]
    # Factors of products have 8 bits.
    compare(kernels, drawn(*shape, BF16, first=False), close=6e-3)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_kernels_agree_on_packed_sequences(kernels: Any) -> None:
    compare(kernels, drawn(2, 150, 4, 2, 4, 5, F32), packed(2, 150, (1, 3, 60, 2, 64, 130)))
    compare(kernels, drawn(1, 140, 2, 1, 2, 66, F32), packed(1, 140, (130, 9)))


def test_chunks_are_taken_in_slabs(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "ROOM", 2 * 2 * 64 * 64 * 4)
    compare(kernels, drawn(1, 300, 2, 1, 4, 4, F32))
    compare(_dispatched("portable"), drawn(1, 300, 2, 1, 4, 4, F64), close=1e-12)


def test_a_group_of_heads_is_shared_by_blocks(emulated_gpu: EmulatedGpu) -> None:
    for emulated_gpu.multiprocessors in (1, 64):
        compare(_emulated, drawn(1, 20, 6, 1, 2, 4, F32))


def test_strong_decays_are_zero_not_infinite(kernels: Any) -> None:
    inputs = drawn(1, 130, 2, 1, 4, 4, F32)
    assert inputs[1] is not None
    inputs[1] = inputs[1] * 50
    # Steps are large, and so are rounded exponents.
    compare(kernels, inputs, close=1e-4)


def test_slices_are_read_right(kernels: Any) -> None:
    x, dt, A, *_ = drawn(2, 70, 2, 1, 4, 4, F32)
    wide = torch.randn(2, 70, 1, 19)
    compare(kernels, [x, dt, A, wide[..., 3:7], wide[..., 8:12], torch.randn(2, 3, 4, 4)[:, 1:]])


def test_numbers_may_be_repeated_by_strides(kernels: Any) -> None:
    """As retention's steps and a sum's gradient are."""
    inputs = [x for x in drawn(2, 64, 2, 1, 4, 4, F32, first=False)[:5] if x is not None]
    inputs[1] = torch.full((1, 1, 1), 0.1).expand(2, 64, 2)
    found, wanted = (
        torch.autograd.grad(run([*leaves, None], None)[0].sum(), leaves)
        for run, leaves in (
            (kernels, [x.detach().requires_grad_() for x in inputs]),
            (_dispatched("reference"), [x.double().requires_grad_() for x in inputs]),
        )
    )
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_one_position_and_none(backend: str) -> None:
    run = _dispatched(backend)
    one = drawn(3, 1, 4, 2, 3, 5, F64)
    compare(run, one, close=1e-12)
    with torch.no_grad():
        assert torch.allclose(run(one, None)[0], _dispatched("reference")(one, None)[0])
    empty = drawn(2, 0, 2, 1, 3, 4, F32)
    y, state = run(empty, None)
    assert y.shape == (2, 0, 2, 3) and torch.equal(state, empty[5])  # pyright: ignore[reportArgumentType]


def test_as_an_operator_of_pytorch() -> None:
    call = prepare(*[x for x in drawn(1, 9, 2, 1, 2, 3, F64)[:5] if x is not None])
    leaves = [None if x is None else x.requires_grad_() for x in call]
    torch.library.opcheck(torch.ops.selectra.ssd.default, (*leaves, "portable"))
    # A batch of sequences that no chunk's length divides.
    odd = prepare(*[x for x in drawn(2, 70, 2, 1, 2, 3, F32)[:5] if x is not None])
    torch.library.opcheck(torch.ops.selectra.ssd.default, (*odd, "portable"))
    given = [x for x in leaves[:5] if x is not None]
    assert torch.autograd.gradcheck(lambda *given: torch.ops.selectra.ssd(*given, None, None, "portable"), given)


def test_its_own_backward_has_no_other() -> None:
    x, *rest = (None if t is None else t.requires_grad_() for t in drawn(1, 9, 2, 1, 2, 3, F64, first=False)[:5])
    assert x is not None
    with pytest.raises(BackendError, match="gradient of its gradient"):
        (grad,) = torch.autograd.grad(ssd(x, *rest)[0].sum(), x, create_graph=True)  # pyright: ignore[reportArgumentType]
        torch.autograd.grad(grad.sum(), x)
    with ssd.using("reference"):
        (grad,) = torch.autograd.grad(ssd(x, *rest)[0].square().sum(), x, create_graph=True)  # pyright: ignore[reportArgumentType]
        torch.autograd.grad(grad.sum(), x)


def test_refusals() -> None:
    x, dt, A, B, C, first = drawn(1, 3, 2, 1, 4, 4, F32)
    assert x is not None and dt is not None and A is not None and B is not None and C is not None and first is not None
    with pytest.raises(BackendError, match="tensors are on cpu, it needs cuda"), ssd.using("cuda"):
        ssd(x, dt, A, B, C)
    with pytest.raises(ConfigError, match=r"initial_state has shape .* it must be \(b, h, p, n\)"):
        ssd(x, dt, A, B, C, initial_state=first[:, :1])
    with pytest.raises(ConfigError, match="sequence has shape"):
        ssd(x, dt, A, B, C, sequence=torch.zeros(1, 2, dtype=torch.int64))
    assert portable.chunk_length(prepare(x, dt, A, B, C)) == 3
