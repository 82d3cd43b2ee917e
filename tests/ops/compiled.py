"""The compiled library in tests: which need it, where it lies, a fresh interpreter that uses it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from selectra.ops import native
from selectra.ops.native.library import Library, library

needs_library = pytest.mark.skipif(not native.status().available, reason=f"{native.status().problem}")
needs_checksum = pytest.mark.skipif(
    not native.status().available or sys.platform != "linux" or shutil.which("objcopy") is None,
    reason="builds carry a checksum on Linux, where objcopy is",
)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

RUN_A_SCAN = """
import torch
from selectra.ops.native import status
from selectra.ops.selective_scan import selective_scan
u, delta, B, C = torch.randn(4, 64, 256), torch.rand(4, 64, 256), torch.randn(4, 64, 16), torch.randn(4, 64, 16)
A = -torch.ones(256, 16)
def scan():
    return selective_scan(u, delta, A, B, C)
"""


def run_python(code: str, environment: dict[str, str] | None = None, where: Path | None = None) -> str:
    """Standard output and log of a fresh interpreter, started in the folder `where`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=where,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def library_path() -> Path:
    path = native.status().path
    assert path is not None
    return Path(path)


@pytest.fixture
def loaded() -> Iterator[Library]:
    """The library; the build in use is put back afterwards."""
    found = library()
    build = found.build
    yield found
    found.build = build
