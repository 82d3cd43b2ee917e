"""The gate of the GPU benchmark: nothing is timed that does not agree with the float64 reference."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from selectra.bench.calls import Arguments, Ours, Prepared, public, results
from selectra.bench.peers import Prepare, error_of
from selectra.bench.shapes import Case
from selectra.errors import BackendError
from selectra.ops import selective_scan

# Relative to each tensor's maximum. What is written in 16 bits has the rounding of its type (up to 2**-8 and 2**-11 of
# an entry), the parameters' gradients are float32 in every case. They are sums over up to hundreds of thousands of
# positions, which gather what the hardware's 2^x is too small in the mean.
AT_MOST: dict[str, dict[str, float]] = {
    "fp32": {"y": 2e-6, "gradient": 1e-5, "parameter": 2e-5},
    "bf16": {"y": 5e-3, "gradient": 8e-3, "parameter": 2e-3},
    "fp16": {"y": 1e-3, "gradient": 2e-3, "parameter": 1e-3},
}
# What another package may differ before the comparison would be void.
PEERS_AT_MOST = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
PARAMETERS = ("dA", "dD", "ddelta_bias")
# Channels in a group and positions: odd ones that no tile divides, and even ones that take the fast paths.
SMALL = ((2, 33, 71), (1, 64, 256), (2, 8, 1))
# Channels of a benchmarked shape that are computed again in float64.
N_CHECKED = 8
SEED = 1

Truth = Callable[[Arguments, Tensor], dict[str, Tensor]]


def errors(prepare: Prepare, case: Case, device: torch.device, truth: Truth) -> dict[str, float]:
    """Largest error of y and each gradient, relative to the maximum of the truth."""
    arguments = case.arguments(device, SEED)
    dy = cotangent(arguments)
    with poisoned():
        first = results(prepare(arguments), dy)
    # Once more as it will be timed: an operator may take another path where deterministic algorithms are asked for.
    usual = results(prepare(arguments), dy)
    return {
        name: worse(error_of(first[name], value).largest, error_of(usual[name], value).largest)
        for name, value in truth(arguments, dy).items()
    }


def worse(*found: float) -> float:
    """The largest error; not-a-number is worse than any."""
    return max(found, key=lambda error: (math.isnan(error), error))


def reference(arguments: Arguments, dy: Tensor, backend: str = "reference") -> dict[str, Tensor]:
    """y and every gradient in float64, by the plain loop."""
    double = {k: None if v is None else v.detach().double().requires_grad_() for k, v in arguments.items()}
    leaves = {name: value for name, value in double.items() if value is not None}
    with selective_scan.using(backend):
        y = selective_scan(**public(double))
        grads = torch.autograd.grad(y, list(leaves.values()), dy.double())
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def reference_on_cpu(arguments: Arguments, dy: Tensor) -> dict[str, Tensor]:
    """The same on the CPU, where a loop over small tensors is faster."""
    return reference({k: None if v is None else v.cpu() for k, v in arguments.items()}, dy.cpu())


def problems(found: dict[str, float], dtype: str) -> list[str]:
    """What is out of tolerance, in words; not-a-number is."""
    limits = {name: AT_MOST[dtype][_sort(name)] for name in found}
    return [
        f"{name} is off by {error:.1e} of its maximum, allowed {limits[name]:.0e}"
        for name, error in found.items()
        if not error <= limits[name]
    ]


def _sort(name: str) -> str:
    return "y" if name == "y" else "parameter" if name in PARAMETERS else "gradient"


def check_ours(cases: tuple[Case, ...], device: torch.device, backend: Callable[[Arguments], str]) -> dict[str, float]:
    """Our backends on small versions of every kind of case; the worst error of each kind.

    Raises:
        BackendError: One of them is wrong.
    """
    worst = {}
    for small in _small_versions(cases):
        name = ""

        def ours(arguments: Arguments) -> Prepared:
            nonlocal name
            name = backend(arguments)
            return Ours(arguments, name)

        found = errors(ours, small, device, reference_on_cpu)
        wrong = problems(found, small.dtype)
        if wrong:
            what = f"b={small.b} d={small.d} l={small.l} {_in_words(small)}"
            raise BackendError(f"selective_scan on {name} is wrong at {what}, nothing is timed: {'; '.join(wrong)}.")
        kind = _in_words(small)
        worst[kind] = worse(worst.get(kind, 0.0), *found.values())
    return worst


def check_peer(name: str, prepare: Prepare, case: Case, device: torch.device) -> None:
    """Another package on a small version of a case.

    Raises:
        BackendError: It computes something else.
    """
    small = next(_small_versions((case,)))
    found = errors(prepare, small, device, reference_on_cpu)
    for what, error in found.items():
        if not error <= PEERS_AT_MOST[case.dtype]:
            raise BackendError(
                f"{name} computes something else ({what} is off by {error:.1e} at {_in_words(case)}); "
                "the comparison would be void."
            )


def check_at_size(case: Case, arguments: Arguments, backend: str) -> dict[str, float]:
    """The benchmarked shape itself: a few channels of every group's first, computed again in float64.

    dB and dC are sums over all channels and are left to the small cases.

    Raises:
        BackendError: The backend is wrong there.
    """
    dy = cotangent(arguments)
    got = _after_poison(Ours(arguments, backend), dy)
    few = _few_channels(case, arguments)
    truth = reference(few, dy[..., : few["u"].shape[-1]], "portable")  # pyright: ignore[reportOptionalMemberAccess]
    found = {}
    for name, want in truth.items():
        if name not in ("dB", "dC"):
            found[name] = error_of(_first(got[name], want), want).largest
    wrong = problems(found, case.dtype)
    if wrong:
        raise BackendError(f"selective_scan on {backend} is wrong at {case.tag}: {'; '.join(wrong)}.")
    return found


def _few_channels(case: Case, arguments: Arguments) -> Arguments:
    """The first channels of the first group."""
    n = min(N_CHECKED, case.d // case.groups)
    few: Arguments = {}
    for name, value in arguments.items():
        if value is None:
            few[name] = None
        elif name in ("B", "C"):
            few[name] = value[:, :, :1]
        else:
            few[name] = value[:n] if name in ("A", "D", "delta_bias") else value[..., :n]
    return few


def _first(got: Tensor, want: Tensor) -> Tensor:
    """The part of a result that `want` holds."""
    return got[tuple(slice(0, size) for size in want.shape)]


def _small_versions(cases: tuple[Case, ...]) -> Iterator[Case]:
    """Small shapes for every kernel that the cases select."""
    for n, groups, dtype, gate in dict.fromkeys(case.kind for case in cases):
        for batch, channels, length in SMALL:
            yield Case("small", batch, channels * groups, length, n, groups, dtype, gate)


def _in_words(case: Case) -> str:
    groups = f" groups={case.groups}" if case.groups > 1 else ""
    return f"n={case.n}{groups} {case.dtype}{' with gate' if case.gate else ''}"


def cotangent(arguments: Arguments) -> Tensor:
    """A fixed gradient of y: one taken from y itself would carry its rounding into every error."""
    u = arguments["u"]
    assert u is not None
    generator = torch.Generator(u.device).manual_seed(7)
    return torch.randn(u.shape, generator=generator, dtype=u.dtype, device=u.device)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block fresh memory is not-a-number, so that an output that is not written cannot pass."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _after_poison(prepared: Ours, dy: Tensor) -> dict[str, Tensor]:
    """Results of a second run, in memory where those of the first one were overwritten with not-a-number."""
    for value in results(prepared, dy).values():
        value.fill_(torch.nan)
    return results(prepared, dy)
