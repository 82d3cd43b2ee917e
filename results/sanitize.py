"""Run every CUDA kernel at small odd sizes under NVIDIA's compute-sanitizer, which watches each access to memory.

    python results/sanitize.py --out results/sanitizer_h100_2026-11-22.txt

Four tools: memcheck (addresses), racecheck (shared memory), initcheck (memory that nobody has written), synccheck
(barriers). The kernels are compiled before, without a tool. Exits with 1 where
a tool reports anything. compute-sanitizer comes with the CUDA toolkit, or with the package nvidia-cuda-sanitizer-api.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import add_norm, causal_conv1d, cross_scan, selective_scan
from selectra.ops.cuda import cache

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND, AT_ONCE = 7, 8
USUAL_PLACES = (Path("/usr/local/cuda/bin"),)
Call = tuple[str, Any, dict[str, Any]]


def scan_call(
    length: int, d: int, n: int, dtype: torch.dtype = torch.bfloat16, *, groups: int = 1, batch: int = 2, **more: Any
) -> dict[str, Any]:
    """Leaves of a call; `more` are flags, or names of what is left out."""
    generator = torch.Generator().manual_seed(length * d + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {name: normal(batch, length, d).to(dtype) for name in ("u", "delta", "z")}
    found |= {name: normal(batch, length, groups, n).to(dtype) for name in ("B", "C")}
    found |= {name: normal(d) for name in ("D", "delta_bias")}
    found |= {"A": -normal(d, n).exp(), "initial_state": normal(batch, d, n)}
    leaves: dict[str, Any] = {name: x.cuda().requires_grad_() for name, x in found.items()}
    if more.pop("along_time", False):
        for name in ("u", "delta", "z"):
            leaves[name] = found[name].mT.contiguous().cuda().mT.requires_grad_()
    return leaves | {"delta_softplus": True, "return_final_state": True} | more


def cross_call(
    h: int, w: int, d: int, n: int, dtype: torch.dtype = torch.bfloat16, *, merge: bool = True, **more: Any
) -> dict[str, Any]:
    """Leaves of a call along routes through a grid."""
    generator, k = torch.Generator().manual_seed(h * w * d + n), len(more.get("routes", "four"))

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).cuda()

    found = {"u": leaf(2, h, w, d), "delta": leaf(2, h, w, k, d), "z": leaf(2, h, w, d)}
    found |= {name: leaf(2, h, w, k, n) for name in ("B", "C")}
    found |= {name: leaf(k, d, dtype=torch.float32) for name in ("D", "delta_bias")}
    found["A"] = -leaf(k, d, n, dtype=torch.float32).exp()
    leaves = {name: x.requires_grad_() for name, x in found.items()}
    return leaves | {"delta_softplus": True, "merge": merge} | more


def norm_call(rows: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    """Leaves of a sum with its norm; the stream is float32."""
    shapes = {"x": (rows, d), "residual": (rows, d), "weight": (d,), "bias": (d,)}
    leaves: dict[str, Any] = {name: torch.randn(*shape).cuda() for name, shape in shapes.items()}
    leaves["x"] = leaves["x"].to(dtype)
    return {name: x.requires_grad_() for name, x in leaves.items()}


def calls() -> Iterator[Call]:
    """Name, operator and arguments of every call."""
    mask = (torch.arange(67).repeat(2, 1) % 5 != 3).cuda()
    borders = torch.tensor([0, 3, 3, 41, 67], dtype=torch.int32).cuda()
    state: dict[str, Any] = {"initial_state": None}
    for n in (1, 4, 16, 64):
        yield f"scan, n {n}, channels in eights", selective_scan, scan_call(67, 40, n)
        yield f"scan, n {n}, reverse, odd sizes", selective_scan, scan_call(45, 37, n, torch.float32, reverse=True)
        yield f"scan, n {n}, mask", selective_scan, scan_call(67, 24, n, mask=mask, z=None)
        yield f"scan, n {n}, packed", selective_scan, scan_call(67, 24, n, batch=1, cu_seqlens=borders, **state)
        yield f"scan, n {n}, chunks", selective_scan, scan_call(1057, 24, n, batch=1)
    yield "scan, groups", selective_scan, scan_call(33, 80, 16, torch.float16, groups=2, delta_softplus=False)
    yield "scan, along time", selective_scan, scan_call(67, 20, 16, torch.float32, along_time=True)
    for more in ({}, {"mask": mask}, {"reverse": True}, {"cu_seqlens": borders}):
        batch = 1 if "cu_seqlens" in more else 2
        shapes = {"x": (batch, 67, 40), "weight": (40, 4), "bias": (40,)}
        leaves = {name: torch.randn(*shape).cuda().requires_grad_() for name, shape in shapes.items()}
        yield f"convolution, {', '.join(more) or 'plain'}", causal_conv1d, leaves | {"return_final_state": True} | more
    for n in (1, 16):
        yield f"four routes, n {n}", cross_scan, cross_call(5, 7, 40, n, torch.float32)
        yield f"two routes, n {n}", cross_scan, cross_call(1, 67, 24, n, routes=("right", "left"), merge=False)
    for kind, dtype in (("rms", torch.bfloat16), ("layer", torch.float32)):
        yield f"sum and {kind} norm", add_norm, norm_call(13, 129, dtype) | {"kind": kind}


def run(call: Call) -> None:
    """Forward and backward; nothing but our kernels, and copies."""
    _, op, arguments = call
    found = op(**arguments)
    outputs = (found,) if isinstance(found, Tensor) else found
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    grads = [torch.randn(x.shape).to(x.dtype).cuda() for x in outputs]
    torch.autograd.grad(list(outputs), leaves, grads)
    torch.cuda.synchronize()


def find_sanitizer() -> str:
    """The program.

    Raises:
        ConfigError: It is not installed.
    """
    found = shutil.which("compute-sanitizer")
    places = [found] if found else [str(place / "compute-sanitizer") for place in USUAL_PLACES]
    for place in places:
        if Path(place).is_file():
            return place
    raise ConfigError(
        "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin; the CUDA toolkit has it, and the package "
        "nvidia-cuda-sanitizer-api; --sanitizer names the program."
    )


def under(tool: str, sanitizer: str, limit: float) -> tuple[int, str]:
    """Run all calls under a tool; its exit status and what it said."""
    options = ("--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", "--target-processes", "all")
    command = (sanitizer, *options, sys.executable, __file__, "--calls")
    # Every tensor has memory of its own, so that an access beyond its end is one.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return FOUND, f"not ready after {limit} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-60:])


def main(
    out: Annotated[Path | None, typer.Option(help="Where the record goes.")] = None,
    sanitizer: Annotated[str | None, typer.Option(help="The program, where it is not found.")] = None,
    tools: Annotated[str, typer.Option(help="Which tools, divided by commas.")] = ",".join(TOOLS),
    limit: Annotated[float, typer.Option(help="Seconds for each tool.")] = 600.0,
    calls_alone: Annotated[bool, typer.Option("--calls", help="Only the calls, without a tool.")] = False,
) -> None:
    """Run the calls under every tool and write what the tools said."""
    console = Console()
    if calls_alone:
        for call in calls():
            run(call)
        console.print(f"{sum(1 for _ in calls())} calls")
        return
    program = sanitizer or find_sanitizer()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault(cache.FOLDER_VARIABLE, folder)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(run, calls()))
        chosen = tools.split(",")
        with ThreadPoolExecutor(len(chosen)) as pool:
            found = dict(zip(chosen, pool.map(lambda tool: under(tool, program, limit), chosen), strict=True))
    told = subprocess.run((program, "--version"), capture_output=True, text=True, check=False).stdout.strip()
    lines = [
        f"python results/sanitize.py, {datetime.now(UTC):%Y-%m-%d}",
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Python {platform.python_version()}",
        told.splitlines()[-1] if told else "",
        "",
        *(f"  {name}" for name, _, _ in calls()),
    ]
    for tool, (status, words) in found.items():
        lines += ["", f"== {tool}: {'clean' if status == 0 else f'exit status {status}'}", words]
    console.print("\n".join(lines), highlight=False, markup=False)
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    raise typer.Exit(int(any(status for status, _ in found.values())))


if __name__ == "__main__":
    typer.run(main)
