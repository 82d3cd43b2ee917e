"""The import hook: what it replaces, what it leaves, what it says, how it goes away, and scripts run under it."""

# pyright: reportMissingImports=false

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selectra import compat
from selectra.compat import stand_in
from selectra.compat.packages import MODULES, homes

REASONS = {stand_in.NOT_INSTALLED, stand_in.NO_GPU}


def write(folder: Path, files: dict[str, str]) -> None:
    """Python files below a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path for packages that pretend to be others'; a GPU that pretends to be there."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    importlib.invalidate_caches()
    return tmp_path


def forget() -> None:
    """Leave no pretending package behind."""
    compat.uninstall()
    for name in list(sys.modules):
        if name.split(".")[0] in {module.split(".")[0] for module in MODULES}:
            del sys.modules[name]


def test_every_name_is_importable(installed: dict[str, str]) -> None:
    assert set(installed) == set(MODULES)
    assert set(installed.values()) <= REASONS
    for name in MODULES:
        module = importlib.import_module(name)
        assert importlib.util.find_spec(name) is not None
        for theirs in homes(name):
            assert getattr(module, theirs) is not None
    import mamba_ssm

    # A submodule is there as an attribute too, as after the package's own imports.
    assert mamba_ssm.modules.mamba_simple.Mamba is mamba_ssm.Mamba  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mamba_ssm.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_not_covered_says_so(installed: dict[str, str]) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"no 'mamba_ssm\.modules\.mamba3'; it covers .*mamba_simple"):
        importlib.import_module("mamba_ssm.modules.mamba3")


def test_idempotent_and_reversible() -> None:
    before, finders = dict(sys.modules), list(sys.meta_path)
    first = compat.install()
    importlib.import_module("mamba_ssm.modules.mamba_simple")
    assert compat.install() == first
    assert len(sys.meta_path) == len(finders) + 1
    compat.uninstall()
    compat.uninstall()
    assert sys.meta_path == finders
    names = {name.split(".")[0] for name in MODULES}
    assert not [name for name in sys.modules if name.split(".")[0] in names and name not in before]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")


def test_says_once_what_it_replaced_and_by_which_backend(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_said", set())
    with caplog.at_level(logging.WARNING, "selectra"):
        for _ in range(2):
            compat.install()
            compat.uninstall()
    assert len(caplog.messages) == 1
    said = caplog.messages[0]
    assert "stands in for mamba_ssm, causal_conv1d" in said and "(not installed)" in said and "backend " in said


def test_a_package_that_works_stays(packages: Path) -> None:
    kernel = "def fwd(): return 'theirs'\n"
    write(packages, {f"{name}.py": kernel for name in stand_in.KERNELS})
    write(packages, {"mamba_ssm/__init__.py": "Mamba = 'theirs'\n", "causal_conv1d/__init__.py": "x = 'theirs'\n"})
    try:
        assert compat.install() == {}
        assert importlib.import_module("mamba_ssm").Mamba == "theirs"
        assert importlib.import_module("selective_scan_cuda").fwd() == "theirs"
        assert "stands in for nothing" in stand_in.describe({})
    finally:
        forget()


def test_a_package_without_its_kernel_keeps_what_needs_none(packages: Path) -> None:
    files = {"__init__": "", "modules/__init__": "", "ops/__init__": "", "ops/selective_scan_interface": "1 / 0\n"}
    files |= {"modules/mamba_simple": "1 / 0\n", "modules/mamba2": "Mamba2 = 'theirs'\n"}
    write(packages, {f"mamba_ssm/{name}.py": text for name, text in files.items()})
    write(packages, {"selective_scan_cuda_core.py": "raise ImportError('undefined symbol: at')\n"})
    try:
        missing = compat.install()
        assert importlib.import_module("mamba_ssm.modules.mamba2").Mamba2 == "theirs"
        assert importlib.import_module("mamba_ssm.modules.mamba_simple").Mamba.__module__ == "selectra.compat.mamba"
        assert importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        assert missing["mamba_ssm.modules.mamba_simple"] == "selective_scan_cuda: not installed"
        assert missing["selective_scan_cuda_core"] == "cannot be loaded: undefined symbol: at"
        assert "mamba_ssm" not in missing and "mamba_ssm.modules.mamba2" not in missing
        # What is theirs and missing is theirs to say.
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'mamba_ssm\.modules\.mamba3'"):
            importlib.import_module("mamba_ssm.modules.mamba3")
    finally:
        forget()


def test_without_a_gpu_their_packages_compute_nothing(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(packages, {f"{name}.py": "" for name in stand_in.KERNELS})
    write(packages, {"mamba_ssm/__init__.py": "Mamba = 'theirs'\n"})
    assert importlib.import_module("mamba_ssm").Mamba == "theirs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        missing = compat.install()
        assert missing["mamba_ssm"] == missing["selective_scan_cuda"] == stand_in.NO_GPU
        assert importlib.import_module("mamba_ssm").Mamba != "theirs"
        compat.uninstall()
        # What had been imported before is there again.
        assert importlib.import_module("mamba_ssm").Mamba == "theirs"
    finally:
        forget()


def test_a_backend_that_was_asked_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from selectra.ops import selective_scan

    with selective_scan.using("portable"):
        assert "portable" in stand_in.describe({"mamba_ssm": "not installed"})
    with selective_scan.using("cuda"):
        assert "by what was asked for (selective_scan: backend 'cuda'" in stand_in.describe({})


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, below a folder."""
    command = [sys.executable, "-m", "selectra.compat", *arguments]
    root = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_scripts_run_as_they_are(tmp_path: Path) -> None:
    script = """
import sys, helper, torch
from mamba_ssm import Mamba
assert __name__ == "__main__" and helper.here
y = Mamba(8, bimamba_type="v2")(torch.zeros(1, 3, 8))
sys.stdout.write(f"{sys.argv} {tuple(y.shape)}")
sys.exit(3)
"""
    write(tmp_path, {"train/train.py": script, "train/helper.py": "here = True\n"})
    done = run_script(tmp_path, "run", "train/train.py", "--lr", "1", "--help")
    assert done.stdout == "['train/train.py', '--lr', '1', '--help'] (1, 3, 8)", done.stderr
    assert done.returncode == 3
    assert done.stderr.count("selectra.compat stands in for mamba_ssm") == 1
    absent = run_script(tmp_path, "run", "absent.py")
    assert absent.returncode == 2 and "there is no file 'absent.py'" in absent.stderr


def test_a_folder_without_a_package_is_not_taken_for_one(packages: Path) -> None:
    (packages / "mamba_ssm" / "assets").mkdir(parents=True)
    try:
        missing = compat.install()
        assert missing["mamba_ssm"] == stand_in.NOT_INSTALLED
        assert importlib.import_module("mamba_ssm").__version__.endswith("selectra")
    finally:
        forget()


def test_undone_where_somebody_else_took_the_finder_out() -> None:
    compat.install()
    before = list(sys.meta_path)
    sys.meta_path[:] = [finder for finder in before if not isinstance(finder, stand_in.StandIn)]
    compat.uninstall()
    assert not any(isinstance(finder, stand_in.StandIn) for finder in sys.meta_path)
    assert set(compat.install()) and importlib.import_module("mamba_ssm")
    compat.uninstall()
