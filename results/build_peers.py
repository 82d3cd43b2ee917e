"""Build other packages' scan kernels, for timing them beside ours on the same GPU in the same process.

    MAMBA_SKIP_CUDA_BUILD=TRUE pip download mamba_ssm==2.3.2.post1 --no-deps --no-binary mamba_ssm --no-build-isolation
    git clone --depth 1 https://github.com/MzeroMiko/VMamba
    python results/build_peers.py --mamba-ssm mamba_ssm-2.3.2.post1.tar.gz --vmamba VMamba --out peers --check

The short convolution of the official models, which `bench vision` takes for theirs, is built as well by
`--causal-conv1d causal_conv1d-1.6.1.tar.gz` (downloaded alike, CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE).

With PYTHONPATH=peers the benchmarks find them. It takes nvcc of PyTorch's CUDA version, a C++ compiler and ninja. The
kernels are the packages' own, compiled with their own flags for one architecture; of their many instances those are
built that take real A, and B and C that vary in time (float32, bfloat16, float16, forward and backward). A source text
that is not as expected stops the build.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils import cpp_extension

from selectra.bench import peers
from selectra.bench.calls import Ours, chosen_backend
from selectra.bench.gate import reference_on_cpu
from selectra.bench.shapes import DTYPES, Case
from selectra.bench.vision_peers import CONV
from selectra.errors import ConfigError

# Both packages' own, less their lists of architectures and their talk.
NVCC_FLAGS = [
    "-O3",
    *(f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS")),
    *(f"-U__CUDA_NO_BFLOAT16{name}__" for name in ("_OPERATORS", "_CONVERSIONS", "2_OPERATORS", "2_CONVERSIONS")),
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
    "-lineinfo",
]
TYPES = {"fp32": "float", "bf16": "at::BFloat16", "fp16": "at::Half"}
FILES, KERNELS = "csrc", "csrc/selective_scan"
ALWAYS_VARIABLE = r"""
#include <c10/util/Exception.h>
#define ALWAYS_VARIABLE(COND, CONST_NAME, ...)                                       \
    [&] {                                                                            \
        TORCH_CHECK(COND, "this build takes only B and C that vary in time");        \
        constexpr bool CONST_NAME = true;                                            \
        return __VA_ARGS__();                                                        \
    }()
"""
# Batch, channels in a group, positions: odd, and one length beyond the 2048 positions that a block takes at a time.
CHECKED = ((2, 33, 71), (1, 24, 515), (1, 8, 2049))
COLUMNS = ("y", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias")
console = Console(width=120)


class Peer(NamedTuple):
    """One package: its module's name, the files to compile, its version."""

    module: str
    sources: list[Path]
    version: str


def main(
    out: Annotated[Path, typer.Option(help="Folder for the modules; it goes on PYTHONPATH.")],
    mamba_ssm: Annotated[Path | None, typer.Option(help="mamba_ssm's source distribution.")] = None,
    vmamba: Annotated[Path | None, typer.Option(help="A checkout of VMamba, or a tar file of one.")] = None,
    causal_conv1d: Annotated[Path | None, typer.Option(help="causal_conv1d's source distribution.")] = None,
    arch: Annotated[
        str | None, typer.Option(help="Compute capability, such as 9.0; else that of the GPU here.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Then show everybody's errors against float64.")] = False,
) -> None:
    """Build what is given, at the same time, into one folder."""
    if arch is None:
        if not torch.cuda.is_available():
            raise typer.BadParameter("there is no GPU here to build for; name its architecture: --arch 9.0")
        arch = ".".join(map(str, torch.cuda.get_device_capability()))
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    # ninja may lie beside the interpreter of an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    given = ((reduce_mamba_ssm, mamba_ssm), (reduce_vmamba, vmamba), (take_causal_conv1d, causal_conv1d))
    with ThreadPoolExecutor() as pool:
        for job in [pool.submit(build, reduce, source, out, arch) for reduce, source in given if source is not None]:
            console.print_json(data=job.result())
    console.print(f"{time.perf_counter() - start:.0f} s")
    if check:
        show_errors(torch.device("cuda"))


def build(reduce: Callable[[Path], Peer], source: Path, out: Path, arch: str) -> dict[str, str]:
    """Unpack, reduce and compile one package; returns what was built, which is also written beside the module."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        root = unpack(source, Path(name) / "source")
        original = checksum(source if source.is_file() else kernels_of(root))
        peer = reduce(root)
        objects = Path(name) / "build"
        objects.mkdir()
        module = cpp_extension.load(
            peer.module,
            [str(path) for path in peer.sources],
            extra_cflags=["-O3"],
            extra_cuda_cflags=NVCC_FLAGS,
            extra_include_paths=[str(kernels_of(root))],
            build_directory=str(objects),
        )
        assert isinstance(module, ModuleType)
        # A check in this process takes this one: the copy would bring its symbols a second time.
        sys.modules[peer.module] = module
        shutil.copy2(objects / f"{peer.module}.so", out)
    facts = {
        "module": peer.module,
        "version": peer.version,
        "sha256": original,
        "architecture": arch,
        "nvcc": nvcc_version(),
        "torch": torch.__version__,
        "flags": " ".join(NVCC_FLAGS),
        "seconds": f"{time.perf_counter() - start:.0f}",
    }
    (out / f"{peer.module}.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def unpack(source: Path, target: Path) -> Path:
    """A copy of the package's tree; returns the folder in it that holds `csrc/selective_scan`, or else `csrc`."""
    if source.is_dir():
        for found in source.rglob(KERNELS):
            shutil.copytree(found.parent.parent, target)
            return target
    else:
        with tarfile.open(source) as archive:
            archive.extractall(target, filter="data")
        for found in (*target.rglob(KERNELS), *target.rglob(FILES)):
            return found.parent if found.name == FILES else found.parent.parent
    raise ConfigError(f"there is no {KERNELS} in {source}.")


def kernels_of(root: Path) -> Path:
    """The folder of the files that are compiled."""
    return root / (KERNELS if (root / KERNELS).is_dir() else FILES)


def reduce_mamba_ssm(root: Path) -> Peer:
    """Leave out complex A, and B and C that are constant in time: 180 of 1,440 kernels stay."""
    folder = root / KERNELS
    switch = folder / "static_switch.h"
    switch.write_text(switch.read_text() + ALWAYS_VARIABLE)
    for name in ("fwd", "bwd"):
        for letter in "BC":
            old = rf"BOOL_SWITCH\((params\.is_variable_{letter}, kIsVariable{letter}, )"
            replace(folder / f"selective_scan_{name}_kernel.cuh", old, r"ALWAYS_VARIABLE(\1")
    dispatch = r"\} else if \(WTYPE == at::ScalarType::ComplexFloat\) \{.*\n.*c10::complex<float>;.*\n.*__VA_ARGS__.*\n"
    # What is left refuses a complex A, by the error that follows for other types.
    replace(folder / "selective_scan.cpp", rf" *{dispatch} *(?=\}} else)", "    ")
    for dtype in TYPES:
        replace(folder / f"selective_scan_fwd_{dtype}.cu", r"template void selective_scan_fwd_cuda<.*complex_t>.*", "")
    names = [f"{name}_{dtype}{end}.cu" for name, end in (("fwd", ""), ("bwd", "_real")) for dtype in TYPES]
    sources = [folder / "selective_scan.cpp", *(folder / f"selective_scan_{name}" for name in names)]
    version = re.search(r'__version__ = "(.+)"', (root / "mamba_ssm" / "__init__.py").read_text())
    return Peer(peers.MAMBA_SSM, sources, version[1] if version else "unknown")


def reduce_vmamba(root: Path) -> Peer:
    """Only outputs in the inputs' type; what CUDA 13 has no longer is written as mamba_ssm writes it."""
    folder = root / KERNELS
    scan = folder / "reverse_scan.cuh"
    replace(scan, r"cub::LaneId\(\)", "threadIdx.x & 0x1f")
    replace(scan, r"cub::CTA_SYNC\(\)", "__syncthreads()", times=3)
    # A function without its return statement may be compiled to anything; mamba_ssm has added it.
    body = r"(inclusive = scan_op\(inclusive, input\[i\]\);\n +output\[i\] = inclusive;\n    \}\n)(\})"
    replace(scan, body, r"\1    return inclusive;\n\2")
    oflex = folder / "cusoflex"
    sources = [oflex / "selective_scan_oflex.cpp"]
    for name in ("fwd", "bwd"):
        wide = rf"selective_scan_{name}_cuda<1, input_t, weight_t, float>\(params, stream\);"
        replace(sources[0], wide, 'TORCH_CHECK(false, "this build writes outputs in the type of the inputs only");')
        # One file an instance, so that they compile at the same time.
        text = (oflex / f"selective_scan_core_{name}.cu").read_text()
        include = find(text, rf'#include "selective_scan_{name}_kernel_oflex.cuh"')
        for dtype, c_type in TYPES.items():
            instance = find(text, rf"template void selective_scan_{name}_cuda<1, {c_type}, float, {c_type}>.*;")
            sources.append(oflex / f"{name}_{dtype}.cu")
            sources[-1].write_text(f"{include}\n{instance}\n")
    version = re.search(r'version="(.+)"', (root / "setup.py").read_text())
    return Peer(peers.VMAMBA, sources, version[1] if version else "unknown")


def take_causal_conv1d(root: Path) -> Peer:
    """All of it."""
    names = ("causal_conv1d.cpp", *(f"causal_conv1d_{name}.cu" for name in ("fwd", "bwd", "update")))
    version = re.search(r'__version__ = "(.+)"', (root / "causal_conv1d" / "__init__.py").read_text())
    return Peer(CONV, [root / FILES / name for name in names], version[1] if version else "unknown")


def replace(path: Path, old: str, new: str, times: int = 1) -> None:
    """Replace a pattern that must stand in the file exactly so many times."""
    text, found = re.subn(old, new, path.read_text())
    if found != times:
        raise ConfigError(f"{path.name}: expected '{old}' {times} times, found it {found} times; another version?")
    path.write_text(text)


def find(text: str, pattern: str) -> str:
    """The text of a pattern that must be there."""
    found = re.search(pattern, text)
    if found is None:
        raise ConfigError(f"expected '{pattern}' in the sources and did not find it; another version?")
    return found[0]


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder one after another in the order of their names."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def nvcc_version() -> str:
    """Release of the compiler that PyTorch finds."""
    nvcc = Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return find(said, r"V[\d.]+")


def show_errors(device: torch.device) -> None:
    """Everybody's rms error against float64, of y and of every gradient, for each type and size."""
    table = Table(title="rms errors, state size 16", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in ("", "b, d, l", "", *COLUMNS):
        table.add_column(column, no_wrap=True)
    for dtype in DTYPES:
        for batch, channels, length in CHECKED:
            for gate, groups in ((True, 1), (False, 2)):
                case = Case("", batch, channels * groups, length, 16, groups, dtype, gate)
                for contender, errors in errors_of(case, device).items():
                    row = (f"{errors[name].rms:.1e}" if name in errors else "" for name in COLUMNS)
                    table.add_row(dtype, f"{batch}, {case.d}, {length}", contender, *row)
    console.print(table)


def errors_of(case: Case, device: torch.device) -> dict[str, dict[str, peers.Error]]:
    """For each contender that takes the case, the error of y and of every gradient."""
    built = {"mamba_ssm": peers.mamba_ssm_scan(), "VMamba": None if case.gate else peers.vmamba_scan()}
    running = {name: prepare for name, prepare in built.items() if prepare is not None}
    arguments = case.arguments(device)
    backend = chosen_backend(arguments)
    running[f"ours, {backend}"] = lambda arguments: Ours(arguments, backend)
    generator = torch.Generator(device).manual_seed(1)
    dy = torch.randn(case.b, case.l, case.d, generator=generator, dtype=DTYPES[case.dtype], device=device)
    found = peers.precision(running, arguments, dy, reference_on_cpu(arguments, dy))
    return {contender: {name: errors[contender] for name, errors in found.items()} for contender in running}


if __name__ == "__main__":
    typer.run(main)
