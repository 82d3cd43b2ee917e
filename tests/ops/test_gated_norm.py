"""Skip, gate and norm behind Mamba-2's scan: kernels emulated and on a device against the plain form in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selectra.errors import BackendError, ConfigError
from selectra.ops.gated_norm import cuda, gated_norm
from selectra.ops.gated_norm.call import prepare
from selectra.train.record import BackendWatch
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# By norms: half a unit in the last place on average, and float32 sums.
CLOSE = {F32: 3e-6, BF16: 3e-3, F16: 4e-4}
NAMES = ("y", "z", "weight", "x", "D")


def _emulated(*tensors: Any, **flags: Any) -> Tensor:
    return cuda.run(prepare(*tensors, **flags))


def _on_gpu(*tensors: Any, **flags: Any) -> Tensor:
    with gated_norm.using("cuda"):
        return gated_norm(*(None if x is None else x.cuda() for x in tensors), **flags).cpu()  # pyright: ignore[reportArgumentType]


@pytest.fixture(params=["emulated", GPU])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The kernels on CPU tensors."""
    if request.param == "cuda":
        return _on_gpu
    request.getfixturevalue("emulated_gpu")
    return _emulated


def drawn(shape: tuple[int, ...], dtype: torch.dtype, heads: int | None) -> list[Tensor | None]:
    """Tensors of a call; x and z are parts of wider ones, as projections give them."""
    d = shape[-1]
    wide = torch.randn(*shape[:-1], 2 * d + 8).to(dtype)
    skip = [None, None] if heads is None else [wide[..., d + 8 :], torch.randn(heads)]
    return [torch.randn(shape), wide[..., :d], torch.rand(d) + 0.5, *skip]


def results(run: Any, tensors: list[Tensor | None], dout: Tensor, **flags: Any) -> dict[str, Tensor]:
    """The result and all gradients."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = run(*leaves, **flags)
    given = {name: x for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    return {"out": out, **dict(zip(given, torch.autograd.grad(out, list(given.values()), dout.to(out)), strict=True))}


def compare(run: Any, tensors: list[Tensor | None], **flags: Any) -> None:
    """Hold kernels to the plain form in float64."""
    z = tensors[1]
    assert z is not None
    dout = torch.randn(z.shape).to(z.dtype)
    got = results(run, tensors, dout, **flags)
    with gated_norm.using("portable"):
        want = results(gated_norm, [None if x is None else x.double() for x in tensors], dout, **flags)
    assert got["out"].dtype == z.dtype
    for name, true in want.items():
        close = CLOSE[z.dtype] if name in ("out", "z", "x") else CLOSE[F32]
        error = ((got[name].double() - true).norm() / true.norm().clamp_min(1e-30)).item()
        assert error <= close, f"{name}: off by {error:.1e} of the norm, allowed {close:.1e}"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("shape", "heads", "groups"), [((3, 5, 48), 3, 1), ((7, 30), None, 2), ((2, 3, 1536), 24, 1), ((4, 21), 7, 3)]
)
def test_kernels_agree_with_the_plain_form(
    kernels: Any, shape: tuple[int, ...], heads: int | None, groups: int, dtype: torch.dtype
) -> None:
    compare(kernels, drawn(shape, dtype, heads), n_groups=groups)


def test_wide_rows_and_many(kernels: Any) -> None:
    compare(kernels, drawn((2, 4096), BF16, 2))
    compare(kernels, drawn((300, 8), F32, 4), n_groups=2, eps=0.1)


def test_gradients_are_equal_bit_by_bit(emulated_gpu: EmulatedGpu) -> None:
    tensors, dout = drawn((40, 96), F32, 4), torch.randn(40, 96)
    found = []
    for emulated_gpu.seed in (0, 1, 2):
        found.append(results(_emulated, tensors, dout))
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in each)


def test_refusals() -> None:
    y, z, weight, x, D = drawn((2, 12), F32, 3)
    assert y is not None and z is not None and weight is not None
    with pytest.raises(ConfigError, match="d a multiple of n_groups=5"):
        gated_norm(y, z, weight, n_groups=5)
    with pytest.raises(ConfigError, match="x and D were not both given"):
        gated_norm(y, z, weight, x)
    with pytest.raises(ConfigError, match="h a divisor of the 12 channels"):
        gated_norm(y, z, weight, x, torch.ones(5))
    with pytest.raises(BackendError, match="tensors are on cpu, it needs cuda"), gated_norm.using("cuda"):
        gated_norm(y, z, weight, x, D)


class _Mode(TorchDispatchMode):
    """Any mode that changes what runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_kernels_stay_where_a_record_looks_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a training is looked at, and must round as the others do."""
    monkeypatch.setattr(cuda.cuda, "refusal", lambda index: None)
    tensors = (torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), None, None)
    y = SimpleNamespace(is_cuda=True, dtype=F32, numel=lambda: 8, device=SimpleNamespace(index=0))
    call: Any = SimpleNamespace(y=y, z=tensors[1], x=None, n_groups=1, tensors=tensors)
    assert cuda.refuse(call) is None
    with BackendWatch():
        assert cuda.refuse(call) is None
    with _Mode():
        assert "a mode" in str(cuda.refuse(call))
