"""Seeds, poisoned memory, and the only place outside .ci/run that knows where data may lie beside a checkout."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("PYTEST_XDIST_WORKER"):
    # One process a core already: more threads would only wait for each other. Read when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if os.environ.get("SELECTRA_CHECK_SHAPES"):
    # Before these rooms are imported; torch.compile cannot trace the hook, so `-m "not compile"` goes with it.
    from jaxtyping import install_import_hook

    install_import_hook(["selectra.layers", "selectra.mixers", "selectra.models"], "beartype.beartype")

SHARED = Path(__file__).parents[2] / "shared"
for variable, folder in (("SELECTRA_DATA", SHARED / "data"), ("SELECTRA_GOLDEN", SHARED / "golden")):
    if folder.is_dir():
        os.environ.setdefault(variable, str(folder))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an output that a kernel forgets to write cannot pass."""
    # Filling is on by default where deterministic algorithms are.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def golden() -> Path:
    """Folder of the stored outputs of official implementations."""
    return _folder("SELECTRA_GOLDEN")


@pytest.fixture
def data_folder() -> Path:
    """Folder of the real data sets."""
    return _folder("SELECTRA_DATA")


def _folder(variable: str) -> Path:
    text = os.environ.get(variable)
    if not text or not Path(text).is_dir():
        pytest.skip(f"{variable} does not name a folder")
    return Path(text)
