"""The selective scan's CUDA kernels on a GPU: `pytest -m gpu`."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import BackendError, ConfigError
from selectra.mixers.s6 import S6
from selectra.ops import selective_scan
from tests.ops import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N_CASES, BLOCK = 300, 50
# CUDA's exp may be off by two units in the last place, and the error of a decay grows along the length.
# The hardware's 2^x is too small in the mean; the memory of slow decays gathers that.
FLOAT32_OUTPUT, FLOAT32_GRADIENT = 4e-6, 1e-5
LONG_OUTPUT, LONG_GRADIENT = 2e-5, 5e-5
ACTIVATIONS = ("u", "delta", "B", "C", "z")
COMPILED_AT_ONCE = 8


def drawn(
    length: int, d: int, n: int = 16, *, batch: int = 2, dtype: torch.dtype = torch.float32, device: str = "cuda"
) -> dict[str, Any]:
    """Leaves of a call."""
    generator = torch.Generator().manual_seed(length + d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {name: normal(batch, length, d) for name in ("u", "delta", "z")}
    tensors |= {name: normal(batch, length, n) for name in ("B", "C")}
    tensors |= {name: normal(d) for name in ("D", "delta_bias")}
    tensors |= {"A": -normal(d, n).exp(), "initial_state": normal(batch, d, n)}
    return {
        name: tensor.to(device, dtype if name in ACTIVATIONS else torch.float32).requires_grad_()
        for name, tensor in tensors.items()
    }


def gradients(tensors: dict[str, Any], op: Callable[..., Any] = selective_scan, **flags: Any) -> tuple[Tensor, ...]:
    """Outputs and gradients of all leaves."""
    y, state = op(**tensors, **{"delta_softplus": True, "return_final_state": True} | flags)
    loss = y.float().square().sum() + state.square().sum()
    return y.detach(), state.detach(), *torch.autograd.grad(loss, list(tensors.values()))


def on_gpu(**arguments: Any) -> Any:
    """The operator with arguments moved to the GPU and results moved back."""
    moved: dict[str, Any] = {k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    y, state = selective_scan(**moved)
    return y.cpu(), state.cpu()


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, N_CASES, BLOCK))
def test_agrees_with_the_reference(first: int) -> None:
    these = [cases.scan_case(seed) for seed in range(first, first + BLOCK)]
    # Kernels are compiled side by side.
    with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        found = list(pool.map(lambda case: cases.run(on_gpu, case, torch.float32), these))
    for seed, (case, (got, got_grads)) in enumerate(zip(these, found, strict=True), first):
        with selective_scan.using("reference"):
            outputs, grads = cases.run(selective_scan, case, torch.float64)
        cases.assert_close(got, outputs, FLOAT32_OUTPUT, f"case {seed}")
        cases.assert_close(got_grads, grads, FLOAT32_GRADIENT, f"case {seed}")


@pytest.mark.parametrize("n", [1, 4, 8, 16, 64, 100])
@pytest.mark.parametrize("length", [1, 31, 4097])
def test_lengths_and_states(n: int, length: int) -> None:
    compare(drawn(length, 72, n))


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("d", [1, 13, 1000])
def test_a_long_sequence(d: int, n: int) -> None:
    compare(drawn(65_537, d, n, batch=1))


def compare(tensors: dict[str, Tensor]) -> None:
    """Outputs and gradients against the portable backend in float64, which agrees with the reference."""
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    names = ("y", "final_state", *tensors)
    with selective_scan.using("portable"):
        want = dict(zip(names, gradients(wide), strict=True))
    with selective_scan.using("cuda"):
        got = dict(zip(names, gradients(tensors), strict=True))
    outputs = {name: want.pop(name) for name in ("y", "final_state")}
    long = tensors["u"].shape[1] > 10_000
    at_most, gradients_at_most = (LONG_OUTPUT, LONG_GRADIENT) if long else (FLOAT32_OUTPUT, FLOAT32_GRADIENT)
    cases.assert_close(got, outputs, at_most, "cuda")
    # The loss is a square: its gradient carries the output's error once more.
    cases.assert_close(got, want, gradients_at_most + at_most, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 16, 64])
def test_gradients_are_equal_bit_by_bit(dtype: torch.dtype, n: int) -> None:
    tensors = drawn(1021, 520, n, dtype=dtype)
    first = gradients(tensors)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(tensors), strict=True))


@pytest.mark.parametrize("n", [1, 16])
def test_streams(n: int) -> None:
    tensors = drawn(8191, 264, n, dtype=torch.bfloat16)
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device at most")
@pytest.mark.parametrize("n", [1, 16])
def test_a_second_device(n: int) -> None:
    first, second = gradients(drawn(513, 72, n)), gradients(drawn(513, 72, n, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))
    tensors = drawn(8, 8)
    with pytest.raises(ConfigError, match="B is on cuda:1, the first argument on cuda:0"):
        selective_scan(**tensors | {"B": tensors["B"].to("cuda:1")})


def resident_bytes() -> int:
    """Memory of this process on the host."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_calls_allocate_nothing_more() -> None:
    tensors = drawn(67, 72)
    for _ in range(100):
        gradients(tensors)
    gc.collect()
    torch.cuda.synchronize()
    before, host = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()), resident_bytes()
    for _ in range(1000):
        gradients(tensors)
    gc.collect()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert resident_bytes() - host < 8 * 2**20


@pytest.mark.parametrize("n", [2, 16])
def test_a_graph_replays_forward_and_backward(n: int) -> None:
    # A shape that no other test has: kernels are compiled and loaded while the graph is captured.
    tensors = drawn(77, 40, n)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(tensors)
    other = {name: tensor.detach() for name, tensor in drawn(78, 40, n).items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(other[name][:, :77] if name in ACTIVATIONS else other[name])
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, gradients(tensors), strict=True):
        assert torch.equal(a, b)


def mixer() -> S6:
    """A whole Mamba block."""
    torch.manual_seed(0)
    return S6(64).to("cuda")


def test_a_graph_replays_a_mixer() -> None:
    model = mixer()
    x = torch.randn(2, 50, 64, device="cuda")
    leaves = [x.requires_grad_(), *model.parameters()]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
        want = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.compile
def test_a_mixer_compiles_without_graph_breaks() -> None:
    model = mixer()
    x = torch.randn(2, 50, 64, device="cuda", requires_grad=True)
    leaves = [x, *model.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            want, got = model(x), compiled(x)
        at_most = 1e-4 if dtype is None else 3e-2
        torch.testing.assert_close(got, want, rtol=at_most, atol=at_most)
        want_grads = torch.autograd.grad(want.float().square().mean(), leaves)
        got_grads = torch.autograd.grad(got.float().square().mean(), leaves)
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=at_most, atol=at_most * b.abs().max().item())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [3, 16])
def test_opcheck(packed: bool, n: int) -> None:
    a = drawn(9, 6, n, batch=1)
    cu_seqlens = torch.tensor([0, 2, 2, 9], dtype=torch.int32, device="cuda") if packed else None
    # Along the time, so that results lie in memory as inputs do.
    u = a["u"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    state = torch.randn(3 if packed else 1, 6, n, device="cuda", requires_grad=True)
    B, C = (a[name].detach().unsqueeze(2).requires_grad_() for name in ("B", "C"))
    tensors = (u, a["delta"], a["A"], B, C, a["D"], a["z"], a["delta_bias"], state, None, cu_seqlens)
    torch.library.opcheck(
        torch.ops.selectra.selective_scan.default, (*tensors, True, False, torch.float32, "cuda", True)
    )


def test_autocast_rounds_nothing() -> None:
    tensors = drawn(33, 24)
    want = gradients(tensors)
    with torch.autocast("cuda", torch.bfloat16):
        got = gradients(tensors)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_decay_that_is_not_finite_is_told_at_the_next_call() -> None:
    tensors: dict[str, Any] = {name: tensor.detach() for name, tensor in drawn(5, 6).items()}
    good = tensors["A"].clone()
    tensors["A"][3, 1] = -float("inf")
    y = selective_scan(**tensors, delta_softplus=True)
    torch.cuda.synchronize()
    assert y[..., 3].isnan().all()
    with pytest.raises(BackendError, match="A held infinite or not-a-number values in an earlier call"):
        selective_scan(**tensors | {"A": good}, delta_softplus=True)
    assert selective_scan(**tensors | {"A": good}, delta_softplus=True).isfinite().all()


def test_bad_input_is_refused_in_words() -> None:
    a: dict[str, Any] = {name: tensor.detach() for name, tensor in drawn(5, 6).items()}
    with pytest.raises(ConfigError, match="delta is on cpu, the first argument on cuda:0; move them to one device"):
        selective_scan(**a | {"delta": a["delta"].cpu()})
    double: dict[str, Any] = {name: tensor.double() for name, tensor in a.items()}
    assert selective_scan.explain(**double)["cuda"] == "it takes float32, bfloat16 and float16, not torch.float64"
    assert selective_scan.backend_for(**double) == "portable"
    many: dict[str, Any] = a | {name: torch.zeros(2, 5, 257, device="cuda") for name in ("B", "C")}
    many |= {"A": -torch.ones(6, 257, device="cuda"), "initial_state": None}
    assert selective_scan.explain(**many)["cuda"] == "it takes up to 256 states, not 257"
    with selective_scan.using("cuda"), pytest.raises(BackendError, match="cannot take this call: it takes up to 256"):
        selective_scan(**many)


FIRST_USE = """
import time
import torch
from selectra.ops import selective_scan
u = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
B = torch.randn(2, 64, 16, device="cuda", dtype=torch.bfloat16)
A = -torch.rand(64, 16, device="cuda")
torch.cuda.synchronize()
begun = time.perf_counter()
y = selective_scan(u, u, A, B, B, z=u, delta_softplus=True)
y.float().sum().backward()
torch.cuda.synchronize()
assert selective_scan.backend_for(u, u, A, B, B) == "cuda" and u.grad.isfinite().all()
print(time.perf_counter() - begun)
"""


def test_first_and_second_use_without_a_toolkit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "LD_LIBRARY_PATH", "NVCC_APPEND_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    folders = [folder for folder in environment["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    environment |= {"PATH": os.pathsep.join(folders), "SELECTRA_CACHE": str(tmp_path)}
    seconds = []
    for _ in range(2):
        done = subprocess.run(
            (sys.executable, "-c", FIRST_USE), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    with capsys.disabled():
        print(f"\nfirst use {seconds[0]:.2f} s, second {seconds[1]:.3f} s")  # noqa: T201
    assert len(list(tmp_path.rglob("*.cubin"))) == 3
    assert seconds[1] < 1 < 5 * seconds[0] < 100
