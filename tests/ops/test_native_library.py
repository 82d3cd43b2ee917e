"""How the compiled library is found, and refused in words: missing, damaged, foreign, too new for the processor."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from selectra.ops import native
from selectra.ops.native import library as native_library
from selectra.ops.native.intact import damage
from selectra.ops.native.library import ABI_VERSION, ISA_VARIABLE, LIBRARY_VARIABLE, Library
from tests.ops.compiled import (
    RUN_A_SCAN,
    library_path,
    loaded,
    needs_checksum,
    needs_compiler,
    needs_library,
    run_python,
)

__all__ = ["loaded"]


def problem_of(path: Path) -> str:
    """Why the library at `path` cannot be used."""
    loaded = native_library._load(path)
    assert isinstance(loaded, str)
    return loaded


def test_a_missing_library_is_said_in_words_and_calls_still_run(tmp_path: Path) -> None:
    code = f"{RUN_A_SCAN}\nscan(); print('ran', status())"
    said = run_python(code, {LIBRARY_VARIABLE: str(tmp_path / "none.so")})
    assert "ran NativeStatus(available=False" in said
    assert "there is no file" in said


@needs_library
def test_a_bare_file_name_is_taken_from_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library_path()
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv(LIBRARY_VARIABLE, path.name)
    found = native_library._find()
    assert found is not None
    assert isinstance(native_library._load(found), Library)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read")
def test_an_unreadable_library_is_said_in_words() -> None:
    assert "cannot be read (Input/output error)" in problem_of(Path("/proc/self/mem"))


@needs_library
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_library_that_ends_too_early_is_said_in_words(tmp_path: Path, kept: float) -> None:
    whole = library_path().read_bytes()
    damaged = tmp_path / "libselectra_cpu.so"
    damaged.write_bytes(whole[: int(kept * len(whole))])
    said = problem_of(damaged)
    assert "damaged: it ends too early" in said or "cannot be loaded" in said


def with_hole(begin: float, end: float) -> bytes:
    """The library's content with zeros from one share of its length to another."""
    content = bytearray(library_path().read_bytes())
    hole = slice(int(begin * len(content)), int(end * len(content)))
    content[hole] = bytes(hole.stop - hole.start)
    return bytes(content)


@needs_checksum
@pytest.mark.parametrize(("begin", "end"), [(1 / 3, 2 / 3), (0.5, 1.0), (0.02, 0.03), (0.5, 0.5001), (0.0001, 0.9)])
def test_a_hole_in_a_library_is_found(begin: float, end: float) -> None:
    assert damage(with_hole(0, 0)) is None
    assert damage(with_hole(begin, end)) is not None


@needs_checksum
def test_a_library_with_a_hole_is_said_in_words_and_not_called(tmp_path: Path) -> None:
    damaged = tmp_path / "libselectra_cpu.so"
    damaged.write_bytes(with_hole(1 / 3, 2 / 3))
    code = f"{RUN_A_SCAN}\nscan(); print('ran', status())"
    said = run_python(code, {LIBRARY_VARIABLE: str(damaged)})
    assert "ran NativeStatus(available=False" in said
    assert "is damaged: its checksum does not fit its content" in said


@needs_checksum
@pytest.mark.skipif(shutil.which("strip") is None, reason="needs strip")
def test_the_checksum_outlives_strip(tmp_path: Path) -> None:
    stripped = tmp_path / "libselectra_cpu.so"
    subprocess.run(["strip", "-o", str(stripped), str(library_path())], check=True)
    content = bytearray(stripped.read_bytes())
    assert damage(bytes(content)) is None
    content[len(content) // 2] ^= 1
    assert damage(bytes(content)) == "its checksum does not fit its content"


def test_a_foreign_library_is_said_in_words() -> None:
    foreign = Path(torch.__path__[0]) / "lib" / "libc10.so"
    if not foreign.is_file():
        pytest.skip("torch has no libc10.so on this platform")
    assert "is not Selectra's library" in problem_of(foreign)


@needs_compiler
@pytest.mark.parametrize(
    ("version", "message"), [(99, "interface version 99"), (ABI_VERSION, "is incomplete: it lacks selectra_cpu_")]
)
def test_a_library_of_another_version_or_with_a_part_is_said_in_words(
    tmp_path: Path, version: int, message: str
) -> None:
    source, other = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(f"int selectra_cpu_abi_version(void) {{ return {version}; }}")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    assert message in problem_of(other)


@needs_library
def test_an_instruction_set_can_be_forced_and_is_announced_once() -> None:
    said = run_python(f"{RUN_A_SCAN}\nscan(); print(status())", {ISA_VARIABLE: "baseline"})
    assert "isa='baseline'" in said
    assert said.count("SELECTRA_CPU_ISA is set: baseline") == 1


@needs_library
def test_an_unknown_instruction_set_is_said_in_words_and_raised_at_the_first_call() -> None:
    code = f"""{RUN_A_SCAN}
from selectra.errors import BackendError
from selectra.ops import causal_conv1d
print(status())
for call in (scan, lambda: causal_conv1d(u, torch.ones(256, 4))):
    try:
        call()
    except BackendError as error:
        print("raised", error)
"""
    said = run_python(code, {ISA_VARIABLE: "baselin"})
    assert "available=False" in said
    assert said.count("Did you mean 'baseline'?") == 3
    assert said.count("raised SELECTRA_CPU_ISA='baselin'") == 2


@needs_library
def test_a_processor_without_avx2_is_said_in_words_once(caplog, monkeypatch, loaded: Library) -> None:
    if len(loaded.isas) == 1:
        pytest.skip("the library has one build on this platform")
    assert native.status().note is None or not any(loaded.runs[1:])
    monkeypatch.setattr(loaded, "runs", (True, *[False] * (len(loaded.isas) - 1)))
    monkeypatch.setattr(native_library, "_look", lambda: (loaded.path, loaded, None))
    monkeypatch.setattr(native_library._state, "looked", False)
    with caplog.at_level("WARNING", "selectra"):
        notes = [native.status().note for _ in range(2)]
    assert all(note is not None and "has no AVX2" in note for note in notes)
    assert [record.message for record in caplog.records] == [f"Compiled CPU kernels: {notes[0]}."]


@needs_library
def test_an_instruction_set_beyond_the_processor_is_said_in_words(monkeypatch, loaded: Library) -> None:
    if len(loaded.isas) == 1:
        pytest.skip("the library has one build on this platform")
    monkeypatch.setattr(loaded, "runs", (True, *[False] * (len(loaded.isas) - 1)))
    said = native_library._choose_isa(loaded, loaded.isas[-1])
    assert said is not None
    assert "is not supported by this processor; it runs baseline." in said
