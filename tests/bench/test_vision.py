"""The benchmark of image models: the other sides compute what ours do, and its parts run small."""

import io
import sys
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from selectra.bench import (
    vision,
    vision_einfft,
    vision_growth,
    vision_peers,
    vision_shares,
    vision_steps,
    vision_table,
    vision_training,
)
from selectra.bench.events import Stopwatch
from selectra.bench.modules import Subject, agree, plain, seeded
from selectra.errors import BackendError, ConfigError
from selectra.ops import selective_scan
from selectra.ops.spectral import complex_block_product
from selectra.registry import models
from selectra.spec import Spec

CPU = torch.device("cpu")


def _y(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Any, bias: Tensor) -> Tensor:
    """What the packages' kernels compute, channels first."""
    u, delta, z = (None if x is None else x.transpose(1, 2) for x in (u, delta, z))  # pyright: ignore[reportAssignmentType]
    B, C = (m.permute(0, 3, 1, 2) for m in (B, C))
    return selective_scan(u, delta, A, B, C, D, z, bias, True).transpose(1, 2).contiguous()  # pyright: ignore[reportReturnType]


def _gradients(tensors: tuple[Any, ...], dy: Tensor) -> list[Tensor]:
    leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        y = _y(*leaves)
    grads = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)
    return [grad.contiguous() for grad in grads]


def _conv_module(later: bool) -> types.ModuleType:
    """causal_conv1d's compiled module as it was called first, and as it is since it knows states."""

    def y(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        return F.silu(padded[..., : x.shape[2]]).contiguous()

    def fwd(*args: Any) -> Tensor:
        assert args[3:] == ((None, None, None, True) if later else (True,))
        return y(*args[:3])

    def bwd(*args: Any) -> list[Any]:
        assert args[4:] == ((None, None, None, None, False, True) if later else (None, True))
        leaves = [x.detach().requires_grad_() for x in args[:3]]
        with torch.enable_grad():
            grads = torch.autograd.grad(y(*leaves), leaves, args[3])
        return [*grads, None] if later else list(grads)

    return _module_of_conv(fwd, bwd, 7 if later else 4)


def _module_of_conv(fwd: Callable[..., Any], bwd: Callable[..., Any], count: int) -> types.ModuleType:
    fwd.__doc__ = ", ".join(f"arg{i}: Tensor" for i in range(count))
    module = types.ModuleType(vision_peers.CONV)
    module.__dict__.update(causal_conv1d_fwd=fwd, causal_conv1d_bwd=bwd, __spec__=ModuleSpec(module.__name__, None))
    return module


def _filling_conv_module() -> types.ModuleType:
    """causal_conv1d since 1.5, which writes into tensors that it is given."""

    def y(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.pad(x, (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]))

    def fwd(x: Any, weight: Any, bias: Any, packed: Any, before: Any, out: Any, after: Any, silu: bool) -> None:
        assert (packed, before, after, silu) == (None, None, None, True)
        out.copy_(y(x, weight, bias))

    def bwd(x: Any, weight: Any, bias: Any, dy: Any, *rest: Any) -> None:
        assert rest[:3] == (None, None, None) and rest[6:] == (None, True)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.enable_grad():
            grads = torch.autograd.grad(y(*leaves), leaves, dy)
        rest[3].copy_(grads[0])
        # Of these the package adds up what its blocks find.
        rest[4].add_(grads[1])
        rest[5].add_(grads[2])

    return _module_of_conv(fwd, bwd, 8)


@pytest.fixture(params=["no conv", "first conv", "later conv", "filling conv"])
def packages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the packages' names and call signatures over our own scan."""

    def states(u: Tensor, A: Tensor) -> Tensor:
        return A.new_zeros(u.shape[0], u.shape[1], -(-u.shape[2] // vision_peers.CHUNK), 2 * A.shape[1])

    def mamba_fwd(
        u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, softplus: bool
    ) -> list[Tensor]:
        assert softplus
        plain = _y(u, delta, A, B, C, D, None, bias)
        return [plain, states(u, A)] if z is None else [plain, states(u, A), _y(u, delta, A, B, C, D, z, bias)]

    def mamba_bwd(*args: Any) -> list[Tensor]:
        *tensors, dy, kept, out, dz, softplus, again = args
        assert softplus and not again and dz is None and kept is not None and (out is None) == (tensors[6] is None)
        grads = _gradients(tuple(tensors), dy)
        return grads if tensors[6] is None else [*grads[:6], grads[7], grads[6]]

    def vmamba_fwd(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, bias: Any, *flags: Any) -> list[Tensor]:
        assert flags == (True, 1, False)
        return [_y(u, delta, A, B, C, D, None, bias), states(u, A)]

    def vmamba_bwd(*args: Any) -> list[Tensor]:
        u, delta, A, B, C, D, bias, dy, *_ = args
        return _gradients((u, delta, A, B, C, D, None, bias), dy)

    pairs = {"selective_scan_cuda": (mamba_fwd, mamba_bwd), "selective_scan_cuda_oflex": (vmamba_fwd, vmamba_bwd)}
    for name, (fwd, bwd) in pairs.items():
        module = types.ModuleType(name)
        module.__dict__.update(fwd=fwd, bwd=bwd)
        monkeypatch.setitem(sys.modules, name, module)
    if request.param == "filling conv":
        monkeypatch.setitem(sys.modules, vision_peers.CONV, _filling_conv_module())
    elif request.param != "no conv":
        monkeypatch.setitem(sys.modules, vision_peers.CONV, _conv_module(request.param == "later conv"))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("case", vision_training.CASES, ids=lambda case: case.model)
def test_both_sides_compute_the_same(case: vision_training.Case) -> None:
    errors = vision_training.gate(case, CPU)
    assert max(errors.values()) < 1e-4


def test_a_row_of_more_images_is_run_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("_eager", "_compiled", "_profiled"):
        monkeypatch.setattr(vision_training, way, lambda *_: None)
    monkeypatch.setattr(vision_training, "gate", lambda *_: {})
    monkeypatch.setattr(vision_training, "missing", lambda *_: [])
    for only, batches in ((None, [128, 64, 128]), ("vim_tiny@256", [256]), ("vim_tiny", [128])):
        into: dict[str, Any] = {}
        vision_training.measure(into, 0.0, Stopwatch(CPU), lambda: None, only)
        assert [row["batch"] for row in into["rows"]] == batches


@pytest.mark.compile
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("case", vision_training.CASES, ids=lambda case: case.model)
def test_the_other_side_can_be_compiled(case: vision_training.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0, CPU):
        ours: Any = models.build(Spec(case.model, n_classes=10, **case.small), {})
        theirs: Any = models.build(Spec(case.model, n_classes=10, **case.small), {})
        x = torch.randn(2, 3, vision_training.SMALL_SIZE, vision_training.SMALL_SIZE)
    theirs.load_state_dict(ours.state_dict())
    vision_peers.with_theirs(theirs)
    # Not every PyTorch traces a look for a module.
    monkeypatch.setattr(vision_peers, "missing", torch.compiler.disable(vision_peers.missing))
    torch.compiler.reset()
    for block in theirs.blocks():
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert agree(case.model, Subject(theirs, x, plain), Subject(ours, x, plain)) < 1e-4


@pytest.mark.parametrize("product", [vision_einfft.einsums, vision_einfft.loop])
def test_forms_of_the_product_agree(product: vision_einfft.Product) -> None:
    weight, bias = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 6)
    x = torch.randn(2, 3, 4, 5, 2)
    torch.testing.assert_close(product(x, weight, bias), complex_block_product(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_the_mixer_is_what_its_forms_compute() -> None:
    errors = vision_einfft.gate(CPU)
    assert set(errors) == {"one product", "einsums", "loop"} and max(errors.values()) < 1e-5


def test_slopes_are_of_the_upper_half() -> None:
    assert vision_growth.slope([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    points = [{"value": n, **dict.fromkeys(vision_growth.KINDS, float(max(4, n)))} for n in (1, 2, 4, 8, 16)]
    assert vision_growth.slopes(points) == pytest.approx(dict.fromkeys(vision_growth.KINDS, 1.0))


def test_what_a_forward_keeps_is_counted_once() -> None:
    module, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Tanh()), torch.randn(3, 8)
    # Each tanh keeps its own output; input and weights are not counted.
    assert vision_growth.kept_bytes(module, x) == 2 * 3 * 16 * 4


def test_parts_run_and_are_tabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_growth, "LENGTHS", (16, 32, 64, 128))
    monkeypatch.setattr(vision_einfft, "CPU_BATCH", 1)
    saved: list[Any] = []
    console = Console(record=True, width=200, file=io.StringIO())
    record = vision.bench_vision(CPU, 0, console, saved.append, "growth:S6 length,einfft:49")
    assert len(saved) >= 2
    assert [row["against"] for row in record["growth"]["rows"]] == ["length"]
    assert record["growth"]["rows"][0]["slopes"]["memory_bytes"] == pytest.approx(1, abs=0.1)
    shown = console.export_text()
    assert "kept for the backward" in shown and "| 49 | 448 | fp32 |" in shown


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("grwth", "there is no part 'grwth'.*Did you mean 'growth'"),
        ("growth:S7", "there is no row 'S7'"),
        ("training", "of `bench vision` growth and einfft can"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        vision.bench_vision(CPU, 0, Console(file=io.StringIO()), lambda record: None, parts)


def test_kernels_have_their_kind_of_work() -> None:
    def event(name: str, parent: Any = None) -> Any:
        return types.SimpleNamespace(name=name, cpu_parent=parent)

    for kernel, launched, kind in (
        ("scan_backward", event("_CrossScan"), "scan"),
        ("void selective_scan_fwd_kernel<float>", event("_Scan"), "scan"),
        ("triton_cross_scan_flex", event("x"), "copies"),
        ("ampere_bf16_gemm", event("aten::addmm"), "products"),
        ("cudnn::conv_kernel", event("aten::cudnn_convolution"), "convolution"),
        ("elementwise", event("aten::copy_", event("aten::_to_copy")), "casts of weights"),
        ("elementwise", event("aten::copy_"), "copies"),
        ("elementwise", event("aten::silu"), "rest"),
    ):
        assert vision_shares._kind(kernel, launched) == kind


def test_a_step_on_a_cpu_is_no_graph() -> None:
    with pytest.raises(BackendError, match="a step on cpu cannot be recorded as a CUDA graph; measure on a GPU"):
        vision_steps.as_one_graph(lambda: None, CPU)


def test_a_step_is_timed_often_though_it_was_compiled_first() -> None:
    model, pauses = torch.nn.Linear(2, 2), [0.3]
    step = vision_steps.training_of(model, torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))

    def compiled_first() -> object:
        time.sleep(pauses.pop() if pauses else 0.0)
        return step()

    found = vision_steps.times({"step": compiled_first}, 0.2, Stopwatch(CPU))["step"]
    assert found["rounds"] >= vision_steps.LEAST_ROUNDS and found["wall_ms"]["median"] < 200


def test_the_table_of_trainings_gives_ratios() -> None:
    timing = {"ours": 10.0, "theirs": 25.0}
    way = {s: {"wall_ms": {"median": t, "fastest": t}, "device_ms": {"median": t / 2}} for s, t in timing.items()}
    row = {
        "model": "m",
        "peer": "p",
        "batch": 50,
        "target": 2.0,
        "eager": way,
        "shares_ms": {"ours": {"scan": 1, "all": 4}},
    }
    shown = vision_table.training_table({"training": {"rows": [row]}})
    assert "| m | p | 50 | eager | 5,000 | 2,000 | 2.50 | 2.50 | 2.0 |" in shown
    assert "1.0 (25%)" in shown
    row["eager"] = {side: {**timed, "rounds": 1} for side, timed in way.items()}
    assert "2.50 (one call) | 2.50 |" in vision_table.training_table({"training": {"rows": [row]}})
