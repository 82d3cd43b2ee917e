"""What is the compiled library's own: its builds, threads and fork."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.ops.causal_conv1d import cpu as conv
from selectra.ops.native.library import LIBRARY_VARIABLE, Library
from selectra.ops.selective_scan import cpu as scan
from tests.ops import cpu_calls
from tests.ops.compiled import (
    RUN_A_SCAN,
    loaded,
    needs_library,
    run_python,
)

__all__ = ["loaded"]

# A kernel starts as many threads as there are 100000 vector operations for: here enough for five.
LARGE: dict[str, Any] = {"batch": 4, "length": 1000, "d": 1100}
# Where a call holds the number of threads, as in call.h.
THREADS_WORD = {"scan_forward": 7, "scan_backward": 7, "conv_forward": 6, "conv_backward": 6}


def scan_results(
    dtype: torch.dtype, batch: int = 3, length: int = 75, d: int = 134, groups: int = 2, reverse: bool = False
) -> list[Tensor]:
    """Outputs and all gradients of a scan with every optional argument."""
    torch.manual_seed(0)
    n = 7
    shape = (batch, length, d)
    u, delta, z, dy = (torch.randn(shape, dtype=dtype) for _ in range(4))
    A = -torch.rand(d, n, dtype=dtype)
    B, C = (torch.randn(batch, length, groups, n, dtype=dtype) for _ in range(2))
    D, bias = (torch.randn(d, dtype=dtype) for _ in range(2))
    initial, dfinal = (torch.randn(batch, d, n, dtype=dtype) for _ in range(2))
    inputs = (u, delta, A, B, C, D, z, bias, initial, None, None, True, reverse)
    y, final, checkpoints = scan.forward(*inputs, dtype, True)
    return [y, final, *scan.backward(dy, dfinal, checkpoints, *inputs)]


def conv_results(dtype: torch.dtype, batch: int = 3, length: int = 75, d: int = 134) -> list[Tensor]:
    """Outputs and all gradients of a convolution with every optional argument."""
    torch.manual_seed(0)
    width = 4
    x, dy = (torch.randn(batch, length, d, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(d, width, dtype=dtype), torch.randn(d, dtype=dtype)
    initial, dfinal = (torch.randn(batch, d, width, dtype=dtype) for _ in range(2))
    inputs = (x, weight, bias, initial, None, None, True, False)
    return [*conv.forward(*inputs), *conv.backward(dy, dfinal, *inputs)]


@needs_library
@pytest.mark.parametrize("results", [scan_results, conv_results])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_builds_agree(results, dtype: torch.dtype, tolerance: float, loaded: Library) -> None:
    loaded.build = 0
    expected = results(dtype)
    for build, runs in enumerate(loaded.runs):
        if runs:
            loaded.build = build
            for got, want in zip(results(dtype), expected, strict=True):
                assert (got - want).abs().max() <= tolerance * want.abs().max(), loaded.isas[build]


@needs_library
@pytest.mark.parametrize("results", [scan_results, conv_results])
def test_thread_count_does_not_change_a_bit(results) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(torch.float32, **LARGE))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_library
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or not Path("/proc/self/smaps").is_file(),
    reason="needs a system with large pages",
)
def test_large_results_ask_for_large_pages(loaded: Library) -> None:
    tensor = loaded.room((1 << 23,), torch.float32)
    middle, inside, flags = tensor.data_ptr() + tensor.nbytes // 2, False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line.split()
    assert "hg" in flags


@needs_library
@pytest.mark.parametrize(("numbers", "asked"), [(1 << 19, True), ((1 << 19) - 1, False)])
def test_only_results_as_large_as_a_large_page_ask(
    numbers: int, asked: bool, loaded: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the system says of a small one's memory proves nothing: it may lie where a large one lay before.
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(loaded, "_large_pages", lambda address, size: calls.append((address, size)))
    tensor = loaded.room((numbers,), torch.float32, zeros=True)
    assert calls == ([(tensor.data_ptr(), 4 * numbers)] if asked else [])
    assert not tensor.any()


# One block of channels in every build: the threads that there are share it by time alone.
ONE_BLOCK: dict[str, Any] = {"batch": 1, "length": 9000, "d": 4, "groups": 1}


@needs_library
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("pieces", [2, 7, 10**6])
def test_pieces_of_time_agree_with_the_whole(pieces: int, reverse: bool, loaded: Library) -> None:
    sizes: dict[str, Any] = {"batch": 2, "length": 1003, "d": 38, "reverse": reverse}
    for build in (build for build, runs in enumerate(loaded.runs) if runs):
        loaded.build = build
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
            whole = scan_results(dtype, **sizes)
            with cpu_calls.in_pieces(pieces):
                found = scan_results(dtype, **sizes)
            for i, (got, want) in enumerate(zip(found, whole, strict=True)):
                assert (got - want).abs().max() <= tolerance * want.abs().max(), (loaded.isas[build], dtype, i)


@needs_library
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores or more"
)
def test_threads_without_tasks_cut_time_and_the_same_way_every_time() -> None:
    with cpu_calls.in_pieces(2):
        expected = scan_results(torch.float32, **ONE_BLOCK)
    threads, whole = torch.get_num_threads(), scan_results(torch.float32, **ONE_BLOCK)
    try:
        torch.set_num_threads(2)
        found = [scan_results(torch.float32, **ONE_BLOCK) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    for results in found:
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))
    assert not all(torch.equal(got, want) for got, want in zip(whole, expected, strict=True))


@needs_library
def test_slow_decays_over_many_pieces_do_not_drift() -> None:
    torch.manual_seed(0)
    length, d, n = 40_000, 8, 2
    u, B = torch.randn(1, length, d), torch.randn(1, length, 1, n)
    delta, A, initial = torch.rand(1, length, d) / 500, -torch.rand(d, n) / 10, torch.randn(1, d, n)

    def final(dtype: torch.dtype) -> Tensor:
        a, b, c, e, h = (tensor.to(dtype) for tensor in (u, delta, A, B, initial))
        return scan.forward(a, b, c, e, e, None, None, None, h, None, None, False, False, dtype, False)[1].double()

    exact = final(torch.float64)
    with cpu_calls.in_pieces(16):
        assert (final(torch.float32) - exact).abs().max() < 3e-6 * exact.abs().max()


# A kernel, the threads that it may use, and the cores of its process.
STARTS = [*((kernel, 2, 2) for kernel in THREADS_WORD), ("conv_forward", 16, 1), ("conv_forward", 16, 2)]


@pytest.fixture(scope="module")
def started() -> dict[tuple[str, int, int], int]:
    """How many threads each of `STARTS` starts, in a process of its own, since threads stay."""
    code = f"""
import os
from pathlib import Path
import torch
from tests.ops import test_native
from selectra.ops.native.library import Library
torch.set_num_threads(1)
def started(kernel, wanted, cores):
    def call(self, function, dtype, words, run=Library.call):
        words[test_native.THREADS_WORD[function]] = wanted if function == kernel else 1
        before = len(list(Path("/proc/self/task").iterdir()))
        run(self, function, dtype, words)
        if function == kernel:
            print(kernel, wanted, cores, len(list(Path("/proc/self/task").iterdir())) - before, flush=True)
    Library.call = call
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    results = test_native.scan_results if kernel.startswith("scan") else test_native.conv_results
    results(torch.float32, **test_native.LARGE)
for each in {STARTS}:
    child = os.fork()
    if child == 0:
        started(*each)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, each
"""
    lines = [line.split() for line in run_python(code, where=Path(__file__).parents[2]).splitlines()]
    return {(kernel, int(wanted), int(cores)): int(count) for kernel, wanted, cores, count in lines}


needs_two_cores = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or len(os.sched_getaffinity(0)) < 2,
    reason="threads are counted in /proc, on two cores or more",
)


@needs_library
@needs_two_cores
@pytest.mark.parametrize("kernel", THREADS_WORD)
def test_every_kernel_starts_threads_at_the_sizes_at_which_they_are_compared(
    kernel: str, started: dict[tuple[str, int, int], int]
) -> None:
    assert started[kernel, 2, 2] == 1


@needs_library
@needs_two_cores
@pytest.mark.parametrize("cores", [1, 2])
def test_no_more_threads_run_than_the_process_has_cores(cores: int, started: dict[tuple[str, int, int], int]) -> None:
    assert started["conv_forward", 16, cores] == cores - 1


@needs_library
def test_exact_where_nothing_decays_and_where_all_does() -> None:
    u = torch.randn(1, 40, 20)
    initial = torch.randn(1, 20, 3)
    zeros, B = torch.zeros(1, 40, 20), torch.randn(1, 40, 1, 3)

    def final(u: Tensor, delta: Tensor, A: Tensor) -> Tensor:
        optional = (None, None, None, initial, None, None)
        return scan.forward(u, delta, A, B, B, *optional, False, False, torch.float32, False)[1]

    assert torch.equal(final(u, zeros, -torch.ones(20, 3)), initial)
    assert final(zeros, zeros + 1e4, -torch.ones(20, 3)).abs().max() < 1e-30
    assert not final(zeros, zeros + 1e4, torch.ones(20, 3)).isnan().any()


@needs_library
def test_borders_outside_the_sequence_are_refused() -> None:
    u = torch.randn(1, 8, 4)
    B = torch.randn(1, 8, 1, 2)
    for borders in ([0, 9], [0, 5, 3, 8], [1, 8]):
        cu_seqlens = torch.tensor(borders, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens must begin with 0"):
            optional = (None, None, None, None, None, cu_seqlens)
            scan.forward(u, u.abs(), -torch.ones(4, 2), B, B, *optional, False, False, torch.float32, False)


@needs_library
def test_calls_from_several_threads_at_once_agree() -> None:
    # Of the library's own pool one call has the threads, the others do their tasks themselves.
    torch.manual_seed(0)
    u, delta = torch.randn(4, 1000, 512), torch.rand(4, 1000, 512)
    B = torch.randn(4, 1000, 1, 8)
    inputs = (u, delta, -torch.rand(512, 8), B, B, None, None, None, None, None, None, True, False)

    def run(_: int = 0) -> list[Tensor]:
        y, final, checkpoints = scan.forward(*inputs, torch.float32, True)
        return [y, final, *scan.backward(y, final, checkpoints, *inputs)]

    threads, expected = torch.get_num_threads(), run()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(3) as executor:
            for found in executor.map(run, range(6)):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_scan() -> None:
    # Large enough for a second thread. The child compares through numpy, since torch's own threads do not survive a
    # fork, and the alarm ends it if it hangs.
    code = f"""{RUN_A_SCAN}
import os, signal
torch.set_num_threads(2)
u, delta, B, C = (torch.rand(8, 512, width) for width in (512, 512, 16, 16))
A = -torch.ones(512, 16)
before = scan()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if (scan().numpy() == before.numpy()).all() and status().threads == 1 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(code).strip() == "0"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs CMake and a compiler")
def test_a_build_without_openmp_runs_on_its_own_threads(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    configure = ["cmake", "-S", str(root), "-B", str(tmp_path), "-DSELECTRA_OPENMP=OFF", "-DSELECTRA_QUICK=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "--parallel", "2"], check=True, capture_output=True)
    built = next(tmp_path.glob("libselectra_cpu.*"))
    assert b"GOMP_parallel" not in built.read_bytes()
    these = "a_forked_child or thread_count or several_threads or starts_threads or no_more_threads"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", these]
    environment = {**os.environ, LIBRARY_VARIABLE: str(built)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


@needs_library
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_calls_on_every_build_agree_with_the_reference(first: int, loaded: Library) -> None:
    threads, builds = torch.get_num_threads(), [build for build, runs in enumerate(loaded.runs) if runs]
    try:
        for seed in range(first, first + 50):
            drawn = cpu_calls.draw(seed, builds)
            for name, error, tolerance in cpu_calls.errors(drawn):
                assert error <= tolerance, f"case {seed}, {loaded.isas[drawn.build]}, {drawn.dtype}: {name} {error:.2e}"
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("channels_first", [False, True])
def test_bfloat16_is_read_and_written_as_float32_is_rounded(loaded: Library, channels_first: bool) -> None:
    torch.manual_seed(0)
    shape, n, groups = (2, 37, 38), 5, 2
    u, delta, z, dy = (torch.randn(shape).bfloat16() for _ in range(4))
    if channels_first:
        u, delta, z, dy = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (u, delta, z, dy))
    A, D, bias = -torch.rand(38, n), torch.randn(38), torch.randn(38)
    B, C = (torch.randn(2, 37, groups, n).bfloat16() for _ in range(2))
    initial, dfinal = torch.randn(2, 38, n), torch.randn(2, 38, n)
    mask = torch.rand(2, 37) < 0.8

    def results(cast) -> list[Tensor]:
        wide = [cast(tensor) for tensor in (u, delta, B, C, z, dy)]
        inputs = (wide[0], wide[1], A, wide[2], wide[3], D, wide[4], bias, initial, mask, None, True, False)
        y, final, checkpoints = scan.forward(*inputs, wide[0].dtype, True)
        conv_inputs = (wide[0], D[:, None] * torch.ones(4), bias, None, mask, None, True, True)
        convolved, last = conv.forward(*conv_inputs)
        backs = (*scan.backward(wide[5], dfinal, checkpoints, *inputs), *conv.backward(wide[5], last, *conv_inputs))
        return [y, final, convolved, *backs]

    for build, runs in enumerate(loaded.runs):
        if not runs:
            continue
        loaded.build = build
        for got, want in zip(results(lambda x: x), results(Tensor.float), strict=True):
            assert torch.equal(got, want.to(got.dtype)), loaded.isas[build]
