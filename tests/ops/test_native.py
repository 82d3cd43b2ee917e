"""What is the compiled library's own: its builds, how it is found and refused, threads and fork."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selectra.ops import native
from selectra.ops.causal_conv1d import cpu as conv
from selectra.ops.native.library import ISA_VARIABLE, LIBRARY_VARIABLE, Library, library
from selectra.ops.selective_scan import cpu as scan

needs_library = pytest.mark.skipif(not native.status().available, reason=f"{native.status().problem}")

SAY_STATUS = "from selectra.ops.native import status; print(status())"
RUN_A_SCAN = """
import torch
from selectra.ops.native import status
from selectra.ops.selective_scan import selective_scan
u, delta, B, C = torch.randn(4, 64, 256), torch.rand(4, 64, 256), torch.randn(4, 64, 16), torch.randn(4, 64, 16)
A = -torch.ones(256, 16)
def scan():
    return selective_scan(u, delta, A, B, C)
"""


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def library_path() -> Path:
    path = native.status().path
    assert path is not None
    return Path(path)


@pytest.fixture
def loaded() -> Iterator[Library]:
    """The library; the build in use is put back afterwards."""
    found = library()
    build = found.build
    yield found
    found.build = build


def scan_results(dtype: torch.dtype, length: int = 75) -> list[Tensor]:
    """Outputs and all gradients of a scan with every optional argument."""
    torch.manual_seed(0)
    batch, groups, d, n = 3, 2, 134, 7
    shape = (batch, length, d)
    u, delta, z, dy = (torch.randn(shape, dtype=dtype) for _ in range(4))
    A = -torch.rand(d, n, dtype=dtype)
    B, C = (torch.randn(batch, length, groups, n, dtype=dtype) for _ in range(2))
    D, bias = (torch.randn(d, dtype=dtype) for _ in range(2))
    initial, dfinal = (torch.randn(batch, d, n, dtype=dtype) for _ in range(2))
    inputs = (u, delta, A, B, C, D, z, bias, initial, None, None, True, False)
    y, final, checkpoints = scan.forward(*inputs, dtype, True)
    return [y, final, *scan.backward(dy, dfinal, checkpoints, *inputs)]


def conv_results(dtype: torch.dtype) -> list[Tensor]:
    """Outputs and all gradients of a convolution with every optional argument."""
    torch.manual_seed(0)
    batch, length, d, width = 3, 75, 134, 4
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
@pytest.mark.parametrize("results", [lambda dtype: scan_results(dtype, length=600), conv_results])
def test_thread_count_does_not_change_a_bit(results) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(torch.float32)
        torch.set_num_threads(2)
        two = results(torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


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


def test_a_missing_library_is_said_in_words(tmp_path: Path) -> None:
    said = run_python(SAY_STATUS, **{LIBRARY_VARIABLE: str(tmp_path / "none.so")})
    assert "available=False" in said
    assert "there is no file" in said


def test_without_a_library_calls_still_run(tmp_path: Path) -> None:
    code = f"{RUN_A_SCAN}\nscan(); print('ran')"
    assert "ran" in run_python(code, **{LIBRARY_VARIABLE: str(tmp_path / "none.so")})


@needs_library
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_damaged_library_is_said_in_words(tmp_path: Path, kept: float) -> None:
    whole = library_path().read_bytes()
    damaged = tmp_path / "libselectra_cpu.so"
    damaged.write_bytes(whole[: int(kept * len(whole))])
    said = run_python(SAY_STATUS, **{LIBRARY_VARIABLE: str(damaged)})
    assert "available=False" in said
    assert "damaged" in said or "cannot be loaded" in said


def test_a_foreign_library_is_said_in_words() -> None:
    foreign = Path(torch.__path__[0]) / "lib" / "libc10.so"
    if not foreign.is_file():
        pytest.skip("torch has no libc10.so on this platform")
    said = run_python(SAY_STATUS, **{LIBRARY_VARIABLE: str(foreign)})
    assert "is not Selectra's library" in said


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_of_another_version_is_said_in_words(tmp_path: Path) -> None:
    source, other = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int selectra_cpu_abi_version(void) { return 99; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    assert "interface version 99" in run_python(SAY_STATUS, **{LIBRARY_VARIABLE: str(other)})


@needs_library
def test_an_instruction_set_can_be_forced() -> None:
    assert "isa='baseline'" in run_python(SAY_STATUS, **{ISA_VARIABLE: "baseline"})


@needs_library
def test_an_unknown_instruction_set_is_said_in_words() -> None:
    said = run_python(SAY_STATUS, **{ISA_VARIABLE: "baselin"})
    assert "available=False" in said
    assert "Did you mean 'baseline'?" in said


@needs_library
def test_an_instruction_set_beyond_the_processor_is_said_in_words() -> None:
    code = (
        "from selectra.ops.native import library as native\n"
        "found = native.library()\n"
        "found.runs = (True, *[False] * (len(found.isas) - 1))\n"
        "print(native._choose_isa(found, found.isas[-1]))"
    )
    if len(library().isas) == 1:
        pytest.skip("the library has one build on this platform")
    assert "is not supported by this processor; it runs baseline." in run_python(code)


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_scan() -> None:
    # The child compares through numpy, since torch's own threads do not survive a fork, and ends by alarm if it hangs.
    code = f"""{RUN_A_SCAN}
import os, signal
torch.set_num_threads(2)
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
def test_a_build_without_openmp_runs_on_one_thread(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    configure = ["cmake", "-S", str(root), "-B", str(tmp_path), "-DSELECTRA_OPENMP=OFF", "-DSELECTRA_QUICK=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    built = next(tmp_path.glob("libselectra_cpu.*"))
    code = f"{RUN_A_SCAN}\nscan(); print(status())"
    said = run_python(code, **{LIBRARY_VARIABLE: str(built)})
    assert "available=True" in said
    assert "threads=1" in said
