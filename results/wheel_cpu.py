"""Build the wheel, install it into a new environment, and run its kernels there without a compiler in reach.

    python results/wheel_cpu.py --out results

In the new environment, with nothing on PATH but its own commands: `selectra doctor`, then the scan and all its
gradients and the convolution's against the float64 reference with every instruction set that the processor runs, each
forced by SELECTRA_CPU_ISA. Exits with 1 where anything is wrong. pip brings the wheel's dependencies.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).parents[1]
EXAM = """
import shutil, torch
from selectra.bench import check
from selectra.ops import causal_conv1d, native, selective_scan

assert not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cc", "gcc", "clang", "cmake", "ninja"))
status, cpu, worst = native.status(), torch.device("cpu"), {}
assert status.available, status
calls = {
    "selective_scan": (selective_scan, check.scan_arguments(2, 33, 71, 16, cpu), {"delta_softplus": True}),
    "causal_conv1d": (causal_conv1d, check.conv_arguments(2, 33, 71, 4, cpu), {"activation": "silu"}),
}
for name, (op, arguments, flags) in calls.items():
    found = check.errors(op, "cpu", arguments, flags)
    assert not check.problems(found), found
    worst[name] = max(found.values())
said = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
print(f"{status.isa}: outputs and gradients held, worst error of {said} (of {', '.join(status.isas_built)})")
"""


def said_by(*command: str, environment: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """What a command printed; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def examined(folder: Path) -> list[str]:
    """Build, install and run; what was said."""
    building = {**os.environ, "SELECTRA_REQUIRE_NATIVE": "1"}
    said_by(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(folder), environment=building)
    wheel = next(folder.glob("selectra-*.whl"))
    venv.create(folder / "bare", with_pip=True)
    programs = folder / "bare" / "bin"
    said_by(str(programs / "pip"), "install", str(wheel))
    # Nothing of this environment, and no compiler: the wheel must carry all it needs.
    bare = {"PATH": str(programs), "HOME": str(folder), "LANG": "C.UTF-8", "COLUMNS": "160"}
    doctor = said_by(str(programs / "selectra"), "doctor", environment=bare, folder=folder)
    lines = [f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB"]
    built = re.findall(r"baseline|avx2|avx512", said_by(str(programs / "python"), "-c", EXAM, environment=bare))
    for isa in sorted(set(built), key=built.index):
        forced = {**bare, "SELECTRA_CPU_ISA": isa}
        lines.append(said_by(str(programs / "python"), "-c", EXAM, environment=forced, folder=folder))
    told = doctor.replace(str(folder), "...")
    return [*lines, "selectra doctor:", *(f"    {line.rstrip()}" for line in told.splitlines())]


def main(out: Annotated[Path, typer.Option(help="The record goes into this folder.")] = Path("results")) -> None:
    """Examine the wheel and write the record."""
    with tempfile.TemporaryDirectory() as temporary:
        lines = ["python results/wheel_cpu.py", f"{datetime.now(UTC):%Y-%m-%d}", *examined(Path(temporary).resolve())]
    file = out / f"wheel_cpu_{datetime.now(UTC):%Y-%m-%d}.txt"
    file.write_text("\n".join(lines) + "\n")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print("\n".join(lines))
    console.print(f"{file} written")


if __name__ == "__main__":
    typer.run(main)
