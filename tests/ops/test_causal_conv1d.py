"""Every backend of the causal convolution against the float64 reference, and the promises of its registration."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selectra.errors import BackendError, ConfigError
from selectra.ops import causal_conv1d
from tests.ops import cases

N_CASES, BLOCK = 300, 25
FAST = [name for name in causal_conv1d.backends if name != "reference"]


def available(backend: str) -> str:
    """The backend's name where this machine has it; a skip that says why where it does not."""
    reason = causal_conv1d.explain(torch.zeros(1, 1, 1), torch.zeros(1, 2))[backend]
    if reason != "ok":
        pytest.skip(f"{backend}: {reason}")
    return backend


def small(dtype: torch.dtype = torch.float64, batch: int = 2, length: int = 5) -> dict[str, Any]:
    """Arguments with every tensor present."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (batch, length, 6), "weight": (6, 4), "bias": (6,), "initial_state": (batch, 6, 4)}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("first", range(0, N_CASES, BLOCK))
def test_agrees_with_the_reference(first: int) -> None:
    """Every fast backend that runs here; the reference, the slowest of all, runs once for them."""
    x = torch.zeros(1, 1, 1)
    said = causal_conv1d.explain(x, torch.zeros(1, 1))
    backends = [backend for backend in FAST if said[backend] == "ok"]
    assert "portable" in backends
    for seed in range(first, first + BLOCK):
        case = cases.conv_case(seed)
        with causal_conv1d.using("reference"):
            outputs, grads = cases.run(causal_conv1d, case, torch.float64)
        for backend in backends:
            with causal_conv1d.using(backend):
                for dtype, at_most, grads_at_most in (
                    (torch.float64, cases.FLOAT64, 10 * cases.FLOAT64),
                    (torch.float32, cases.FLOAT32_OUTPUT, cases.FLOAT32_GRADIENT),
                ):
                    what = f"case {seed}, {backend}, {dtype}"
                    got, got_grads = cases.run(causal_conv1d, case, dtype)
                    cases.assert_close(got, outputs, at_most, what)
                    cases.assert_close(got_grads, grads, grads_at_most, what)


def test_the_reference_is_pytorchs_own_convolution() -> None:
    a = small()
    with causal_conv1d.using("reference"):
        y = causal_conv1d(a["x"], a["weight"], a["bias"], "silu")
    x = torch.nn.functional.pad(a["x"].transpose(1, 2), (3, 0))
    want = torch.nn.functional.conv1d(x, a["weight"].unsqueeze(1), a["bias"], groups=6)
    torch.testing.assert_close(y, torch.nn.functional.silu(want).transpose(1, 2))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend: str, reverse: bool) -> None:
    available(backend)
    names = list(small())

    def convolve(*values: Tensor) -> Any:
        arguments: Any = dict(zip(names, values, strict=True))
        return causal_conv1d(**arguments, activation="silu", reverse=reverse, return_final_state=True)

    with causal_conv1d.using(backend):
        assert torch.autograd.gradcheck(convolve, tuple(small().values()))


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend: str) -> None:
    available(backend)
    a = small(torch.float32)
    tensors = (a["x"], a["weight"], a["bias"], a["initial_state"], None, None)
    torch.library.opcheck(torch.ops.selectra.causal_conv1d.default, (*tensors, True, False, backend))


@pytest.mark.parametrize("backend", FAST)
def test_chunks_with_carried_state_equal_the_whole(backend: str) -> None:
    available(backend)
    a = small(length=11)
    with causal_conv1d.using(backend):
        whole, last = causal_conv1d(a["x"], a["weight"], a["bias"], "silu", return_final_state=True)
        state, pieces = None, []
        for start, end in ((0, 1), (1, 1), (1, 3), (3, 11)):
            y, state = causal_conv1d(
                a["x"][:, start:end], a["weight"], a["bias"], "silu", initial_state=state, return_final_state=True
            )
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert state is not None
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_autocast_rounds_nothing(backend: str) -> None:
    available(backend)
    a = small(torch.float32)
    with causal_conv1d.using(backend), torch.autocast("cpu", torch.bfloat16):
        got = causal_conv1d(a["x"], a["weight"], a["bias"], "silu")
    with causal_conv1d.using(backend):
        want = causal_conv1d(a["x"], a["weight"], a["bias"], "silu")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.compile
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    available(backend)
    a = small(torch.float32)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return causal_conv1d(x, weight, bias, "silu", return_final_state=True)

    torch._dynamo.reset()
    with causal_conv1d.using(backend):
        want = convolve(a["x"], a["weight"], a["bias"])
        got = torch.compile(convolve, fullgraph=True, backend="aot_eager")(a["x"], a["weight"], a["bias"])
        torch.testing.assert_close(got, want)
        leaves = [a["x"], a["weight"], a["bias"]]
        torch.testing.assert_close(
            torch.autograd.grad(got[0].sum() + got[1].sum(), leaves),
            torch.autograd.grad(want[0].sum() + want[1].sum(), leaves),
        )


def test_vmap_and_second_derivatives_are_refused_in_words() -> None:
    a = small(torch.float32)
    weight = a["weight"].detach()
    with pytest.raises(BackendError, match="move the mapped dimension into b"), causal_conv1d.using("portable"):
        torch.func.vmap(lambda x: causal_conv1d(x, weight))(torch.zeros(2, 1, 5, 6))
    with causal_conv1d.using("portable"):
        (dx,) = torch.autograd.grad(causal_conv1d(a["x"], a["weight"]).sin().sum(), a["x"], create_graph=True)
    with pytest.raises(BackendError, match="only the reference has one"):
        dx.sum().backward()


def test_flops_are_counted() -> None:
    a = small(torch.float32)
    with FlopCounterMode(display=False) as counter, causal_conv1d.using("portable"):
        causal_conv1d(a["x"], a["weight"])
    assert counter.get_total_flops() == 2 * 2 * 5 * 6 * 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\); it must be \(b, l, d\)"),
    ({"weight": torch.zeros(5, 4)}, r"weight has shape \(5, 4\); it must be \(d, k\) with d = 6"),
    ({"bias": torch.zeros(5)}, r"bias has shape \(5,\)"),
    ({"activation": "relu"}, "activation is 'relu'; allowed are 'silu' and None"),
    ({"initial_state": torch.zeros(2, 6, 3)}, r"initial_state has shape \(2, 6, 3\); it must be \(b, d, k\)"),
    ({"weight": torch.zeros(6, 4, dtype=torch.float64)}, "weight is torch.float64 in a call that mixes"),
    ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens was given with b = 2"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {k: v.detach() for k, v in small(torch.float32).items() if k != "initial_state"}
    with pytest.raises(ConfigError, match=message):
        causal_conv1d(**arguments | change)
