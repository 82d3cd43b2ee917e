"""What a process knows of kernels, and what lies on the disk."""

from pathlib import Path

import pytest

from selectra.ops.cuda import cache, compiler, runtime


def nvrtc_problem() -> str | None:
    try:
        compiler.version()
    except (ImportError, RuntimeError) as error:
        return f"NVRTC cannot be loaded here: {error}"
    return None


needs_nvrtc = pytest.mark.skipif(nvrtc_problem() is not None, reason=str(nvrtc_problem()))


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a process knows of kernels."""
    for name in ("_kernels", "_modules", "_cubins"):
        monkeypatch.setattr(runtime, name, runtime.Once())
    monkeypatch.setattr(runtime, "_said", [])
    monkeypatch.setattr(cache, "_said", set())


def kept() -> list[Path]:
    place = cache.folder()
    assert place is not None
    return sorted(place.iterdir()) if place.is_dir() else []
