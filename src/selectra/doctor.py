"""`selectra doctor`: what is installed, which backend each operator gets and why, if it is right, how fast it is."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selectra.bench import check
from selectra.bench.timing import interleaved
from selectra.ops import causal_conv1d, cuda, selective_scan
from selectra.ops.cuda import cache
from selectra.ops.dispatch import Op, environment_problem
from selectra.ops.native.library import NOT_BUILT, status
from selectra.train.record import environment

SECONDS_EACH = 0.4


@dataclass(frozen=True)
class Exam:
    """One operator: small odd inputs to check it on, and the size at which its speed is measured."""

    op: Op[Any, Any, Any]
    flags: dict[str, Any]
    small: Callable[[torch.device], dict[str, Tensor]]
    large: Callable[[torch.device], dict[str, Tensor]]
    large_size: str


EXAMS = (
    Exam(
        selective_scan,
        {"delta_softplus": True},
        lambda device: check.scan_arguments(2, 33, 71, 16, device),
        lambda device: check.scan_arguments(1, 384, 196, 16, device),
        "b=1 d=384 l=196 n=16",
    ),
    Exam(
        causal_conv1d,
        {"activation": "silu"},
        lambda device: check.conv_arguments(2, 33, 71, 4, device),
        lambda device: check.conv_arguments(1, 384, 196, 4, device),
        "b=1 d=384 l=196 k=4",
    ),
)


@dataclass
class Findings:
    """What is wrong, in words; and what is only missing."""

    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def doctor(console: Console) -> int:
    """Print the findings; 0 where all is right, 1 where something is wrong."""
    findings = Findings()
    _show_installation(console, findings)
    problem = environment_problem()
    if problem is not None:
        findings.wrong.append(problem)
    else:
        # A wish for an instruction set that cannot be met is wrong already; every CPU call raises it.
        devices = [d for d in _devices() if not (d.type == "cpu" and status().refuses_wish)]
        for device in devices:
            _examine_device(device, console, findings)
        console.print("error: outputs / gradients, against the float64 reference, relative to the maximum")
        console.print(
            "ms: forward / training step in float32, " + "; ".join(f"{e.op.name} {e.large_size}" for e in EXAMS)
        )
    for text in findings.missing:
        console.print(f"[yellow]missing[/yellow]  {text}", soft_wrap=True, highlight=False)
    for text in findings.wrong:
        console.print(f"[red]wrong[/red]    {text}", soft_wrap=True, highlight=False)
    if not findings.wrong:
        console.print("[green]All checks passed.[/green]")
    return 1 if findings.wrong else 0


def _show_installation(console: Console, findings: Findings) -> None:
    facts = environment()
    hardware, versions = facts["hardware"], facts["versions"]
    console.print("  ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()))
    threads = f"{hardware['cores']} cores, torch uses {hardware['threads']} threads"
    console.print(f"{hardware['processor']}, {threads}, {hardware['system']}")
    console.print(f"GPUs: {', '.join(hardware['gpus']) or 'none'}")
    native = status()
    if native.available:
        console.print(
            f"compiled CPU kernels: {native.isa} of {', '.join(native.isas_built)}; {native.path}", soft_wrap=True
        )
        if native.note:
            console.print(f"[yellow]note[/yellow]     {native.note}", soft_wrap=True, highlight=False)
    elif native.problem == NOT_BUILT and not os.environ.get("SELECTRA_REQUIRE_NATIVE"):
        findings.missing.append(f"compiled CPU kernels: {native.problem}. Until then CPU calls run on `portable`.")
    else:
        findings.wrong.append(f"compiled CPU kernels: {native.problem}")
    _show_cuda(console, findings)


def _show_cuda(console: Console, findings: Findings) -> None:
    """What there is for the CUDA kernels; nothing where there is no GPU that could run them."""
    found = cuda.status()
    if found.gpu_unused:
        findings.missing.append(f"CUDA kernels: {found.problem}. Until then no call runs on them.")
    if not found.available:
        return
    kept = "kept nowhere" if found.folder is None else f"{cache.count()} compiled, in {found.folder}"
    console.print(f"CUDA kernels: NVRTC {found.nvrtc}, driver for CUDA {found.driver}; {kept}", soft_wrap=True)
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), cuda.capability(index)
        console.print(f"cuda:{index}: {name}, compute capability {major}.{minor}")
        problem = cuda.refusal(index)
        if problem is not None:
            findings.missing.append(f"CUDA kernels: {problem}. Calls there run on `portable`.")


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return devices


def _examine_device(device: torch.device, console: Console, findings: Findings) -> None:
    table = Table(title=f"{device}: which backend a call gets", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("operator", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    table.add_column("takes calls", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    for exam in EXAMS:
        reasons = exam.op.explain(**exam.small(device), **exam.flags)
        chosen = exam.op.backend_for(**exam.small(device), **exam.flags)
        for backend, reason in reasons.items():
            # The reference is what the others are held to.
            measured = _examine(exam, backend, device, findings) if reason == "ok" and backend != "reference" else ()
            verdict = "yes, gets them" if backend == chosen else "when asked for" if reason == "ok" else reason
            table.add_row(exam.op.name, backend, verdict, *measured)
        table.add_section()
    console.print(table)


def _examine(exam: Exam, backend: str, device: torch.device, findings: Findings) -> tuple[str, ...]:
    """Errors and times of one backend, as table cells."""
    found = check.errors(exam.op, backend, exam.small(device), exam.flags)
    findings.wrong += [f"{exam.op.name} on {backend}, {device}: {problem}" for problem in check.problems(found)]
    outputs = max(error for name, error in found.items() if name in ("y", "final state"))
    gradients = max(error for name, error in found.items() if name not in ("y", "final state"))
    arguments = exam.large(device)
    leaves = list(arguments.values())
    detached = {name: value.detach() for name, value in arguments.items()}

    def training() -> object:
        return torch.autograd.grad(exam.op(**arguments, **exam.flags).sum(), leaves)

    with exam.op.using(backend):
        runs = {"forward": lambda: exam.op(**detached, **exam.flags), "training": training}
        times = interleaved(runs, SECONDS_EACH, device)
    milliseconds = [f"{times[kind].median * 1e3:.2f}" for kind in ("forward", "training")]
    return (f"{outputs:.0e} / {gradients:.0e}", " / ".join(milliseconds))
