"""The cross-scan on the compiled CPU kernels: every build, odd grids, strides, threads, and what is not copied."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selectra.errors import BackendError
from selectra.ops import cross_scan
from selectra.ops.cross_scan import cpu, registration
from selectra.ops.cross_scan.call import prepare
from selectra.ops.native.library import Library
from selectra.train.record import BackendWatch
from tests.ops import cases, cross_calls
from tests.ops.compiled import loaded, needs_library
from tests.ops.cross import ALL, drawn, results, slow

__all__ = ["loaded"]

pytestmark = needs_library
GRIDS = [(1, 1, 9), (2, 9, 1), (1, 1, 1), (2, 7, 5), (1, 13, 1), (1, 5, 19)]


def builds(found: Library) -> list[int]:
    return [build for build, runs in enumerate(found.runs) if runs]


def both(tensors: dict[str, Tensor], dtype: torch.dtype, **flags: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the kernels and what a loop over positions in float64 give."""
    with cross_scan.using("cpu"):
        got = results(cross_scan, tensors, dtype, **flags)
    return got, results(slow, tensors, torch.float64, **flags)


@pytest.mark.parametrize("shape", GRIDS)
def test_every_build_agrees_with_a_loop_over_positions(shape: tuple[int, int, int], loaded: Library) -> None:
    for build in builds(loaded):
        loaded.build = build
        for d, n, gate in ((37, 3, "shared"), (16, 1, None), (5, 17, "own")):
            tensors = drawn(shape, 4, d, n, gate=gate)
            cases.assert_close(*both(tensors, torch.float64), cases.FLOAT64, loaded.isas[build])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_bfloat16_is_rounded_once(merge: bool, shared: bool, loaded: Library) -> None:
    tensors = drawn((2, 5, 7), 4, 19, 3, dtype=torch.bfloat16, shared=shared, gate="shared" if shared else "own")
    for build in builds(loaded):
        loaded.build = build
        with cross_scan.using("cpu"):
            got, want = (results(cross_scan, tensors, dtype, merge=merge) for dtype in (torch.bfloat16, torch.float32))
        for name, value in got.items():
            assert torch.equal(value, want[name].to(value.dtype)), (loaded.isas[build], name)


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_random_calls_on_every_build_agree_with_the_reference(first: int, loaded: Library) -> None:
    threads = torch.get_num_threads()
    try:
        for seed in range(first, first + 30):
            call = cross_calls.draw(seed, builds(loaded))
            for name, error, tolerance in cross_calls.errors(call):
                assert error <= tolerance, f"case {seed}, {loaded.isas[call.build]}, {call.dtype}: {name} {error:.2e}"
    finally:
        torch.set_num_threads(threads)


def test_thread_count_does_not_change_a_bit() -> None:
    tensors, found = drawn((2, 29, 31), 4, 200, 2, gate="shared"), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(cross_scan, tensors, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


class Made(TorchDispatchMode):
    """Bytes of all storages that operators of PyTorch make inside, and the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.kept: list[Tensor] = []
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and note what it made."""
        out = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.kept.append(x)
                self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied(dtype: torch.dtype) -> None:
    shape, d, n = (2, 12, 10), 48, 2
    tensors = {name: x.to(dtype) for name, x in drawn(shape, 4, d, n, gate="shared", plain=True).items()}
    # A crop of a larger grid, and a part of wider channels.
    u = torch.zeros(2, 15, 13, d, dtype=dtype)
    u[:, 1:13, 2:12] = tensors["u"]
    tensors["u"] = u[:, 1:13, 2:12]
    tensors["delta"] = torch.cat([tensors["delta"]] * 2, -1)[..., :d]
    tensors["A"] = tensors["A"].float()
    call = prepare(**tensors, delta_softplus=True)  # pyright: ignore[reportArgumentType]
    with Made() as made:
        y, checkpoints = cpu.forward(call, True)
    assert checkpoints is not None
    positions, size = 2 * 12 * 10, torch.empty(0, dtype=dtype).element_size()
    # Half types have their sum over the routes in float32 beside its rounded result.
    sums = positions * d * (size if dtype == torch.float32 else size + 4)
    own = {x.untyped_storage().data_ptr() for x in (*call.tensors, checkpoints) if x is not None}
    new = {at: nbytes for at, nbytes in made.storages.items() if at not in own}
    assert sum(new.values()) == sums
    with Made() as made:
        grads = cpu.backward(call, torch.ones_like(y), checkpoints)
    wanted = sum(grad.nbytes for grad in grads if grad is not None)
    halves = 0 if dtype == torch.float32 else 2 * positions * d * 4
    new = {at: nbytes for at, nbytes in made.storages.items() if at not in own}
    # The gradient of y that this test makes is the one more.
    assert sum(new.values()) <= wanted + halves + y.nbytes
    assert not any(word in name for name in made.names for word in ("clone", "copy", "contiguous", "flip", "cat"))


def test_addresses_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, Any] = {name: x.float() for name, x in drawn((1, 4, 3), 2, 8, 2).items()}
    said: list[int] = []
    call = Library.call

    def listen(self: Library, function: str, dtype: torch.dtype, words: list[int]) -> None:
        said.extend(words)
        call(self, function, dtype, words)

    monkeypatch.setattr(Library, "call", listen)
    cross_scan(**tensors, routes=("down", "left"), delta_softplus=True)
    for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"):
        assert tensors[name].data_ptr() in said, name


def test_gradients_lie_as_their_tensors_do() -> None:
    tensors = drawn((2, 5, 7), 4, 8, 2, gate="shared")
    first = {name: tensors[name].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for name in ("u", "z")}
    delta = tensors["delta"].movedim(3, 0).contiguous().movedim(0, 3)
    with cross_scan.using("cpu"):
        got = results(cross_scan, tensors | first | {"delta": delta}, torch.float32)
    assert got["u"].stride() == first["u"].stride() and got["delta"].stride() == delta.stride()


def test_it_is_taken_by_itself_and_told() -> None:
    tensors: dict[str, Any] = {name: x.float() for name, x in drawn((1, 2, 3), 4, 6, 2).items()}
    with BackendWatch() as watch:
        cross_scan(**tensors, delta_softplus=True)
    assert watch.noted == {"cross_scan": "cpu"}
    call = prepare(**tensors)
    assert cpu.refuse(call) is None
    on_meta = call._replace(u=call.u.to("meta"))
    assert cpu.refuse(on_meta) == "tensors are on meta, it needs cpu"
    with pytest.raises(BackendError, match="backend 'cpu' is written into this program and a tensor is on meta"):
        registration.KERNELS["cpu"].require(on_meta.tensors)


@pytest.mark.parametrize("gate", ["shared", "own"])
@pytest.mark.parametrize("merge", [True, False])
def test_opcheck(merge: bool, gate: str) -> None:
    a = drawn((1, 2, 3), 4, 6, 2, gate=gate, shared=merge)
    call = prepare(**{name: t.float() for name, t in a.items()}, merge=merge, delta_softplus=True)  # pyright: ignore[reportArgumentType]
    laid = call._replace(
        delta=call.delta.movedim(3, 0).contiguous().movedim(0, 3),
        u=call.u.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4),
    )
    detached = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in laid]
    torch.library.opcheck(torch.ops.selectra.cross_scan.default, (*detached, "cpu", True))


def test_float16_is_computed_in_float32() -> None:
    tensors = drawn((1, 3, 4), 4, 9, 2, dtype=torch.float16, gate="shared")
    got, want = both(tensors, torch.float16)
    cases.assert_close(got, want, 4 * torch.finfo(torch.float16).eps, "float16")


def test_every_route_alone_and_twice() -> None:
    for routes in [(name,) for name in ALL] + [("down", "down", "up")]:
        tensors = drawn((2, 3, 5), len(routes), 4, 2, gate="shared")
        cases.assert_close(*both(tensors, torch.float64, routes=routes), cases.FLOAT64, str(routes))
