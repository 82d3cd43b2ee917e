"""causal_conv1d by its names: values and gradients against a loop, states, packed sequences, three generations."""

# pyright: reportMissingImports=false

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from tests.compat.references import assert_same, convolve, random

pytestmark = pytest.mark.usefixtures("installed")


def conv_inputs(b: int, d: int, l: int, k: int) -> dict[str, Any]:
    """Random arguments in float64."""
    return {"x": random(b, d, l, seed=1), "weight": random(d, k, seed=2), "bias": random(d, seed=3)}


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("sizes", [(2, 3, 7, 4), (1, 5, 2, 3), (3, 1, 1, 2)])
def test_convolution_by_call(sizes: tuple[int, int, int, int], activation: str | None) -> None:
    from causal_conv1d import causal_conv1d_fn

    def loop(**inputs: Any) -> Tensor:
        return convolve(**inputs, silu=activation is not None)

    assert_same(lambda **inputs: causal_conv1d_fn(**inputs, activation=activation), loop, conv_inputs(*sizes))
    # As the package of 2023 was called.
    old = lambda x, weight, bias: causal_conv1d_fn(x, weight, bias, activation)  # noqa: E731
    assert_same(old, loop, conv_inputs(*sizes))


@pytest.mark.parametrize("length", [1, 5])
def test_states_before_and_after(length: int) -> None:
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_ref

    inputs = {**conv_inputs(2, 3, length, 4), "before": random(2, 3, 3, seed=4)}

    def loop(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Any:
        return convolve(x, weight, bias, before), torch.cat([before, x], -1)[..., -3:]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Any:
        return causal_conv1d_fn(x, weight, bias, None, before, True, activation="silu")

    def by_reference(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Any:
        return causal_conv1d_ref(x, weight, bias, before, True, activation="silu")

    assert_same(ours, loop, inputs)
    assert_same(by_reference, loop, inputs)
    place = torch.empty(2, 3, 3, dtype=torch.float64)
    x, weight, bias, before = inputs.values()
    assert causal_conv1d_fn(x, weight, bias, None, before, True, place)[1] is place
    torch.testing.assert_close(place, torch.cat([before, x], -1)[..., -3:])


def test_packed_sequences() -> None:
    from causal_conv1d import causal_conv1d_fn

    idx = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1], [5, 5, 5, 5, 7, 7, 7, 9]], dtype=torch.int32)

    def ours(**inputs: Any) -> Tensor:
        return causal_conv1d_fn(**inputs, seq_idx=idx, activation="silu")

    assert_same(ours, lambda **inputs: convolve(**inputs, seq_idx=idx), conv_inputs(2, 3, 8, 3))


def test_states_of_packed_sequences() -> None:
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref

    x, borders = random(9, 4, seed=1), torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    for function in (causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref):
        states = function(x, borders, 3)
        want = torch.zeros(3, 4, 3, dtype=torch.float64)
        want[0, :, 1:] = x[:2].T
        want[2] = x[6:].T
        torch.testing.assert_close(states, want)


@pytest.mark.parametrize("size", [3, 4, 6])
@pytest.mark.parametrize("ring", [False, True])
def test_update_continues_a_sequence(ring: bool, size: int) -> None:
    from causal_conv1d import causal_conv1d_update

    x, weight, bias = random(2, 3, 11, seed=1), random(3, 4, seed=2), random(3, seed=3)
    want = convolve(x, weight, bias)
    state, seen, found = torch.zeros(2, 3, size, dtype=torch.float64), 0, []
    for part in x.split([1, 2, 1, 5, 2], -1):
        count = torch.full((2,), seen, dtype=torch.int32) if ring else None
        taken = part[..., 0] if part.shape[-1] == 1 else part
        y = causal_conv1d_update(taken, state, weight, bias, "silu", count)
        found.append(y.unsqueeze(-1) if y.dim() == 2 else y)
        seen += part.shape[-1]
    torch.testing.assert_close(torch.cat(found, -1), want)
    last = torch.stack([x[..., t] for t in range(11 - size, 11)], -1)
    expected = torch.stack([x[..., max(t for t in range(11) if t % size == i)] for i in range(size)], -1)
    torch.testing.assert_close(state, expected if ring else last)


def test_update_of_chosen_rows_and_its_gradient() -> None:
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update, causal_conv1d_update_ref

    rows, states = torch.tensor([4, 1], dtype=torch.int32), random(5, 3, 3, seed=4)
    inputs = {"x": random(2, 3, seed=1), "weight": random(3, 4, seed=2), "bias": random(3, seed=3)}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_update(x, states.clone(), weight, bias, "silu", None, rows)

    def by_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_update_ref(x, states[rows.long()], weight, bias, "silu")

    def loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve(x[..., None], weight, bias, states[rows.long()])[..., 0]

    assert_same(ours, loop, inputs)
    assert_same(by_reference, loop, inputs)
    after = states.clone()
    causal_conv1d_update(inputs["x"], after, inputs["weight"], inputs["bias"], "silu", None, rows)
    torch.testing.assert_close(after[4, :, -1], inputs["x"][0])
    torch.testing.assert_close(after[[0, 2, 3]], states[[0, 2, 3]])


def compiled(generation: int, x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dx, dweight, dbias by the compiled module's stand-in, called as a generation calls it."""
    import causal_conv1d_cuda as module

    if generation == 1:
        return module.causal_conv1d_fwd(x, weight, bias, True), *module.causal_conv1d_bwd(
            x, weight, bias, dout, None, True
        )
    if generation == 2:
        out = module.causal_conv1d_fwd(x, weight, bias, None, None, None, True)
        place = torch.empty_like(x)
        found = module.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, place, False, True)
        assert len(found) == 4 and found[3] is None and found[0] is place
        return out, *found[:3]
    out, *grads = (torch.empty_like(t) for t in (x, x, weight, bias))
    assert module.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True) is None
    assert module.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, *grads, None, True) is None
    return out, *grads


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_compiled_module_by_call(generation: int) -> None:
    inputs, dout = conv_inputs(2, 3, 6, 4), random(2, 3, 6, seed=5)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    want = convolve(**leaves)
    grads = torch.autograd.grad(want, list(leaves.values()), dout)
    x, weight, bias = inputs.values()
    for got, expected in zip(compiled(generation, x, weight, bias, dout), (want, *grads), strict=True):
        torch.testing.assert_close(got, expected.detach())


def test_compiled_module_states_and_updates() -> None:
    import causal_conv1d_cuda as module
    from causal_conv1d import cpp_functions

    x, weight, bias = conv_inputs(2, 3, 6, 4).values()
    before, dout, dfinal = random(2, 3, 3, seed=6), random(2, 3, 6, seed=5), random(2, 3, 3, seed=7)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, before)]
    y = convolve(leaves[0], leaves[1], leaves[2], leaves[3])
    final = torch.cat([leaves[3], leaves[0]], -1)[..., -3:]
    want = torch.autograd.grad((y, final), leaves, (dout, dfinal))
    place = torch.empty_like(before)
    torch.testing.assert_close(module.causal_conv1d_fwd(x, weight, bias, None, before, place, True), y.detach())
    torch.testing.assert_close(place, final.detach())
    taken = (x, weight, bias, dout, None, before, dfinal, None, True, True)
    for function in (module.causal_conv1d_bwd, cpp_functions.causal_conv1d_bwd_function):
        for got, expected in zip(function(*taken), want, strict=True):
            torch.testing.assert_close(got, expected)
    states = [before.clone() for _ in range(3)]
    found = [
        module.causal_conv1d_update(x, states[0], weight, bias, True),
        module.causal_conv1d_update(x, states[1], weight, bias, True, None),
        cpp_functions.causal_conv1d_update_function(x, states[2], weight, bias, True, None, None),
        torch.empty_like(x),
    ]
    assert module.causal_conv1d_update(x, before.clone(), weight, bias, found[3], True, None, None) is None
    for got in found:
        torch.testing.assert_close(got, y.detach())


def test_refusals_in_words() -> None:
    import causal_conv1d_cuda as module
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias = conv_inputs(1, 2, 3, 4).values()
    with pytest.raises(ConfigError, match="activation is 'relu'; allowed are None, 'silu' and 'swish'"):
        causal_conv1d_fn(x, weight, bias, activation="relu")
    with pytest.raises(ConfigError, match="seq_idx goes with neither"):
        causal_conv1d_fn(x, weight, bias, torch.zeros(1, 3, dtype=torch.int32), return_final_states=True)
    with pytest.raises(ConfigError, match="got 3 arguments; its generations take 4, 7 or 8"):
        module.causal_conv1d_fwd(x, weight, bias)
