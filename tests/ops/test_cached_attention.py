"""Attention of one query to a cache: against a softmax in float64, on an emulated device and a real one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.mixers import CausalAttention
from selectra.ops import cached_attention
from selectra.ops.cached_attention import cuda as host
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {F32: 3e-6, BF16: 8e-3, F16: 1e-3}


def drawn(dtype: torch.dtype, batch: int, *sizes: int) -> list[Tensor]:
    """Queries, keys and values; what no row has used is no number."""
    room, heads, shared, d_head = sizes
    torch.manual_seed(room)
    q, keys, values = torch.randn(batch, heads, d_head), *torch.randn(2, batch, room, shared, d_head)
    return [2 * q.to(dtype), keys.to(dtype), values.to(dtype)]


def wanted(q: Tensor, keys: Tensor, values: Tensor, n: Tensor) -> Tensor:
    group = q.shape[1] // keys.shape[2]
    rows = []
    for row, count in enumerate(n.tolist()):
        k, v = (x[row, :count].double().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("hp,mhp->hm", q[row].double(), k) * q.shape[2] ** -0.5
        rows.append(torch.einsum("hm,mhp->hp", scores.softmax(1), v))
    return torch.stack(rows)


def compare(call: Any, counts: tuple[int, ...], *sizes: int, dtype: torch.dtype = F32) -> None:
    n = torch.tensor(counts)
    q, keys, values = drawn(dtype, len(counts), *sizes)
    truth = wanted(q, keys, values, n)
    for row, count in enumerate(counts):
        keys[row, count:], values[row, count:] = float("nan"), float("nan")
    found = call(q, keys, values, n)
    assert found.dtype == dtype
    error = ((found.double() - truth).abs().max() / truth.abs().max()).item()
    assert error <= CLOSE[dtype], f"off by {error:.1e}"


@pytest.fixture(autouse=True)
def _forget_kernels():
    host.kernels.cache_clear()
    yield
    host.kernels.cache_clear()


@pytest.mark.parametrize(
    ("counts", "sizes", "dtype"),
    [
        # room, query heads, heads of keys, width of a head
        ((1, 70), (70, 4, 2, 32), F32),
        ((37,), (40, 3, 3, 64), F32),
        ((5, 16, 33), (35, 4, 1, 64), BF16),
        ((50,), (64, 8, 2, 128), BF16),
        ((9, 8), (9, 2, 2, 64), F16),
    ],
)
def test_it_is_a_softmax_over_what_is_there(emulated_gpu: EmulatedGpu, counts, sizes, dtype) -> None:
    compare(cached_attention.attend, counts, *sizes, dtype=dtype)


def test_order_of_threads_and_number_of_parts(emulated_gpu: EmulatedGpu) -> None:
    for emulated_gpu.seed, emulated_gpu.multiprocessors in ((1, 1), (2, 9)):
        host.kernels.cache_clear()
        compare(cached_attention.attend, (40, 3), 41, 4, 2, 32)


def test_what_it_does_not_take() -> None:
    q, keys, values = drawn(F32, 1, 4, 4, 2, 32)
    assert not cached_attention.takes(q, keys, values, torch.tensor([4]))


@pytest.mark.parametrize(("rows", "fits"), [(65_535, True), (65_536, False)])
def test_more_rows_than_a_grid_has_are_not_taken(rows: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "needs_dispatcher", lambda tensors: False)
    monkeypatch.setattr(host.cuda, "refusal", lambda index: None)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    q, keys = torch.zeros(1, 1, 32).expand(rows, 1, 32), torch.zeros(1, 1, 1, 32).repeat(rows, 1, 1, 1)
    with torch.no_grad():
        assert cached_attention.takes(q, keys, keys, torch.ones(rows, dtype=torch.int64)) == fits


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    def call(*tensors: Tensor) -> Tensor:
        moved = [tensor.cuda() for tensor in tensors]
        assert cached_attention.takes(*moved)
        return cached_attention.attend(*moved).cpu()

    for counts, *sizes in (((1, 4000, 77), 5000, 32, 8, 64), ((20000,), 20001, 8, 8, 64), ((900, 3), 1000, 8, 2, 128)):
        compare(call, counts, *sizes, dtype=dtype)


@pytest.mark.gpu
@needs_gpu
def test_a_step_of_attention_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = CausalAttention(256, 4, 2, rotary_base=1e4).cuda()
    x = torch.randn(2, 30, 256, device="cuda")
    whole, state, taken = mixer(x), mixer.init_state(2, 30), []
    attend = cached_attention.attend
    monkeypatch.setattr(cached_attention, "attend", lambda *tensors: taken.append(1) or attend(*tensors))
    found = torch.cat([mixer.step_(x[:, :20], state), *(mixer.step_(x[:, t : t + 1], state) for t in range(20, 30))], 1)
    assert len(taken) == 10
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()
