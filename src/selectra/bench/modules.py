"""Checking and timing whole modules: used by the benchmarks of blocks and of models."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectra.bench.gate import worse
from selectra.bench.timing import interleaved
from selectra.errors import BackendError
from selectra.ops import add_norm, causal_conv1d, cross_scan, selective_scan
from selectra.train.record import BackendWatch

OUTPUT = "the output"
# Of each tensor's maximum, in float32: sums over many positions and layers stand between the scan and these. The
# rounding of large gradients is in the small ones too, so that these are held to a part of the largest.
AT_MOST, SMALL_GRADIENT = 1e-3, 1e-2
# In bfloat16, rounded at other places.
COMPILED_AT_MOST = 5e-2


@dataclass(frozen=True)
class Subject:
    """A module and its input; `call` runs it and gives one tensor."""

    module: nn.Module
    x: Tensor
    call: Callable[[nn.Module, Tensor], Tensor]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """A module that takes one tensor and gives one."""
    return module(x)


def check(name: str, subject: Subject) -> float:
    """A float32 module's output and gradients against its own float64 copy on the reference backends, on the CPU.

    Returns:
        The worst error, relative to each tensor's maximum.

    Raises:
        BackendError: Something is off by more than `AT_MOST`; nothing is timed then.
    """
    got = _results(subject)
    exact = Subject(copy.deepcopy(subject.module).cpu().double(), subject.x.cpu().double(), subject.call)
    with contextlib.ExitStack() as stack:
        for op in (selective_scan, causal_conv1d, add_norm, cross_scan):
            stack.enter_context(op.using("reference"))
        want = _results(exact)
    return _worst(name, got, want)


def agree(name: str, got: Subject, want: Subject) -> float:
    """Output and gradients of one float32 module against those of another with the same parameters' names.

    Returns:
        The worst error, relative to each tensor's maximum.

    Raises:
        BackendError: Something is off by more than `AT_MOST`; nothing is timed then.
    """
    return _worst(name, _results(got), _results(want))


def _worst(name: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    largest = max(value.abs().max().item() for what, value in want.items() if what != OUTPUT)
    least = {what: 0.0 if what == OUTPUT else SMALL_GRADIENT * largest for what in want}
    found = {what: _error(got[what], value, least[what]) for what, value in want.items()}
    worst = max(found, key=lambda what: worse(found[what]))
    if not worse(*found.values()) <= AT_MOST:
        raise BackendError(
            f"{name} is wrong, nothing is timed: {worst} is off by {found[worst]:.1e} of its maximum, "
            f"allowed {AT_MOST:.0e}."
        )
    return worse(*found.values())


def _error(got: Tensor, want: Tensor, least: float) -> float:
    """The largest difference over the largest entry, or over `least` where that is more."""
    want = want.cpu().double()
    return ((got.cpu().double() - want).abs().max() / want.abs().max().clamp_min(max(least, 1e-30))).item()


def _results(subject: Subject) -> dict[str, Tensor]:
    x = subject.x.detach().requires_grad_()
    y = subject.call(subject.module, x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
    named = {name: p for name, p in subject.module.named_parameters() if p.requires_grad}
    leaves = {"the input": x, **named}
    grads = torch.autograd.grad(y, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return {OUTPUT: y.detach(), **{f"the gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}}


def measure(subjects: Mapping[str, Subject], seconds: float, device: torch.device) -> list[dict[str, Any]]:
    """Forward without gradient, and training step, of every subject in turn: wall clock, with the host's time in it."""
    forward = interleaved({name: forward_of(each) for name, each in subjects.items()}, seconds, device)
    training = interleaved({name: training_of(each) for name, each in subjects.items()}, seconds, device)
    rows = []
    for name, each in subjects.items():
        parameters = sum(parameter.numel() for parameter in each.parameters())
        times = {"forward": asdict(forward[name]), "training": asdict(training[name])}
        row = {"name": name, "parameters": parameters, "input": list(each.x.shape), **times}
        rows.append(row | {"backends": backends(each), "peak_bytes": _peak(each, device)})
    return rows


def measure_ways(subject: Subject, seconds: float, device: torch.device) -> dict[str, dict[str, Any]]:
    """Forward and training step of a compiled subject, and the forward replayed from a CUDA graph: wall clock.

    Raises:
        BackendError: What the compiled module gives is not what it gives eager.
    """
    torch.compiler.reset()
    compiled = Subject(torch.compile(subject.module, fullgraph=True, dynamic=False), subject.x, subject.call)  # pyright: ignore[reportArgumentType]
    want, got = (forward_of(each)() for each in (subject, compiled))
    assert isinstance(want, Tensor) and isinstance(got, Tensor)
    error = ((got - want).abs().max() / want.abs().max()).item()
    if not error <= COMPILED_AT_MOST:
        raise BackendError(f"compiled, the output differs by {error:.1e} of its maximum.")
    forward = interleaved({"compiled": forward_of(compiled), "graph": _graph(forward_of(subject))}, seconds, device)
    training = interleaved({"compiled": training_of(compiled)}, seconds, device)
    kinds = {"forward": forward, "training": training}
    return {kind: {way: asdict(timing) for way, timing in found.items()} for kind, found in kinds.items()}


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    """The same work, captured once and replayed by one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def forward_of(subject: Subject) -> Callable[[], object]:
    """A forward without gradient."""

    def run() -> object:
        with torch.no_grad():
            return subject.call(subject.module, subject.x)

    return run


def training_of(subject: Subject) -> Callable[[], object]:
    """A forward, and a backward for the input and all parameters."""
    x = subject.x.detach().requires_grad_()
    leaves = [x, *subject.parameters()]

    def run() -> object:
        y = subject.call(subject.module, x)
        return torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

    return run


def backends(subject: Subject) -> dict[str, str]:
    """The backend that each operator really ran on."""
    with BackendWatch() as watch:
        forward_of(subject)()
    return watch.found()


def _peak(subject: Subject, device: torch.device) -> dict[str, int] | None:
    """Bytes beyond what lies there before, at the peak of a forward and of a training step; None on a CPU."""
    if device.type != "cuda":
        return None
    found = {}
    for kind, make in (("forward", forward_of), ("training", training_of)):
        run = make(subject)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        found[kind] = torch.cuda.max_memory_allocated(device) - before
    return found


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw weights and inputs from a seed and leave the caller's generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
