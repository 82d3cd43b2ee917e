"""The kernels against plain loops in C++, without Python: on this machine, and for ARM on an emulated one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selectra.ops import native

HERE = Path(__file__).parent
SOURCE = Path(native.__file__).parent
ARM_COMPILER, ARM_MACHINE = "aarch64-linux-gnu-g++", "qemu-aarch64"
# As in CMakeLists.txt, less optimised.
FLAGS = ("-O1", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w", f"-I{SOURCE}")


def compiled(compiler: str, target: Path, *arguments: str) -> Path:
    subprocess.run([compiler, *FLAGS, *arguments, "-o", str(target)], check=True, capture_output=True, text=True)
    return target


def said_by(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not native.status().available, reason=f"{native.status().problem}")
@pytest.mark.skipif(shutil.which("c++") is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")
def test_every_build_agrees_with_plain_loops(tmp_path: Path) -> None:
    library = native.status().path
    assert library is not None
    folder = f"-Wl,-rpath,{Path(library).parent}"
    said = said_by(str(compiled("c++", tmp_path / "check", str(HERE / "check.cpp"), library, folder)))
    assert "baseline" in said
    assert " 0 failures" in said


@pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None or shutil.which(ARM_MACHINE) is None,
    reason=f"needs {ARM_COMPILER} and {ARM_MACHINE} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_the_arm_build_agrees_with_plain_loops_on_an_emulated_machine(tmp_path: Path) -> None:
    kernels = [
        compiled(
            ARM_COMPILER,
            tmp_path / f"{source}_{number}.o",
            *("-c", str(SOURCE / f"{source}.cpp"), "-fno-exceptions", "-fno-rtti"),
            *(f"-DSELECTRA_REAL={number}", f"-DSELECTRA_KERNELS=baseline_{number}"),
        )
        for number in ("float", "double")
        for source in ("kernels", "cross")
    ]
    sources = [HERE / "check.cpp", SOURCE / "library.cpp", SOURCE / "threads.cpp"]
    check = compiled(ARM_COMPILER, tmp_path / "check", "-static", *(str(file) for file in (*sources, *kernels)))
    assert " 0 failures" in said_by(ARM_MACHINE, str(check))
