"""Loading and launching on a GPU: `pytest -m gpu`."""

import threading
from typing import Any

import pytest
import torch

from selectra.errors import BackendError
from selectra.ops import cuda
from selectra.ops.cuda import cache, runtime
from tests.ops.cuda.process import kept, new_process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ONE = (("SCALE", 1),)
N = 1000
# About half a millisecond: long enough for a launch on another stream to overtake.
CYCLES = 1_000_000


def add(source: str, x: torch.Tensor, defines: tuple[tuple[str, str | int], ...] = ONE) -> None:
    """Add SCALE to every element, on the current stream."""
    kernel = cuda.kernel(source, "add", defines, x.get_device())
    kernel.launch((-(-x.numel() // 256), 1, 1), 256, (x.numel(), x.data_ptr()))


def test_the_device_is_taken(source: str) -> None:
    assert cuda.status().available
    assert cuda.refusal(0) is None
    assert cuda.multiprocessors(0) > 0
    x = torch.zeros(N, device="cuda")
    add(source, x)
    assert torch.equal(x.cpu(), torch.ones(N))
    kernel = cuda.kernel(source, "add", ONE, 0)
    assert kernel.registers > 0
    assert kernel.parameter_bytes in (None, 16)


def test_a_kernel_from_the_disk_runs_as_one_just_compiled(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(N, device="cuda")
    add(source, x)
    (file,) = kept()
    new_process(monkeypatch)
    monkeypatch.setattr(runtime, "compile_unit", None)
    add(source, x)
    assert torch.equal(x.cpu(), torch.full((N,), 2.0))
    assert cache.count() == 1
    assert file.is_file()


def test_launches_keep_to_the_current_stream(source: str) -> None:
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    xs = [torch.zeros(N, device="cuda") for _ in streams]
    # Loaded before, since loading may wait for the device.
    add(source, torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
    for stream, x in zip(streams, xs, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            x.fill_(1.0)
            add(source, x)
            x.mul_(2.0)
    torch.cuda.synchronize()
    for x in xs:
        assert torch.equal(x.cpu(), torch.full((N,), 4.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_second_device_is_launched_on_without_being_current(source: str) -> None:
    xs = [torch.zeros(N, device=f"cuda:{index}") for index in (0, 1)]
    for _ in range(2):
        for x in xs:
            add(source, x)
        assert torch.cuda.current_device() == 0
    for x in xs:
        assert torch.equal(x.cpu(), torch.full((N,), 2.0))
    with torch.cuda.device(1):
        add(source, xs[0])
        add(source, xs[1])
        assert torch.cuda.current_device() == 1
    for x in xs:
        assert torch.equal(x.cpu(), torch.full((N,), 3.0))


@pytest.mark.parametrize("loaded", [True, False])
def test_any_thread_may_launch(source: str, loaded: bool) -> None:
    x = torch.zeros(N, device="cuda")
    if loaded:
        add(source, x)
        x.zero_()
    torch.cuda.synchronize()
    faults: list[BaseException] = []

    def work() -> None:
        try:
            # The first call of CUDA in this thread.
            add(source, x)
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert faults == []
    assert torch.equal(x.cpu(), torch.ones(N))


def test_threads_may_launch_at_once(source: str) -> None:
    xs = [torch.zeros(N, device="cuda") for _ in range(4)]

    def work(x: torch.Tensor) -> None:
        for _ in range(500):
            add(source, x)

    threads = [threading.Thread(target=work, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for x in xs:
        assert torch.equal(x.cpu(), torch.full((N,), 500.0))


def test_the_backward_s_thread_may_launch(source: str) -> None:
    threads: list[int] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            threads.append(threading.get_ident())
            grad = grads[0].clone()
            add(source, grad)
            return grad

    x = torch.zeros(N, device="cuda", requires_grad=True)
    Twice.apply(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.cpu(), torch.full((N,), 2.0))
    assert threads[0] != threading.get_ident()


@pytest.mark.parametrize("loaded", [True, False])
def test_launches_are_captured(source: str, loaded: bool) -> None:
    x = torch.zeros(N, device="cuda")
    if loaded:
        add(source, x)
        x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(source, x)
        add(source, x, (("SCALE", 10),))
    assert torch.equal(x.cpu(), torch.zeros(N))
    for _ in range(3):
        graph.replay()
    assert torch.equal(x.cpu(), torch.full((N,), 33.0))


def test_all_shared_memory_of_a_block_can_be_used(source: str) -> None:
    limit = cuda.shared_limit(0)
    assert limit > 48 * 1024
    out = torch.zeros(1, device="cuda")
    kernel = cuda.kernel(source, "count_shared", ONE, 0, shared_bytes=limit)
    kernel.launch((1, 1, 1), 256, (limit // 4, out.data_ptr()))
    assert out.item() == limit // 4


def test_a_launch_that_cannot_be_is_refused_and_harms_nothing(source: str) -> None:
    x = torch.zeros(N, device="cuda")
    kernel = cuda.kernel(source, "add", ONE, 0)
    with pytest.raises(BackendError, match=r"add was not launched: CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((1, 1, 1), 2048, (N, x.data_ptr()))
    with pytest.raises(BackendError, match=r"cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"):
        cuda.kernel(source, "absent", ONE, 0)
    add(source, x)
    assert torch.equal(x.cpu(), torch.ones(N))


@pytest.mark.compile
def test_a_refusal_is_asked_for_in_a_compiled_function() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def taken(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if cuda.refusal(x.device.index) is None else x

    assert taken(torch.zeros((), device="cuda")) == 1
