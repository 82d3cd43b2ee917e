"""Loading and launching, on a driver that is not there."""

import struct
import threading

import pytest
import torch

from selectra.errors import BackendError
from selectra.ops import cuda
from selectra.ops.cuda import runtime
from tests.ops.cuda.fake_driver import FakeDriver

ONE = (("SCALE", 1),)
INVALID_VALUE = 1


def test_a_launch_is_packed_as_the_driver_reads_it(fake: FakeDriver, source: str) -> None:
    kernel = cuda.kernel(source, "add", ONE, 0)
    assert (kernel.registers, kernel.max_threads, kernel.shared_limit) == (96, 640, 232448)
    for words in ((-1, 2**46), (3, 2**62)):
        kernel.launch((5, 6, 7), 128, words)
        assert fake.launches[-1] == ((5, 6, 7, 128, 1, 1, 0, 0x55), words)
    assert len(kernel._rooms) == 1
    with pytest.raises(struct.error, match="expected 12 items"):
        kernel.launch((1, 1, 1), 128, [1])


def test_launches_inside_of_each_other_keep_their_words(fake: FakeDriver, source: str) -> None:
    kernel = cuda.kernel(source, "add", ONE, 0)
    fake.during_launch = lambda: kernel.launch((2, 1, 1), 32, (3, 4))
    kernel.launch((1, 1, 1), 32, (1, 2))
    assert [words for _, words in fake.launches] == [(3, 4), (1, 2)]


def test_a_kernel_is_loaded_once_for_all_threads(fake: FakeDriver, source: str, compiled: list[str]) -> None:
    found: list[runtime.Kernel] = []
    threads = [threading.Thread(target=lambda: found.append(cuda.kernel(source, "add", ONE, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == len(compiled) == len(fake.modules) == 1
    cuda.kernel(source, "count_shared", ONE, 0)
    assert len(fake.modules) == 1


def test_the_struct_must_have_as_many_words_as_the_kernel_reads(fake: FakeDriver, source: str) -> None:
    fake.n_words = 3
    with pytest.raises(AssertionError):
        cuda.kernel(source, "add", ONE, 0).launch((1, 1, 1), 32, (1, 2))
    assert fake.launches == []


def test_a_thread_without_a_context_gets_the_device_s(fake: FakeDriver, source: str) -> None:
    kernel = cuda.kernel(source, "add", ONE, 0)
    fake.contexts = [None]
    kernel.launch((1, 1, 1), 32, (1, 2))
    assert len(fake.launches) == 1
    assert fake.contexts == [FakeDriver.CONTEXT]


def test_another_device_stays_current(fake: FakeDriver, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    fake.contexts = [0xAA]
    cuda.kernel(source, "add", ONE, 0).launch((1, 1, 1), 32, (1, 2))
    assert len(fake.launches) == 1
    assert fake.contexts == [0xAA]


def test_loading_is_allowed_while_a_graph_is_captured(fake: FakeDriver, source: str) -> None:
    cuda.kernel(source, "add", ONE, 0)
    for name in ("cuModuleLoadData", "cuModuleGetFunction"):
        at = fake.calls.index(name)
        assert fake.calls[at - 1] == fake.calls[at + 1] == "cuThreadExchangeStreamCaptureMode"


def test_shared_memory_is_asked_for_where_it_is_more_than_every_block_has(fake: FakeDriver, source: str) -> None:
    # The same function for calls of several sizes: a later one takes nothing from an earlier one.
    for number in (0, 48 * 1024, 48 * 1024 + 1, 232448, 100_000):
        cuda.kernel(source, "count_shared", ONE, 0, shared_bytes=number)
    assert fake.shared_allowed == [48 * 1024 + 1, 232448]
    with pytest.raises(BackendError, match="add asks for 232449 bytes of shared memory, a block of cuda:0 has 232448"):
        cuda.kernel(source, "add", ONE, 0, shared_bytes=232449)


def test_what_the_driver_refuses_is_said_in_its_words(fake: FakeDriver, source: str) -> None:
    kernel = cuda.kernel(source, "add", ONE, 0)
    fake.outcome = INVALID_VALUE
    with pytest.raises(
        BackendError, match=r"add was not launched: CUDA_ERROR_INVALID_VALUE \(in words\); grid .*of at most 640"
    ):
        kernel.launch((1, 1, 1), 2048, (1, 2))
    with pytest.raises(BackendError, match="cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"):
        cuda.kernel(source, "absent", ONE, 0)
    assert fake.contexts == [FakeDriver.CONTEXT]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ((2**31, 1, 1), "2,147,483,648 blocks along x, of at most 2,147,483,647"),
        ((1, 65_536, 70_000), "65,536 blocks along y, of at most 65,535 and 70,000 blocks along z, of at most 65,535"),
        # Does not even fit into the driver's words.
        ((2**32, 1, 1), "4,294,967,296 blocks along x"),
    ],
)
def test_a_grid_that_no_device_takes_is_named(
    fake: FakeDriver, source: str, grid: tuple[int, int, int], said: str
) -> None:
    kernel = cuda.kernel(source, "add", ONE, 0)
    fake.outcome = INVALID_VALUE
    with pytest.raises(BackendError, match=f"add was not launched: {said}.*; take a smaller batch"):
        kernel.launch(grid, 128, (1, 2))
