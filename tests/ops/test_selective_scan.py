"""Every backend of the selective scan against the float64 reference, and the promises of its registration."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selectra.errors import BackendError, ConfigError
from selectra.ops import selective_scan
from tests.ops import cases

N_CASES, BLOCK = 500, 25
FAST = [name for name in selective_scan.backends if name != "reference"]


def available(backend: str) -> str:
    """The backend's name where this machine has it; a skip that says why where it does not."""
    u = torch.zeros(1, 1, 1)
    reason = selective_scan.explain(u, u, -torch.ones(1, 1), u, u)[backend]
    if reason != "ok":
        pytest.skip(f"{backend}: {reason}")
    return backend


def small(dtype: torch.dtype = torch.float64, batch: int = 2, length: int = 5) -> dict[str, Any]:
    """Arguments with every tensor present."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    d, n = 6, 3
    arguments = {name: normal(batch, length, d) for name in ("u", "delta", "z")}
    arguments |= {name: normal(batch, length, 2, n) for name in ("B", "C")}
    arguments |= {name: normal(d) for name in ("D", "delta_bias")}
    arguments["A"] = (-normal(d, n).exp()).detach().requires_grad_()
    arguments["initial_state"] = normal(batch, d, n)
    return arguments


@pytest.mark.parametrize("first", range(0, N_CASES, BLOCK))
def test_agrees_with_the_reference(first: int) -> None:
    """Every fast backend that runs here; the reference, the slowest of all, runs once for them."""
    x = torch.zeros(1, 1, 1)
    said = selective_scan.explain(x, x, -torch.ones(1, 1), x, x)
    backends = [backend for backend in FAST if said[backend] == "ok"]
    assert "portable" in backends
    for seed in range(first, first + BLOCK):
        case = cases.scan_case(seed)
        with selective_scan.using("reference"):
            outputs, grads = cases.run(selective_scan, case, torch.float64)
        for backend in backends:
            with selective_scan.using(backend):
                for dtype, at_most, grads_at_most in (
                    (torch.float64, cases.FLOAT64, 10 * cases.FLOAT64),
                    (torch.float32, cases.FLOAT32_OUTPUT, cases.FLOAT32_GRADIENT),
                ):
                    what = f"case {seed}, {backend}, {dtype}"
                    got, got_grads = cases.run(selective_scan, case, dtype)
                    cases.assert_close(got, outputs, at_most, what)
                    cases.assert_close(got_grads, grads, grads_at_most, what)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend: str, reverse: bool) -> None:
    available(backend)
    names = list(small())

    def scan(*values: Tensor) -> Any:
        arguments: dict[str, Any] = dict(zip(names, values, strict=True))
        return selective_scan(**arguments, delta_softplus=True, reverse=reverse, return_final_state=True)

    with selective_scan.using(backend):
        assert torch.autograd.gradcheck(scan, tuple(small().values()))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend: str, packed: bool) -> None:
    available(backend)
    a = small(torch.float32, batch=1 if packed else 2)
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32) if packed else None
    state = torch.randn(3 if packed else 2, 6, 3, requires_grad=True)
    tensors = (*(a[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), state, None, cu_seqlens)
    torch.library.opcheck(
        torch.ops.selectra.selective_scan.default, (*tensors, True, False, torch.float32, backend, True)
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    available(backend)
    low: dict[str, Any] = {name: value.detach().to(dtype) for name, value in small(torch.float32).items()}
    with selective_scan.using(backend):
        y, state = selective_scan(**low, delta_softplus=True, return_final_state=True)
        wide, want = selective_scan(
            **{name: value.float() for name, value in low.items()}, delta_softplus=True, return_final_state=True
        )
    assert y.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(y, wide.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(state, want, rtol=0, atol=0)
    with selective_scan.using(backend):
        assert selective_scan(**low, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_autocast_rounds_nothing(backend: str) -> None:
    available(backend)
    arguments = small(torch.float32)
    with selective_scan.using(backend):
        want = selective_scan(**arguments, delta_softplus=True)
        want_grads = torch.autograd.grad(want.sum(), list(arguments.values()))
        with torch.autocast("cpu", torch.bfloat16):
            got = selective_scan(**arguments, delta_softplus=True)
            got_grads = torch.autograd.grad(got.sum(), list(arguments.values()))
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FAST)
def test_chunks_with_carried_state_equal_the_whole(backend: str) -> None:
    available(backend)
    arguments = small(length=23)
    by_position = {"u", "delta", "z", "B", "C"}
    leaves = list(arguments.values())
    with selective_scan.using(backend):
        whole, last = selective_scan(**arguments, delta_softplus=True, return_final_state=True)
        state, pieces = arguments["initial_state"], []
        for start, end in ((0, 1), (1, 1), (1, 9), (9, 23)):
            piece: dict[str, Any] = {k: v[:, start:end] if k in by_position else v for k, v in arguments.items()}
            y, state = selective_scan(**piece | {"initial_state": state}, delta_softplus=True, return_final_state=True)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(whole.sum() + last.sum(), leaves)
    got = torch.autograd.grad(sum(y.sum() for y in pieces) + state.sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.compile
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    available(backend)
    arguments = small(torch.float32)

    def scan(**kwargs: Any) -> Any:
        return selective_scan(**kwargs, delta_softplus=True, return_final_state=True)

    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    with selective_scan.using(backend):
        want, got = scan(**arguments), compiled(**arguments)
        leaves = list(arguments.values())
        want_grads = torch.autograd.grad(want[0].sum() + want[1].sum(), leaves)
        got_grads = torch.autograd.grad(got[0].sum() + got[1].sum(), leaves)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FAST)
def test_the_backward_keeps_the_choice_of_the_forward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    available(backend)
    from selectra.ops.selective_scan import registration

    ran: list[str] = []
    for name, kernel in registration.KERNELS.items():

        def spy(*args: Any, _name: str = name, _kernel: registration.Kernel = kernel) -> Any:
            ran.append(_name)
            return _kernel.backward(*args)

        monkeypatch.setitem(registration.KERNELS, name, kernel._replace(backward=spy))
    arguments = small(torch.float32)
    with selective_scan.using(backend):
        y = selective_scan(**arguments)
    y.sum().backward()
    assert ran == [backend]


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from selectra.ops.selective_scan import registration

    saved: list[bool] = []
    kernel = registration.KERNELS["portable"]

    def spy(call: Any, save: bool) -> Any:
        saved.append(save)
        return kernel.forward(call, save)

    monkeypatch.setitem(registration.KERNELS, "portable", kernel._replace(forward=spy))
    arguments = small(torch.float32)
    with selective_scan.using("portable"):
        selective_scan(**{k: v.detach() for k, v in arguments.items()})
        with torch.no_grad():
            selective_scan(**arguments)
        selective_scan(**arguments)
    assert saved == [False, False, True]


def test_vmap_is_refused_in_words() -> None:
    a: dict[str, Any] = {k: v.detach() for k, v in small(torch.float32).items() if k in ("u", "delta", "A", "B", "C")}
    with pytest.raises(BackendError, match="move the mapped dimension into b"), selective_scan.using("portable"):
        torch.func.vmap(lambda u: selective_scan(**a | {"u": u}))(torch.stack([a["u"], a["u"]]))


def test_second_derivatives_are_refused_in_words_and_the_reference_has_them() -> None:
    arguments = small()
    with selective_scan.using("portable"):
        (du,) = torch.autograd.grad(selective_scan(**arguments).sin().sum(), arguments["u"], create_graph=True)
    with pytest.raises(BackendError, match="only the reference has one"):
        du.sum().backward()
    with selective_scan.using("reference"):
        (du,) = torch.autograd.grad(selective_scan(**arguments).sin().sum(), arguments["u"], create_graph=True)
    du.sum().backward()


def test_flops_are_counted() -> None:
    a = {k: v for k, v in small(torch.float32).items() if k in ("u", "delta", "A", "B", "C")}
    with FlopCounterMode(display=False) as counter, selective_scan.using("portable"):
        y = selective_scan(**a)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 9 * 2 * 5 * 6 * 3
    assert counter.get_total_flops() == 4 * forward


def test_under_fake_tensors_shapes_are_known() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        a: dict[str, Any] = {k: mode.from_tensor(v.detach()) for k, v in small(torch.float32).items()}
        y, state = selective_scan(**a, out_dtype=torch.bfloat16, return_final_state=True)
    assert y.shape == (2, 5, 6) and y.dtype == torch.bfloat16
    assert state.shape == (2, 6, 3) and state.dtype == torch.float32


BAD: list[tuple[dict[str, Any], str]] = [
    ({"u": torch.zeros(2, 5)}, r"u has shape \(2, 5\); it must be \(b, l, d\)"),
    ({"delta": torch.zeros(2, 4, 6)}, r"delta has shape \(2, 4, 6\); it must be \(b, l, d\) = \(2, 5, 6\)"),
    ({"A": torch.zeros(5, 3)}, r"A has shape \(5, 3\); it must be \(d, n\) with d = 6"),
    ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "A is torch.complex64; complex values are not supported"),
    ({"B": torch.zeros(2, 5, 4, 3)}, "B has 4 groups; they must divide d = 6"),
    ({"B": torch.zeros(2, 5, 7)}, r"B has shape \(2, 5, 7\); it must be \(b, l, n\) = \(2, 5, 3\)"),
    ({"B": torch.zeros(2, 5, 3)}, "both need the same groups"),
    ({"D": torch.zeros(5)}, r"D has shape \(5,\)"),
    ({"z": torch.zeros(2, 5, 6, dtype=torch.float64)}, "z is torch.float64 in a call that mixes"),
    ({"u": torch.zeros(2, 5, 6, dtype=torch.int64)}, "u is torch.int64; allowed are float32"),
    ({"mask": torch.ones(2, 5)}, "mask is torch.float32; it must be bool"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\)"),
    ({"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "mask is on meta, the first argument on cpu"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is torch.int64; it must be int32"),
    ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens was given with b = 2"),
    ({"initial_state": torch.zeros(1, 6, 3)}, r"initial_state has shape \(1, 6, 3\); it must be \(b, d, n\)"),
    ({"out_dtype": torch.int32}, "out_dtype is torch.int32"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {k: v.detach() for k, v in small(torch.float32).items() if k != "initial_state"}
    with pytest.raises(ConfigError, match=message):
        selective_scan(**arguments | change)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize(
    ("borders", "message"),
    [([0, 4], "must run from 0 to the length 5"), ([1, 5], "runs from 1 to 5"), ([0, 4, 3, 5], "falls from 4 to 3")],
)
def test_bad_borders_are_named(backend: str, borders: list[int], message: str) -> None:
    available(backend)
    arguments: dict[str, Any] = {
        k: v.detach() for k, v in small(torch.float32, batch=1).items() if k != "initial_state"
    }
    with selective_scan.using(backend), pytest.raises(ConfigError, match=message):
        selective_scan(**arguments, cu_seqlens=torch.tensor(borders, dtype=torch.int32))


def test_mask_with_packed_sequences_is_refused() -> None:
    arguments: dict[str, Any] = {
        k: v.detach() for k, v in small(torch.float32, batch=1).items() if k != "initial_state"
    }
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ConfigError, match="pass one of them"):
        selective_scan(**arguments, cu_seqlens=cu_seqlens, mask=torch.ones(1, 5, dtype=torch.bool))


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_an_instant_decay_passes_the_state_on_where_absent(backend: str) -> None:
    u = torch.ones(1, 3, 1, requires_grad=True)
    A = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    B, state = torch.ones(1, 3, 2), torch.tensor([[[2.0, 3.0]]])
    with selective_scan.using(backend):
        absent = torch.zeros(1, 3, dtype=torch.bool)
        _, final = selective_scan(u, u, A, B, B, initial_state=state, mask=absent, return_final_state=True)
        torch.testing.assert_close(final, state, rtol=0, atol=0)
        for gradient in torch.autograd.grad(final.sum(), [u, A]):
            assert not gradient.any()
        mask = torch.tensor([[True, False, False]])
        _, final = selective_scan(u, u, A, B, B, initial_state=state, mask=mask, return_final_state=True)
    torch.testing.assert_close(final, torch.tensor([[[1.0, 1 + 3 * math.exp(-1)]]]))


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_softplus_is_exact_in_float64(backend: str) -> None:
    available(backend)
    # With one position, B = C = u = 1 and no state before it, y is the step.
    steps = torch.tensor([-30.0, -1.0, 0.0, 19.9, 20.1, 22.0, 39.9, 40.1, 800.0], dtype=torch.float64)
    delta = steps.reshape(1, 1, -1).requires_grad_()
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    with selective_scan.using(backend):
        y = selective_scan(one.expand_as(delta), delta, -one[0].expand(len(steps), 1), one, one, delta_softplus=True)
    torch.testing.assert_close(y[0, 0], torch.logaddexp(steps, torch.zeros_like(steps)), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), delta)
    torch.testing.assert_close(gradient[0, 0], torch.sigmoid(steps), rtol=1e-14, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(37, 16, 64, 16), (5, 40, 1024, 16)])
def test_the_portable_chunks_do_not_grow_with_the_batch(
    shape: tuple[int, ...], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selectra.ops.selective_scan import chunks

    largest = 0
    take = chunks.Workspace.take

    def spy(self: chunks.Workspace, name: str, shape: tuple[int, ...]) -> Any:
        nonlocal largest
        largest = max(largest, math.prod(shape))
        return take(self, name, shape)

    monkeypatch.setattr(chunks.Workspace, "take", spy)
    batch, length, d, n = shape
    rows, columns = (1, batch * length) if packed else (batch, length)
    flags: dict[str, Any] = {"cu_seqlens": torch.arange(0, columns + 1, length, dtype=torch.int32)} if packed else {}
    normal = torch.Generator().manual_seed(0)
    u, B = (torch.randn(rows, columns, k, generator=normal).requires_grad_() for k in (d, n))
    A = -torch.rand(d, n, generator=normal)
    with selective_scan.using("portable"):
        y = selective_scan(u, u, A, B, B, delta_softplus=True, **flags)
    got = torch.autograd.grad(y.sum(), [u, B])
    assert 0 < largest <= max(chunks.CPU_CHUNK_STATES, chunks.SHORTEST_CHUNK * d * n)
    with selective_scan.using("reference"):
        wide = [x.detach().double().requires_grad_() for x in (u, B)]
        want = selective_scan(wide[0], wide[0], A.double(), wide[1], wide[1], delta_softplus=True, **flags)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, torch.autograd.grad(want.sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", FAST)
def test_no_gradient_is_made_for_what_the_forward_keeps(backend: str) -> None:
    available(backend)
    a = small(torch.float32)
    tensors = [a[k] for k in ("u", "delta", "A", "B", "C")]
    y, _, kept = torch.ops.selectra.selective_scan(*tensors, *[None] * 6, True, False, torch.float32, backend, True)
    assert kept.numel() and y.requires_grad and not kept.requires_grad
