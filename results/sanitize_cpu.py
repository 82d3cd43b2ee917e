"""Run the CPU kernels' check in plain C++ under sanitizers and valgrind.

    cmake -S . -B build/native && cmake --build build/native
    python results/sanitize_cpu.py --library build/native/libselectra_cpu.so --out results

AddressSanitizer and UndefinedBehaviorSanitizer watch all x86 builds, ThreadSanitizer the baseline build on the
library's own threads; valgrind runs the library that is given, its baseline and AVX2 builds (it knows no AVX-512).
`--objects` keeps what is compiled for the next run. Exits with 1 where anything is reported. Needs g++ and valgrind.
"""

import re
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from selectra.ops import native

SOURCE = Path(native.__file__).parent
CHECK = Path(__file__).parents[1] / "tests" / "ops" / "native" / "check.cpp"
# As in CMakeLists.txt, less optimised.
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-w")
BUILDS = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
SANITIZERS = {
    "address,undefined": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSELECTRA_X86"),
    "thread": ("-fsanitize=thread",),
}
VALGRIND = ("valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite")
Said = tuple[str, bool, str]


def compiled(target: Path, *arguments: str) -> Path:
    """A file that g++ makes, unless it is there."""
    if not target.is_file():
        subprocess.run(["g++", *FLAGS, f"-I{SOURCE}", *arguments, "-o", str(target)], check=True)
    return target


def sanitized(folder: Path, name: str) -> Path:
    """The check, linked with the kernels, all of it under a sanitizer."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = SANITIZERS[name]
    builds = BUILDS if "-DSELECTRA_X86" in flags else {"baseline": BUILDS["baseline"]}
    kernels = [
        compiled(
            folder / f"{source}_{build}_{number}.o",
            *(*flags, "-fno-trapping-math", f"-march={machine}", "-c", str(SOURCE / f"{source}.cpp")),
            *("-fno-exceptions", "-fno-rtti", f"-DSELECTRA_REAL={number}", f"-DSELECTRA_KERNELS={build}_{number}"),
        )
        for build, machine in builds.items()
        for number in ("float", "double")
        for source in ("kernels", "cross")
    ]
    sources = [*kernels, SOURCE / "library.cpp", SOURCE / "threads.cpp", CHECK]
    return compiled(folder / "check", *flags, *(str(file) for file in sources), "-lpthread")


def said_by(what: str, *command: str) -> Said:
    """What a command printed, and whether it found nothing."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = (done.stdout + done.stderr).strip().replace("\n", "; ")
    clean = done.returncode == 0 and " 0 failures" in text
    return f"{what} ({time.perf_counter() - begun:.0f} s)", clean, text


def under_valgrind(folder: Path, library: Path) -> Said:
    """The library itself, as it is shipped; of its builds those that valgrind runs."""
    check = folder / "check.cpp"
    check.write_text(CHECK.read_text().replace("!selectra_cpu_build_runs(build)", "build > 1"))
    program = compiled(folder / "check_library", str(check), str(library), f"-Wl,-rpath,{library.parent}")
    return said_by(f"valgrind, {library.name}", *VALGRIND, str(program))


def main(
    library: Annotated[Path, typer.Option(help="The library that valgrind runs.")],
    out: Annotated[Path, typer.Option(help="The record goes into this folder.")] = Path("results"),
    objects: Annotated[Path | None, typer.Option(help="Keep what is compiled here.")] = None,
) -> None:
    """Check the kernels and write the record."""
    with tempfile.TemporaryDirectory() as temporary:
        found = [
            said_by(name, str(sanitized((objects or Path(temporary)) / name.replace(",", "_"), name)))
            for name in SANITIZERS
        ]
        found.append(under_valgrind(Path(temporary), library.resolve()))
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = found_name[1] if (found_name := re.search(r"model name\s*: (.*)", cpuinfo)) else "unknown"
    lines = [
        "python results/sanitize_cpu.py",
        f"{name}; {datetime.now(UTC):%Y-%m-%d}",
        *(f"{what}: {'nothing found' if clean else 'FOUND'}: {text}" for what, clean, text in found),
    ]
    hardware = re.sub(r"\W+", "_", name).strip("_").lower()
    file = out / f"sanitizer_cpu_{hardware}_{datetime.now(UTC):%Y-%m-%d}.txt"
    file.write_text("\n".join(lines) + "\n")
    console = Console(highlight=False)
    console.print("\n".join(lines))
    console.print(f"{file} written")
    raise typer.Exit(not all(clean for _, clean, _ in found))


if __name__ == "__main__":
    typer.run(main)
