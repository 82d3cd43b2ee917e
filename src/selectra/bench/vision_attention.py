"""Vim-T against DeiT-T with FlashAttention, by image size: inference, training and peak memory.

Vision Mamba's claim is 2.8 times the speed and 86.8 % less memory than DeiT at 1248 px, against attention that writes
its whole matrix; that one is measured too, as "plain".
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import selectra.models  # noqa: F401
from selectra.bench.events import Stopwatch
from selectra.bench.modules import seeded
from selectra.bench.vision_peers import missing
from selectra.bench.vision_steps import (
    compiled_blocks,
    images,
    inference_of,
    peak_bytes,
    rows_named,
    times,
    training_of,
)
from selectra.errors import BackendError
from selectra.registry import models
from selectra.spec import Spec

SEED = 0
OURS, FLASH, PLAIN = "vim_tiny", "deit_tiny, flash", "deit_tiny, plain"
DEIT = "deit_tiny_patch16_224"
# Compiling takes its time.
COMPILED = (224, 1248)
# In bfloat16 against float32, of the largest score.
AT_MOST = 0.1


class Size(NamedTuple):
    """Pixels of a side, and images of a step."""

    pixels: int
    batch: int


SIZES = (Size(224, 256), Size(512, 64), Size(1024, 16), Size(1248, 16))


class With(nn.Module):
    """A model that computes its attention in one way.

    Args:
        model: The classifier.
        kernel: Which of PyTorch's attentions it uses.
    """

    def __init__(self, model: nn.Module, kernel: SDPBackend) -> None:
        super().__init__()
        self.model, self.kernel = model, kernel

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(self.kernel):
            return self.model(x)

    def blocks(self) -> list[nn.Module]:
        """What is compiled."""
        return list(self.model.blocks)  # pyright: ignore[reportArgumentType]


def measure(
    into: dict[str, Any], seconds: float, watch: Stopwatch, save: Callable[[], None], only: str | None = None
) -> None:
    """Check, then time every model at every size; what does not fit the memory is noted as that."""
    if missing("timm"):
        raise BackendError("timm is not installed; DeiT comes from there: pip install timm.")
    into["gate"] = _gate(watch.device)
    into["claim"] = {"pixels": 1248, "times as fast": 2.8, "less memory": 0.868, "source": "arXiv:2401.09417"}
    into["rows"] = []
    for size in rows_named(only, {str(size.pixels): size for size in SIZES}):
        row: dict[str, Any] = size._asdict() | {"tokens": (size.pixels // 16) ** 2 + 1}
        into["rows"].append(row)
        _measure(row, size, seconds, watch, save)


def _built(size: int, device: torch.device) -> dict[str, nn.Module]:
    import timm  # noqa: PLC0415

    with seeded(SEED, device):
        vim = models.build(Spec(OURS, img_size=size), {})
        deit = timm.create_model(DEIT, img_size=size)
    assert isinstance(vim, nn.Module)
    both = {OURS: vim, FLASH: With(deit, SDPBackend.FLASH_ATTENTION), PLAIN: With(deit, SDPBackend.MATH)}
    return {name: model.to(device) for name, model in both.items()}


def _gate(device: torch.device) -> dict[str, float]:
    """Scores under autocast against the same model in float32: the largest error over the largest score."""
    x, _ = images(2, 224, device, SEED)
    found = {}
    for name, model in _built(224, device).items():
        with torch.inference_mode():
            low = inference_of(model.eval(), x)()
            with sdpa_kernel(SDPBackend.MATH):
                exact = (model.model if isinstance(model, With) else model)(x)
        assert isinstance(low, Tensor)
        found[name] = ((low.float() - exact).abs().max() / exact.abs().max()).item()
        if not found[name] <= AT_MOST:
            raise BackendError(f"{name} is wrong, nothing is timed: off by {found[name]:.1e}, allowed {AT_MOST:.0e}.")
    return found


def _measure(row: dict[str, Any], size: Size, seconds: float, watch: Stopwatch, save: Callable[[], None]) -> None:
    x, target = images(size.batch, size.pixels, watch.device, SEED)
    for way in ("eager", "compiled") if size.pixels in COMPILED else ("eager",):
        built = _built(size.pixels, watch.device)
        if way == "compiled":
            torch.compiler.reset()
            del built[PLAIN]
            for model in built.values():
                compiled_blocks(model, model.blocks())  # pyright: ignore[reportCallIssue]
        found: dict[str, Any] = {}
        row[way] = found
        for kind in ("inference", "training"):
            steps = {
                name: inference_of(model, x) if kind == "inference" else training_of(model, x, target)
                for name, model in built.items()
                # What the claim is about; in training its matrices fit no GPU at the larger sizes.
                if name != PLAIN or kind == "inference"
            }
            for model in built.values():
                model.train(kind == "training")
            found[kind] = _timed(steps, seconds, watch)
            save()


def _timed(steps: Mapping[str, Callable[[], object]], seconds: float, watch: Stopwatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    fitting = {}
    for name, step in steps.items():
        try:
            found[name] = {"peak_bytes": peak_bytes(step, watch.device)}
        except torch.cuda.OutOfMemoryError:
            found[name] = {"peak_bytes": None, "problem": "does not fit the GPU's memory"}
            torch.cuda.empty_cache()
        else:
            fitting[name] = step
    for name, timing in times(fitting, seconds, watch).items():
        found[name] |= timing
    return found
