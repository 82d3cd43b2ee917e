"""What cost curves are drawn for: language by length, images by resolution, forecasting by look-back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from selectra.spec import Spec
from selectra.train.precision import Precision

Facts = dict[str, Any]
# Tokens, pixels and windows of a batch on a GPU, which fill it; a CPU gets a part of them.
TOKENS, PIXELS, WINDOWS = 32_768, 128 * 224 * 224, 512
ON_CPU = 16


@dataclass(frozen=True)
class Curves:
    """One kind of models, and the points at which they are measured.

    Args:
        kind: As the registry calls it.
        question: A heading.
        axis: What the points are.
        unit: What one unit of the output's cost is of: a token, an image, a window.
        models: By name, the spec whose width is turned until it has as many parameters as all others.
        subjects: Those of them that are Mamba, which are set against all others.
        params: Parameters on a GPU, and on a CPU.
        points: On a GPU, and on a CPU; some are no powers of two.
        decoded: Positions at which a token is generated.
        facts: What the data says at a point.
        batch: Samples in a batch at a point, on a GPU.
        precision: Of the products on a GPU; weights are float32, those that generate of this precision too. On a CPU
            all is float32.
        matched_at: The point at which parameters are equal; None where they are at each, since they depend on it.
    """

    kind: str
    question: str
    axis: str
    unit: str
    models: Mapping[str, Spec]
    subjects: tuple[str, ...]
    params: tuple[float, float]
    points: tuple[tuple[int, ...], tuple[int, ...]]
    facts: Callable[[int], Facts]
    batch: Callable[[int], int]
    precision: Precision
    matched_at: int | None
    decoded: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def params_on(self, device: torch.device) -> float:
        """Parameters of every model."""
        return self.params[device.type != "cuda"]

    def points_on(self, device: torch.device) -> tuple[int, ...]:
        """Where forward passes and training steps are measured."""
        return self.points[device.type != "cuda"]

    def decoded_on(self, device: torch.device) -> tuple[int, ...]:
        """Where generated tokens are measured."""
        return self.decoded[device.type != "cuda"]

    def precision_on(self, device: torch.device) -> Precision:
        """Of the products."""
        return self.precision if device.type == "cuda" else "float32"

    def batch_on(self, device: torch.device, point: int) -> int:
        """Samples in a batch."""
        return max(1, self.batch(point) // (1 if device.type == "cuda" else ON_CPU))


LANGUAGE = Curves(
    kind="language",
    question="Language models by length",
    axis="tokens in a sequence",
    unit="token",
    models=MappingProxyType(
        {
            "mamba": Spec("mamba_lm", d_model=736, depth=24),
            "gpt": Spec("gpt", d_model=768, depth=12, n_heads=12),
            # Attention in two of sixteen layers; without experts, whose parameters do not all work for a token.
            "jamba": Spec("jamba", d_model=624, depth=16, n_heads=8, n_kv_heads=4, d_ff=1560, n_experts=1),
            "retnet": Spec("retnet", d_model=768, depth=12, n_heads=3),
            "hyena": Spec("hyena", d_model=928, depth=12),
            "mamba2": Spec("mamba_lm", mixer="mamba2", d_model=736, depth=24),
            "rwkv": Spec("rwkv", d_model=736, depth=12),
        }
    ),
    subjects=("mamba", "mamba2"),
    params=(85e6, 5.4e6),
    points=((512, 1000, 4096, 6001, 12_000, 32_768), (128, 250, 512, 1000, 2048)),
    facts=lambda length: {"vocab_size": 256, "seq_len": length},
    batch=lambda length: TOKENS // length,
    precision="bfloat16",
    matched_at=4096,
    decoded=((512, 3000, 8192, 32_768), (128, 1000, 2048)),
)
IMAGES = Curves(
    kind="image",
    question="Image models by resolution",
    axis="pixels of a side",
    unit="image",
    models=MappingProxyType(
        {
            "vim": Spec("vim_small"),
            "vmamba": Spec("vmamba_tiny_s1l8", dims=(88, 176, 352, 704)),
            "vit": Spec("vit_small", depth=14),
            "convnext": Spec("convnext_tiny", depths=(3, 3, 6, 3)),
            "resnet": Spec("resnet_50"),
        }
    ),
    subjects=("vim", "vmamba"),
    params=(25.3e6, 25.3e6),
    points=((128, 224, 384, 736, 1024), (64, 96, 128, 224)),
    facts=lambda side: {"img_size": side, "n_classes": 1000, "in_channels": 3},
    batch=lambda side: PIXELS // side**2,
    precision="bfloat16",
    matched_at=224,
)
SERIES = Curves(
    kind="series",
    question="Forecasters by look-back",
    axis="look-back",
    unit="window",
    models=MappingProxyType(
        {
            "tsm2": Spec("tsm2"),
            "s_mamba": Spec("s_mamba"),
            # Fewer heads than published leave more widths to choose from.
            "patchtst": Spec("patchtst", n_heads=4),
            "itransformer": Spec("itransformer", n_heads=2),
            "modern_tcn": Spec("modern_tcn", d_model=16, d_ff=16),
            "gru": Spec("gru"),
        }
    ),
    subjects=("tsm2", "s_mamba"),
    params=(300e3, 300e3),
    points=((96, 200, 336, 720), (96, 200, 336)),
    facts=lambda length: {"seq_len": length, "horizon": 96, "n_series": 7, "season": 24},
    batch=lambda length: WINDOWS,
    precision="float32",
    matched_at=None,
)
KINDS: Mapping[str, Curves] = MappingProxyType({"language": LANGUAGE, "images": IMAGES, "series": SERIES})
