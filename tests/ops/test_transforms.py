"""Both operators under PyTorch's transforms, export and compilers, and with odd gradients coming in."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from selectra.errors import BackendError
from selectra.ops import causal_conv1d, selective_scan
from selectra.ops.causal_conv1d import registration as conv_registration
from selectra.ops.dispatch import Op
from selectra.ops.selective_scan import registration as scan_registration

OPS: list[Op[Any, Any, Any]] = [selective_scan, causal_conv1d]
FAST = ["cpu", "portable"]
Function = Callable[..., Any]


def leaves(op: Op[Any, Any, Any], dtype: torch.dtype = torch.float64, batch: int = 2, d: int = 4) -> list[Tensor]:
    """The operator's required arguments, each a leaf; length 5."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(batch, 5, d), (d, 3)] if op is causal_conv1d else [(batch, 5, d)] * 2 + [(d, 3)] + [(batch, 5, 3)] * 2
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if op is selective_scan:
        tensors[1], tensors[2] = tensors[1].abs(), -tensors[2].abs()
    return [x.to(dtype).requires_grad_() for x in tensors]


@pytest.fixture(params=FAST)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that this machine has."""
    u = torch.zeros(1, 1, 1)
    reason = selective_scan.explain(u, u, u[0], u, u)[request.param]
    if reason != "ok":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=OPS, ids=[op.name for op in OPS])
def op(request: pytest.FixtureRequest) -> Op[Any, Any, Any]:
    return request.param


def test_a_batch_of_gradients_is_taken_one_by_one(op: Op[Any, Any, Any], backend: str) -> None:
    x, *others = leaves(op)
    with op.using(backend):
        y = op(x, *others)
    given = torch.randn(3, *y.shape, dtype=y.dtype)
    (got,) = torch.autograd.grad(y, x, given, retain_graph=True, is_grads_batched=True)
    want = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in given]
    torch.testing.assert_close(got, torch.stack(want))


TRANSFORMS: dict[str, Function] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": torch.func.vjp,
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_in_words_and_the_reference_has_them(
    op: Op[Any, Any, Any], backend: str, transform: str
) -> None:
    x, *others = (leaf.detach() for leaf in leaves(op))
    with op.using(backend), pytest.raises(BackendError, match=r"using\('reference'\)"):
        TRANSFORMS[transform](lambda x: op(x, *others), x)
    with op.using("reference"):
        TRANSFORMS[transform](lambda x: op(x, *others), x)


def test_a_tangent_is_never_lost_in_silence(op: Op[Any, Any, Any], backend: str) -> None:
    x, *others = leaves(op)
    with forward_ad.dual_level(), op.using(backend):
        # Without a tangent a call is a call.
        y = op(x, *others)
        with pytest.raises(BackendError, match="forward-mode"):
            op(forward_ad.make_dual(x.detach(), torch.ones_like(x)), *others)
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(BackendError, match="forward-mode"):
            torch.autograd.grad(y, x, dy)


class Scan(torch.nn.Module):
    """The scan with its parameter."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(A.detach())

    def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(u, delta, self.A, B, C)


MAKERS: dict[str, Function] = {
    "export": lambda module, inputs: torch.export.export(module, inputs).module(),
    "trace": torch.jit.trace,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", MAKERS)
def test_a_program_made_without_gradients_can_be_trained(backend: str, how: str) -> None:
    u, delta, A, B, C = leaves(selective_scan)
    module, inputs = Scan(A), (u, delta, B, C)
    with selective_scan.using(backend), torch.no_grad():
        program = MAKERS[how](module, inputs)
    with selective_scan.using(backend):
        want = torch.autograd.grad(module(*inputs).sin().sum(), [module.A, *inputs])
    got = torch.autograd.grad(program(*inputs).sin().sum(), [*program.parameters(), *inputs])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_program_for_the_cpu_refuses_tensors_of_another_device() -> None:
    u, delta, A, B, C = (x.detach() for x in leaves(selective_scan))
    # One tensor elsewhere is enough.
    scan = (u, delta, A.to("meta"), B, C, *[None] * 6, False, False, torch.float64, "cpu")
    with pytest.raises(BackendError, match="a tensor is on meta, it needs cpu"):
        scan_registration._forward(*scan, False)
    with pytest.raises(BackendError, match="a tensor is on meta, it needs cpu"):
        scan_registration._backward(u, A, A, *scan)
    conv = (u, A.to("meta"), *[None] * 4, False, False, "cpu")
    with pytest.raises(BackendError, match="a tensor is on meta, it needs cpu"):
        conv_registration._forward(*conv)
    with pytest.raises(BackendError, match="a tensor is on meta, it needs cpu"):
        conv_registration._backward(u, A, *conv)


def gradients(op: Op[Any, Any, Any], backend: str, loss: Callable[[Tensor, Tensor], Tensor], **flags: Any) -> list[Any]:
    """Gradients of all leaves; None where the loss does not reach."""
    tensors = leaves(op)
    with op.using(backend):
        y, state = op(*tensors, **flags, return_final_state=True)
    return list(torch.autograd.grad(loss(y, state), tensors, allow_unused=True, materialize_grads=True))


ODD = torch.randn(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dy expanded": lambda y, state: y.sum(),
    "dy not contiguous": lambda y, state: (y * ODD.transpose(0, 2)).sum(),
    "y alone, in part": lambda y, state: y[:, 2, 1].sum(),
    "state alone": lambda y, state: (state * state).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_for_any_way_the_results_are_used(op: Op[Any, Any, Any], backend: str, loss: str) -> None:
    want = gradients(op, "reference", LOSSES[loss])
    for a, b in zip(gradients(op, backend, LOSSES[loss]), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_gradient_of_nan_at_an_absent_position_counts_for_nothing(op: Op[Any, Any, Any], backend: str) -> None:
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    dy = torch.where(mask[..., None], 1.0, torch.nan)
    tensors = leaves(op)
    with op.using(backend):
        got = torch.autograd.grad(op(*tensors, mask=mask), tensors, dy.expand(2, 5, 4).double())
    want = gradients(op, "reference", lambda y, state: y.sum(), mask=mask)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradients_for_some_inputs_only(op: Op[Any, Any, Any], backend: str) -> None:
    want = gradients(op, "reference", lambda y, state: y.sum())
    for index, gradient in enumerate(want):
        tensors = [x.detach() for x in leaves(op)]
        tensors[index].requires_grad_()
        with op.using(backend):
            op(*tensors).sum().backward()
        torch.testing.assert_close(tensors[index].grad, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [*FAST, "reference"])
@pytest.mark.parametrize(("batch", "d"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_in_gives_nothing_out(op: Op[Any, Any, Any], name: str, batch: int, d: int) -> None:
    tensors = leaves(op, batch=batch, d=d)
    with op.using(name):
        y, state = op(*tensors, return_final_state=True)
    assert y.shape == (batch, 5, d) and state.shape == (batch, d, 3)
    for leaf, gradient in zip(tensors, torch.autograd.grad(y.sum() + state.sum(), tensors), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_groups_of_no_channels(name: str) -> None:
    u, B = torch.zeros(2, 5, 0), torch.zeros(2, 5, 3, 4)
    with selective_scan.using(name):
        assert selective_scan(u, u, torch.zeros(0, 4), B, B).shape == u.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_their_inputs_types(op: Op[Any, Any, Any], backend: str, dtype: torch.dtype) -> None:
    tensors = leaves(op, dtype)
    with op.using(backend):
        op(*tensors).sum().backward()
    assert [x.grad.dtype for x in tensors if x.grad is not None] == [dtype] * len(tensors)


def test_two_threads_on_different_backends() -> None:
    """Each call's backward runs on the backend of its forward, whatever the other thread asks for meanwhile."""
    want = {op.name: gradients(op, "reference", lambda y, state: y.sum()) for op in OPS}

    def work(job: tuple[Op[Any, Any, Any], str]) -> bool:
        op, name = job
        for _ in range(20):
            for a, b in zip(gradients(op, name, lambda y, state: y.sum()), want[op.name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, [(op, name) for op in OPS for name in ("portable", "reference")]))
    assert all(op.asked is None for op in OPS)


@pytest.mark.compile
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_for_any_shape_and_packed(op: Op[Any, Any, Any], backend: str, packed: bool) -> None:
    torch._dynamo.reset()
    frames: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=count)
    for batch in (1,) if packed else (2, 3, 7):
        tensors = leaves(op, batch=batch)
        flags = {"cu_seqlens": torch.tensor([0, 2, 2, 5], dtype=torch.int32)} if packed else {}
        with op.using(backend):
            want, got = op(*tensors, **flags), compiled(*tensors, **flags)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(frames) == 1


@pytest.mark.compile
def test_a_compiled_function_may_choose_inside() -> None:
    tensors = [x.detach() for x in leaves(selective_scan)]

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        with selective_scan.using("portable"):
            return selective_scan(u, delta, A, B, C)

    torch._dynamo.reset()
    got = torch.compile(scan, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(got, scan(*tensors), rtol=0, atol=0)
    assert selective_scan.asked is None
