"""Selective state-space models (the Mamba family) on images, time series and language.

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectra.forecaster import Forecaster
    from selectra.mixers import S6, Bidirectional, SelectiveChannel, WeightedAverage
    from selectra.official import from_official
    from selectra.ops import causal_conv1d, cross_scan, selective_scan
    from selectra.ops.length_parallel import length_parallel

_HOMES = {
    "Bidirectional": "selectra.mixers",
    "Forecaster": "selectra.forecaster",
    "S6": "selectra.mixers",
    "SelectiveChannel": "selectra.mixers",
    "WeightedAverage": "selectra.mixers",
    "causal_conv1d": "selectra.ops",
    "cross_scan": "selectra.ops",
    "from_official": "selectra.official",
    "length_parallel": "selectra.ops.length_parallel",
    "selective_scan": "selectra.ops",
}

__all__ = [
    "S6",
    "Bidirectional",
    "Forecaster",
    "SelectiveChannel",
    "WeightedAverage",
    "causal_conv1d",
    "cross_scan",
    "from_official",
    "length_parallel",
    "selective_scan",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("selectra")
    if name not in _HOMES:
        raise AttributeError(f"module 'selectra' has no attribute '{name}'; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
