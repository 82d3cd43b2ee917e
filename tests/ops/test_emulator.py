"""The emulated machine itself: what its operations compute, and that it reports what a GPU leaves undefined."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from selectra.ops import cuda
from tests.ops import emulator
from tests.ops.emulator import EmulatedKernel, EmulatorError, emulated
from tests.ops.emulator.fixture import EmulatedGpu, emulated_gpu

__all__ = ["emulated_gpu"]

pytestmark = pytest.mark.skipif(emulator.problem() is not None, reason=str(emulator.problem()))
EXAMPLES = emulator.HERE / "examples.cu"
SHARED_BYTES = 1024
SEEDS = range(1, 7)
watched = pytest.mark.skipif(
    bool(os.environ.get("SELECTRA_EMULATOR_SANITIZE")), reason="sanitizers take the place of the watch"
)


def kernel(name: str, *, seed: int = 0, barrier: bool = True, watched: bool = True) -> EmulatedKernel:
    return emulated(EXAMPLES, {"BARRIER": int(barrier)}, name, SHARED_BYTES, seed, watched)


def run(kernel: EmulatedKernel, x: Tensor, n_out: int, n: int = 0, threads: int = 128, blocks: int = 1) -> Tensor:
    """The output of a kernel that takes (in, out, n)."""
    out = torch.full((n_out,), torch.nan)
    kernel.launch((blocks, 1, 1), threads, [x.data_ptr(), out.data_ptr(), n])
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_warp_sums_by_shuffles(seed: int) -> None:
    x = torch.randn(256)
    sums = run(kernel("warp_sum", seed=seed), x, 8, blocks=2)
    torch.testing.assert_close(sums, x.view(8, 32).sum(1))


def test_a_shuffle_reads_the_lane_it_names_modulo_32() -> None:
    x = torch.randn(64)
    out = run(kernel("permute"), x, 64, n=7, threads=64)
    lanes = (torch.arange(32) * 7 + 3) % 32
    assert torch.equal(out.view(2, 32), x.view(2, 32)[:, lanes])


def cut(x: Tensor) -> np.ndarray:
    """The upper 19 bits of float32 numbers, in float64."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double().numpy()


def test_multiply_add_is_the_product_of_what_tensor_cores_read() -> None:
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    expected = d.double().numpy() + cut(a) @ cut(b)
    uncut = d.double().numpy() + a.double().numpy() @ b.double().numpy()
    kernel("product").launch((1, 1, 1), 32, [a.data_ptr(), b.data_ptr(), d.data_ptr()])
    np.testing.assert_allclose(d.numpy(), expected, rtol=0, atol=2e-6)
    assert np.abs(d.numpy() - uncut).max() > 1e-4


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_a_block_sums_through_shared_memory(seed: int) -> None:
    x = torch.randn(512)
    sums = run(kernel("block_sum", seed=seed), x, 2, n=256, threads=256, blocks=2)
    torch.testing.assert_close(sums, x.view(2, 256).sum(1))


def test_a_drawn_order_shows_a_missing_barrier() -> None:
    x = torch.randn(256)

    def sums(barrier: bool) -> set[float]:
        kernels = [kernel("block_sum", seed=seed, barrier=barrier, watched=False) for seed in SEEDS]
        return {run(each, x, 1, n=256, threads=256).item() for each in kernels}

    assert len(sums(barrier=True)) == 1
    assert len(sums(barrier=False)) > 1


def line_of(text: str) -> int:
    lines = EXAMPLES.read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if text in line)


@watched
@pytest.mark.parametrize("seed", [0, *SEEDS])
@pytest.mark.parametrize(
    ("name", "line"), [("block_sum", "sums[i] += sums[i + half]"), ("warp_exchange", "slots[i] = x")]
)
def test_accesses_in_no_order_are_reported(name: str, line: str, seed: int) -> None:
    x = torch.randn(256)
    run(kernel(name, seed=seed), x, 256, n=256, threads=256)
    with pytest.raises(EmulatorError, match=f"examples.cu:{line_of(line)} .* shared memory, no barrier between"):
        run(kernel(name, seed=seed, barrier=False), x, 256, n=256, threads=256)


@pytest.mark.parametrize("seed", [0, 1])
def test_copies_in_the_background_are_there_after_the_wait_and_not_before(seed: int) -> None:
    x = torch.randn(256)
    out = run(kernel("copy", seed=seed), x, 256, n=128, threads=64)
    assert torch.equal(out.view(2, 128), x.view(2, 128).roll(-2, 1))
    assert run(kernel("copy", seed=seed, barrier=False), x, 256, n=128, threads=64).isnan().all()


@pytest.mark.parametrize("lane", [0, 3, 31])
def test_lanes_that_do_not_come_to_an_operation_are_named(lane: int) -> None:
    x = torch.randn(64)
    here = line_of("x += shuffle_xor(x, 1)")
    with pytest.raises(
        EmulatorError, match=rf"lane {lane} of warp 1 did not .* shuffle_xor \(examples.cu:{here}\): it has returned"
    ):
        run(kernel("divergent_shuffle"), x, 64, n=lane, threads=64)
    with pytest.raises(EmulatorError, match=rf"lane {lane} of warp 1 did not .* multiply_add .* it is at shuffle_xor"):
        run(kernel("mixed_operations"), x, 64, n=lane, threads=64)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_warp_that_does_not_come_to_the_barrier_is_named(seed: int) -> None:
    with pytest.raises(EmulatorError, match=r"warp 2 did not take part in synchronize_block .* it has returned"):
        run(kernel("missing_warp", seed=seed), torch.zeros(1), 128, n=2)


def test_the_machine_works_after_a_failure() -> None:
    x = torch.randn(128)
    with pytest.raises(EmulatorError):
        run(kernel("missing_warp"), x, 128, n=2)
    torch.testing.assert_close(run(kernel("warp_sum"), x, 4), x.view(4, 32).sum(1))


@pytest.mark.parametrize("watch", [True, False])
def test_writes_beyond_the_shared_memory_are_reported(watch: bool) -> None:
    beyond = kernel("write_beyond", watched=watch)
    run(beyond, torch.zeros(1), 1, n=SHARED_BYTES - 1)
    with pytest.raises(EmulatorError, match=f"byte {SHARED_BYTES + 9} of shared memory .* has {SHARED_BYTES} bytes"):
        run(beyond, torch.zeros(1), 1, n=SHARED_BYTES + 9)


@watched
def test_loads_that_are_not_aligned_are_reported() -> None:
    x = torch.arange(12.0)
    assert run(kernel("load_four"), x, 32, n=4, threads=32).unique().item() == 4 + 7
    line = line_of("const float4 four")
    with pytest.raises(EmulatorError, match=f"not aligned .* at examples.cu:{line}"):
        run(kernel("load_four"), x, 32, n=5, threads=32)


@watched
def test_wild_addresses_are_reported() -> None:
    line = line_of("float sum = call.in[i]")
    for _ in range(2):
        with pytest.raises(EmulatorError, match=f"fault at examples.cu:{line}: no memory at address 0x40"):
            kernel("warp_sum").launch((1, 1, 1), 32, [64, 0, 0])


@pytest.mark.parametrize("seed", [0, 1])
def test_every_block_and_thread_knows_its_place(seed: int) -> None:
    out = torch.full((2, 3, 3, 64), torch.nan)
    kernel("coordinates", seed=seed).launch((3, 3, 2), 64, [0, out.data_ptr(), 3])
    z, y, x, thread = torch.meshgrid(*map(torch.arange, out.shape), indexing="ij")
    torch.testing.assert_close(out, z * 1000 + y * 100 + x * 10 + thread / 100)


def hard_numbers() -> Tensor:
    """Every pattern of the upper 16 bits with lower bits around ties, and random patterns: multiples of 32."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    chosen = (upper[:, None] | lower.int()).flatten()
    drawn = torch.randint(-(2**31), 2**31, (2**16,)).int()
    return torch.cat((chosen, drawn)).view(torch.float32)


def test_conversions_have_torchs_bits() -> None:
    x = hard_numbers()
    halves = [torch.zeros(len(x), dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    back = [torch.zeros_like(x) for _ in halves]
    kernel("convert").launch((len(x) // 32, 1, 1), 32, [t.data_ptr() for t in (x, *halves, *back)])
    for half, float32 in zip(halves, back, strict=True):
        expected = x.to(half.dtype)
        known = ~x.isnan()
        assert torch.equal(half.view(torch.int16)[known], expected.view(torch.int16)[known])
        assert torch.equal(float32[known], expected.float()[known])
        # cvt writes one NaN, torch several.
        assert (half.view(torch.int16)[~known] == 0x7FFF).all() and float32[~known].isnan().all()


def test_functions_flush_what_is_too_small() -> None:
    x = torch.tensor(
        [0.0, 0.5, -3.25, -126.0, -126.5, 127.5, 1e-40, -1e-40, 2.0**127, torch.inf, -torch.inf, torch.nan]
    )
    x = torch.cat((x, torch.randn(20)))
    exp2, inverse, square = run(kernel("functions"), x, 96, n=32, threads=32).view(3, 32)
    expected = torch.exp2(x.double())
    torch.testing.assert_close(exp2, torch.where(expected < 2.0**-126, 0, expected).float(), equal_nan=True)
    normal = torch.where(x.abs() < 2.0**-126, 0 * x, x)
    expected = 1 / normal
    torch.testing.assert_close(inverse, torch.where(expected.abs() < 2.0**-126, 0 * expected, expected), equal_nan=True)
    torch.testing.assert_close(square, (x.double() ** 2 + 1).float(), rtol=0, atol=0, equal_nan=True)


def test_thousands_of_operations_take_well_under_a_second() -> None:
    busy = kernel("busy")
    # Of this process alone, whatever else the machine does.
    begun = time.process_time()
    run(busy, torch.zeros(128), 128, n=1000)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("grid", "threads", "words", "message"),
    [
        ((1, 1, 1), 48, 3, "48 threads, a block has 32 to 1024 in whole warps"),
        ((1, 65536, 1), 32, 3, "at most 65535"),
        ((0, 1, 1), 32, 3, "at least 1 block"),
        ((1, 1, 1), 32, 2, "2 words, the kernel's argument 3"),
    ],
)
def test_launches_that_hardware_refuses(grid: tuple[int, int, int], threads: int, words: int, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        kernel("warp_sum").launch(grid, threads, [0] * words)


def test_too_much_shared_memory_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmulatorError, match="232449 bytes of shared memory, a block has at most 232448"):
        kernel("warp_sum")((1, 1, 1), 32, [0, 0, 0], 232449)
    with pytest.raises(EmulatorError, match="has no kernel 'warp_mean'"):
        kernel("warp_mean")
    wrong = tmp_path / "wrong.cu"
    wrong.write_text('#include "warp.cuh"\nKERNEL wrong(const int call) { nothing(); }\n')
    with pytest.raises(EmulatorError, match=r"wrong.cu:2:\d+: error: .*nothing"):
        emulated(wrong, {}, "wrong")


def test_the_stand_in_for_the_runtime_launches_on_cpu_tensors(emulated_gpu: EmulatedGpu) -> None:
    assert cuda.refusal(0) is None
    assert cuda.capability(0) == (9, 0)
    emulated_gpu.seed = 5
    x, out = torch.randn(128), torch.full((4,), torch.nan)
    launched = cuda.kernel(str(EXAMPLES), "warp_sum", (("BARRIER", 1),), 0)
    launched.launch((1, 1, 1), 128, [x.data_ptr(), out.data_ptr(), 0])
    torch.testing.assert_close(out, x.view(4, 32).sum(1))
    assert [each.name for each in emulated_gpu.kernels] == ["warp_sum"]
