"""What `selectra doctor` says of the CUDA kernels."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from selectra import doctor
from selectra.ops import cuda

READY = cuda.CudaStatus(True, driver="13.0", nvrtc="13.1", folder=Path("kept"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the doctor without its examinations, on a machine whose CUDA is as told; exit code and text."""

    def run(status: cuda.CudaStatus, gpus: int = 0, refusal: str | None = None) -> tuple[int, str]:
        monkeypatch.setenv("SELECTRA_CACHE", str(tmp_path))
        monkeypatch.setattr(doctor, "_devices", list)
        monkeypatch.setattr(cuda, "status", lambda: status)
        monkeypatch.setattr(cuda, "refusal", lambda index: refusal)
        monkeypatch.setattr(cuda, "capability", lambda index: (9, 0))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
        console = Console(width=200)
        with console.capture() as captured:
            code = doctor.doctor(console)
        return code, captured.get()

    return run


def test_a_machine_without_a_gpu_hears_nothing_of_cuda(said) -> None:
    _, text = said(cuda.CudaStatus(False, "no NVIDIA driver"))
    assert "GPUs: none" in text
    assert "CUDA" not in text


def test_a_gpu_is_named_with_what_its_kernels_come_from(said) -> None:
    code, text = said(READY, gpus=1)
    assert "CUDA kernels: NVRTC 13.1, driver for CUDA 13.0; 0 compiled, in kept" in text
    assert "cuda:0: NVIDIA H100, compute capability 9.0" in text
    assert "missing  CUDA" not in text
    assert code == 0


def test_a_gpu_that_the_kernels_cannot_run_on_is_missing_not_wrong(said) -> None:
    code, text = said(READY, gpus=1, refusal="cuda:0 is too old")
    assert "missing  CUDA kernels: cuda:0 is too old. Calls there run on `portable`." in text
    assert code == 0


def test_a_gpu_that_is_not_used_is_told_why(said) -> None:
    code, text = said(cuda.CudaStatus(False, "this torch is a CPU build", gpu_unused=True))
    assert "missing  CUDA kernels: this torch is a CPU build. Until then no call runs on them." in text
    assert code == 0
