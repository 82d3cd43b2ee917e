"""From source to machine code, and its cache on the disk."""

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selectra.errors import BackendError
from selectra.ops import cuda
from selectra.ops.cuda import cache, compiler, runtime
from tests.ops.cuda.process import kept, needs_nvrtc, new_process

ONE = (("SCALE", 1),)


@needs_nvrtc
def test_a_source_compiles_for_every_architecture_that_is_asked_for(source: str) -> None:
    cubins = {arch: cuda.compile_only(source, ONE, arch) for arch in ("sm_80", "sm_90")}
    assert all(cubin.startswith(b"\x7fELF") and b"count_shared" in cubin for cubin in cubins.values())
    assert cubins["sm_80"] != cubins["sm_90"]
    assert cuda.compile_only(source, (("SCALE", 3),), "sm_80") != cubins["sm_80"]


@needs_nvrtc
def test_a_source_that_does_not_compile_says_where(source: str) -> None:
    with pytest.raises(
        BackendError, match=r'NVRTC cannot compile .*adder\.cu .*-arch=sm_90(.|\n)*"SCALE" is undefined'
    ):
        cuda.compile_only(source, (), "sm_90")


@needs_nvrtc
def test_headers_come_from_the_package_alone(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(source).with_name("step.cuh").unlink()
    (tmp_path / "step.cuh").write_text("#define STEP 1.0f\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match=r'could not open source file "step\.cuh"'):
        cuda.compile_only(source, ONE, "sm_90")


def test_the_shared_header_is_found_from_every_room(source: str) -> None:
    Path(source).write_text('#include "warp.cuh"\n')
    assert set(compiler.read_unit(source).headers) == {"warp.cuh"}


def test_a_kernel_is_compiled_once_and_then_read(
    source: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runtime.load_or_compile(source, ONE, "sm_90")
    assert runtime.load_or_compile(source, ONE, "sm_90") is first
    new_process(monkeypatch)
    assert runtime.load_or_compile(source, ONE, "sm_90") == first
    assert compiled == ["sm_90"]
    assert [file.name.partition("-")[0] for file in kept()] == ["adder"]


def edit(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def change(folder: Path, _: pytest.MonkeyPatch) -> None:
        with (folder / name).open("a") as file:
            file.write("// something else\n")

    return change


def newer_nvrtc(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "version", lambda: (13, 1))


def nothing(_: Path, __: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "defines", "arch", "again"),
    [
        (nothing, ONE, "sm_90", False),
        (edit("other.cuh"), ONE, "sm_90", False),
        (edit("adder.cu"), ONE, "sm_90", True),
        (edit("step.cuh"), ONE, "sm_90", True),
        (edit("inner.cuh"), ONE, "sm_90", True),
        (nothing, (("SCALE", 2),), "sm_90", True),
        (nothing, (*ONE, ("MORE", "1")), "sm_90", True),
        (nothing, ONE, "sm_80", True),
        (newer_nvrtc, ONE, "sm_90", True),
    ],
    ids=["same", "other file", "source", "header", "header's header", "value", "define", "architecture", "NVRTC"],
)
def test_whatever_may_change_the_machine_code_makes_another_entry(
    source: str,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], None],
    defines: tuple[tuple[str, str | int], ...],
    arch: str,
    again: bool,
) -> None:
    runtime.load_or_compile(source, ONE, "sm_90")
    change(Path(source).parent, monkeypatch)
    new_process(monkeypatch)
    runtime.load_or_compile(source, defines, arch)
    assert len(compiled) == len(kept()) == 1 + again


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b[:-9] + b"\xff" + b[-8:], lambda b: b"x" + b[1:]],
    ids=["truncated", "header alone", "empty", "one byte", "another kind"],
)
def test_a_damaged_entry_is_made_anew(
    source: str,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    cubin = runtime.load_or_compile(source, ONE, "sm_90")
    (file,) = kept()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    new_process(monkeypatch)
    assert runtime.load_or_compile(source, ONE, "sm_90") == cubin
    assert len(compiled) == 2
    assert file.read_bytes() == whole
    assert [record.message for record in caplog.records] == [
        f"The compiled kernel '{file}' is damaged; it is compiled anew."
    ]


@needs_nvrtc
def test_processes_that_compile_at_once_keep_one_whole_entry(source: str) -> None:
    program = (
        "import hashlib, sys\n"
        "from selectra.ops.cuda import runtime\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"cubin = runtime.load_or_compile({source!r}, {ONE!r}, 'sm_90')\n"
        "print(hashlib.sha256(cubin).hexdigest())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=600)[0].strip() for process in processes}
    assert len(answers) == 1
    (file,) = kept()
    cubin = cache.read(file.name)
    assert cubin is not None
    assert hashlib.sha256(cubin).hexdigest() in answers


def test_a_folder_that_cannot_be_written_is_said_once(
    source: str,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file" / "cache"))
    for arch in ("sm_80", "sm_90", "sm_90"):
        assert runtime.load_or_compile(source, ONE, arch)
    assert compiled == ["sm_80", "sm_90"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot be written (Not a directory); SELECTRA_CACHE names another folder" in record.message


def test_a_full_disk_leaves_nothing_behind(source: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, mode: str) -> Any:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    assert runtime.load_or_compile(source, ONE, "sm_90")
    assert kept() == []


def test_where_kernels_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.folder() == tmp_path / "cache" / "kernels"
    monkeypatch.delenv(cache.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "selectra" / "kernels"
    # The XDG specification has relative folders ignored.
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache.folder() == tmp_path / ".cache" / "selectra" / "kernels"


def test_a_user_without_a_home_keeps_nothing(
    source: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in (cache.FOLDER_VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert runtime.load_or_compile(source, ONE, "sm_90")
    assert cache.count() == 0
    assert "there is no home folder for this user; SELECTRA_CACHE names a folder" in caplog.text


@pytest.mark.parametrize(("seconds", "said"), [(0.0, 1), (60.0, 0)])
def test_a_long_first_use_is_said_once(
    source: str,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    said: int,
) -> None:
    monkeypatch.setattr(runtime, "SAID_FROM_SECONDS", seconds)
    with caplog.at_level(logging.INFO, logger="selectra"):
        for arch in ("sm_80", "sm_90"):
            runtime.load_or_compile(source, ONE, arch)
    assert len(caplog.records) == said
    assert all(f"later uses in '{cache.folder()}'" in record.message for record in caplog.records)
