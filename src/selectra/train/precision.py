"""Products in half precision: where they are rounded, and the scale that keeps small gradients above zero."""

from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]
# Below this scale gradients are not finite for another reason than their scale.
LEAST_SCALE = 2.0**-24


def autocast(device: torch.device, precision: Precision, cached: bool = True) -> AbstractContextManager[object]:
    """Inside the block products run in this precision."""
    if precision == "float32":
        return nullcontext()
    # Without the cache of rounded weights where these come and go with their blocks: it would hold all of them.
    return torch.autocast(device.type, getattr(torch, precision), cache_enabled=cached)


def make_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Scales the loss in float16, and does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def overflowed(scaler: torch.amp.GradScaler, loss: float, norm: float) -> bool:
    """Whether gradients are not finite because of their scale: the step is left out, and the next scale is smaller."""
    return scaler.is_enabled() and isfinite(loss) and not isfinite(norm) and scaler.get_scale() > LEAST_SCALE
