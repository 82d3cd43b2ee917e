"""Convolution, selection and scan as one node: the numbers of the operators called one by one."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import BackendError, ConfigError
from selectra.mixers import S6
from selectra.mixers.inner import Weights, mixed_at_once, mixed_one_by_one
from selectra.ops import causal_conv1d, selective_scan

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])
LENGTH, WIDTH, RANK, STATES = 13, 12, 3, 5


def drawn(device: str, dtype: torch.dtype = torch.float32, batch: int = 2, weights: torch.dtype | None = None) -> Any:
    """Input, gate and weights, leaves all of them."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).to(device).requires_grad_()

    own = dtype if weights is None else weights
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        leaf(batch, LENGTH, WIDTH),
        leaf(batch, LENGTH, WIDTH),
        Weights(
            leaf(WIDTH, 1, 4, dtype=own, scale=0.5),
            leaf(WIDTH, dtype=own),
            leaf(RANK + 2 * STATES, WIDTH, dtype=own, scale=0.3),
            leaf(WIDTH, RANK, dtype=own, scale=0.3),
            leaf(WIDTH, dtype=own),
            leaf(WIDTH, STATES, dtype=state, scale=0.5),
            leaf(WIDTH, dtype=state),
        ),
    )


def results(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output and every gradient."""
    grad = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad, retain_graph=True)]


def assert_alike(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        scale = float(theirs.double().abs().max())
        assert float((mine.double() - theirs.double()).abs().max()) <= tolerance * scale


FLAGS = {
    "plain": {},
    "reverse": {"reverse": True},
    "mask": {"mask": True},
    "packed": {"cu_seqlens": True, "reverse": True},
}


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_agrees_with_the_operators(device: str, dtype: torch.dtype, flags: dict[str, Any]) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 on a GPU is portable's")
    x, z, weights = drawn(device, dtype, batch=1 if "cu_seqlens" in flags else 2)
    flags = dict(flags)
    if "mask" in flags:
        flags["mask"] = torch.arange(LENGTH, device=device).repeat(2, 1) % 5 != 3
    if "cu_seqlens" in flags:
        flags["cu_seqlens"] = torch.tensor([0, 4, 4, LENGTH], dtype=torch.int32, device=device)
    y = mixed_at_once(x, z, weights, **flags)
    assert y is not None and y.grad_fn is not None and y.grad_fn.name() == "_InnerBackward"
    want = mixed_one_by_one(x, z, weights, **flags)
    assert_alike(results(y, [x, z, *weights]), results(want, [x, z, *weights]), 1e-12 if x.is_cpu else 2e-5)
    with torch.no_grad():
        again = mixed_at_once(x, z, weights, **flags)
    assert again is not None and torch.equal(again, y)


@DEVICES
def test_without_a_gate_and_without_biases(device: str) -> None:
    x, _, weights = drawn(device)
    weights = weights._replace(conv_bias=None, dt_bias=None, D=None)
    leaves = [x, *(w for w in weights if w is not None)]
    y = mixed_at_once(x, None, weights)
    assert y is not None
    assert_alike(results(y, leaves), results(mixed_one_by_one(x, None, weights), leaves), 2e-5)


@DEVICES
def test_under_autocast(device: str) -> None:
    wide = drawn(device)
    x, z = (t.detach().bfloat16().requires_grad_() for t in wide[:2])
    weights, leaves = wide[2], [x, z, *wide[2]]
    with torch.autocast(device, torch.bfloat16):
        assert mixed_at_once(wide[0], wide[1], weights) is None
        y = mixed_at_once(x, z, weights)
        want = mixed_one_by_one(x, z, weights._replace(x_proj=weights.x_proj, dt_proj=weights.dt_proj))
    assert y is not None and y.dtype == torch.bfloat16
    got = results(y, leaves)
    assert [grad.dtype for grad in got[3:]] == [torch.float32] * 7
    assert_alike(got, results(want, leaves), 0.02)


@DEVICES
def test_a_model_in_bfloat16(device: str) -> None:
    x, z, weights = drawn(device, torch.bfloat16)
    y, want = mixed_at_once(x, z, weights), mixed_one_by_one(x, z, weights)
    assert y is not None
    assert_alike(results(y, [x, z, *weights]), results(want, [x, z, *weights]), 0.02)


def test_frozen_weights_get_no_gradient() -> None:
    x, z, weights = drawn("cpu")
    for name in ("conv", "x_proj", "A_log"):
        getattr(weights, name).requires_grad_(False)
    leaves = [t for t in (x, z, *weights) if t.requires_grad]
    y = mixed_at_once(x, z, weights)
    assert y is not None
    assert_alike(results(y, leaves), results(mixed_one_by_one(x, z, weights), leaves), 2e-5)
    y.sum().backward()
    assert weights.conv.grad is None and weights.x_proj.grad is None and weights.A_log.grad is None


def test_a_gradient_that_shall_have_one_is_made_of_operations() -> None:
    x, z, weights = drawn("cpu", torch.float64)
    earlier = x * 2
    y = mixed_at_once(earlier, z, weights)
    assert y is not None
    want = mixed_one_by_one(earlier, z, weights)
    (got,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(want.square().sum(), x)
    assert got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(BackendError, match="a gradient of its gradient was asked for"):
        got.sum().backward()


def test_backends_that_are_written_in_pytorch_are_called_one_by_one() -> None:
    x, z, weights = drawn("cpu")
    with selective_scan.using("portable"):
        assert mixed_at_once(x, z, weights) is None
    with causal_conv1d.using("reference"):
        assert mixed_at_once(x, z, weights) is None
    assert mixed_at_once(x, z, weights._replace(x_proj=weights.x_proj.detach().double())) is None
    assert mixed_at_once(x[:, :0], z[:, :0], weights) is None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("D", torch.ones(3)),
        ("conv", torch.ones(4, 1, 4)),
        ("A_log", torch.ones(3, STATES)),
        ("dt_bias", torch.ones(4)),
        ("dt_proj", torch.ones(4, RANK)),
    ],
)
def test_what_does_not_fit_is_left_to_the_operators_words(name: str, wrong: Tensor) -> None:
    x, z, weights = drawn("cpu")
    weights = weights._replace(**{name: wrong})
    assert mixed_at_once(x, z, weights) is None
    # The split of the selection is PyTorch's, with its words.
    with pytest.raises((ConfigError, RuntimeError)):
        mixed_one_by_one(x, z, weights)


@pytest.mark.skipif("SELECTRA_CHECK_SHAPES" in os.environ, reason="the hook refuses these shapes first")
def test_gates_devices_and_types_that_do_not_fit() -> None:
    x, z, weights = drawn("cpu")
    assert mixed_at_once(x, z[:1], weights) is None
    assert mixed_at_once(x, z, weights._replace(D=weights.D.double())) is None
    assert mixed_at_once(x, z, weights._replace(A_log=weights.A_log.detach().to("meta"))) is None
    assert mixed_at_once(x, z, weights._replace(D=torch.ones(WIDTH, dtype=torch.int64))) is None
    with pytest.raises(ConfigError, match="mask"):
        mixed_at_once(x, z, weights, mask=torch.ones(2, 3, dtype=torch.bool))


def test_a_bias_of_the_selection_counts_and_an_overridden_part_is_called() -> None:
    class Louder(S6):
        def convolve(self, *args: Any, **flags: Any) -> Any:
            u, state = super().convolve(*args, **flags)
            return 2 * u, state

    torch.manual_seed(0)
    mixer, x = S6(8), torch.randn(1, 5, 8)
    louder = Louder(8)
    louder.load_state_dict(mixer.state_dict())
    assert not torch.allclose(louder(x), mixer(x))
    plain = mixer(x)
    mixer.x_proj = torch.nn.Linear(16, mixer.x_proj.out_features)
    torch.nn.init.constant_(mixer.x_proj.bias, 3.0)
    u = torch.randn(1, 5, 16)
    torch.testing.assert_close(mixer.mix_whole(u), mixer.mix(u)[0])
    mixer(x).sum().backward()
    assert mixer.x_proj.bias.grad is not None and not torch.allclose(mixer(x), plain)
