"""Build the CPU kernels for ARM as the wheel does, and run their check in plain C++ on an emulated machine.

    python results/neon_cpu.py --out results

The library is built by CMake with a cross compiler, all flags as in CMakeLists.txt; the check is linked to it and run
by qemu. Exits with 1 where anything fails. Needs cmake and, as Debian names them, g++-aarch64-linux-gnu and qemu-user.
"""

import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "selectra" / "ops" / "native"
CHECK = ROOT / "tests" / "ops" / "native" / "check.cpp"
COMPILER, MACHINE, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
TARGET = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")


def said_by(*command: str) -> str:
    """What a command printed; it must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def built(folder: Path) -> tuple[Path, str]:
    """The check, linked to the library, and how the library's file names itself."""
    said_by("cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *TARGET)
    said_by("cmake", "--build", str(folder), "--parallel")
    library, check = folder / "libselectra_cpu.so", folder / "check"
    flags = ("-O1", "-std=c++17", "-w", f"-I{SOURCE}", f"-Wl,-rpath,{folder}")
    said_by(COMPILER, *flags, str(CHECK), str(library), "-o", str(check))
    return check, said_by("file", "-b", str(library)).split(", dynamically")[0]


def main(
    out: Annotated[Path, typer.Option(help="The record goes into this folder.")] = Path("results"),
    build: Annotated[Path | None, typer.Option(help="Build here, and keep what is built.")] = None,
) -> None:
    """Build, run and write the record."""
    with tempfile.TemporaryDirectory() as temporary:
        check, kind = built((build or Path(temporary)).resolve())
        begun = time.perf_counter()
        done = subprocess.run((MACHINE, "-L", SYSTEM, str(check)), capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begun
    text = (done.stdout + done.stderr).strip().replace("\n", "; ")
    clean = done.returncode == 0 and " 0 failures" in text
    lines = [
        "python results/neon_cpu.py",
        f"{datetime.now(UTC):%Y-%m-%d}",
        said_by(COMPILER, "--version").splitlines()[0],
        said_by(MACHINE, "--version").splitlines()[0],
        f"library: {kind}",
        f"check.cpp on {MACHINE} ({seconds:.0f} s): {'every comparison held' if clean else 'FAILED'}: {text}",
    ]
    file = out / f"neon_cpu_qemu_{datetime.now(UTC):%Y-%m-%d}.txt"
    file.write_text("\n".join(lines) + "\n")
    console = Console(highlight=False)
    console.print("\n".join(lines))
    console.print(f"{file} written")
    raise typer.Exit(not clean)


if __name__ == "__main__":
    typer.run(main)
