"""Paired statistics over the cells of a comparison."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from selectra.errors import ConfigError

RESAMPLES = 9999
CONFIDENCE = 0.95
FEWEST = 3


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The mean of paired differences `ours - theirs`, and its bootstrap interval (BCa, 95 %) over the pairs.

    Raises:
        ConfigError: There are fewer than three pairs.
    """
    if len(ours) != len(theirs) or len(ours) < FEWEST:
        raise ConfigError(f"a paired interval needs {FEWEST} pairs or more, got {len(ours)} and {len(theirs)} values.")
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    low = high = float(differences.mean())
    # Equal differences have no distribution to resample.
    if np.ptp(differences) > 0:
        found = stats.bootstrap(
            (differences,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="BCa",
            random_state=np.random.default_rng(seed),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    return {
        "mean": float(np.mean(ours)), "rival": float(np.mean(theirs)), "difference": float(differences.mean()),
        "low": low, "high": high, "wins": int((differences < 0).sum()), "pairs": len(differences),
        # In this mean all pairs weigh alike, however large their values are.
        "ratio": float(np.exp(np.log(np.asarray(ours) / np.asarray(theirs)).mean())),
    }  # fmt: skip


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
