"""Paired statistics over the cells of a comparison."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, cast

import numpy as np
from scipy import stats

from selectra.errors import ConfigError

RESAMPLES = 9999
CONFIDENCE = 0.95
# Of all differences that a study looks at, the chance that one is called real and is none.
ERROR_RATE = 0.05
FEWEST = 3
# Below so many pairs resampling them says little: three numbers have ten different means.
RESAMPLED = 8


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0, compared: int = 1) -> dict[str, Any]:
    """The mean of paired differences `ours - theirs`, and its 95 % interval: BCa, or Student's of few pairs.

    Args:
        compared: How many such differences are looked at together: `corrected` is the interval that leaves each of them
            its share of the 5 % (Bonferroni), so that the chance of any false one stays below.

    Raises:
        ConfigError: There are fewer than three pairs.
    """
    differences = _differences(ours, theirs)
    low, high = _interval(differences, seed)
    corrected = _interval(differences, seed, 1 - (1 - CONFIDENCE) / compared)
    return {
        "mean": float(np.mean(ours)), "rival": float(np.mean(theirs)), "difference": float(differences.mean()),
        "low": low, "high": high, "corrected": list(corrected), "compared": compared,
        "wins": int((differences < 0).sum()), "pairs": len(differences),
        # In this mean all pairs weigh alike, however large their values are.
        "ratio": float(np.exp(np.log(np.asarray(ours) / np.asarray(theirs)).mean())),
    }  # fmt: skip


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    if len(ours) != len(theirs) or len(ours) < FEWEST:
        raise ConfigError(f"a paired interval needs {FEWEST} pairs or more, got {len(ours)} and {len(theirs)} values.")
    return np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)


def _interval(differences: np.ndarray, seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    # Equal differences have no distribution to resample.
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max(initial=0.0):
        return float(differences.mean()), float(differences.mean())
    if len(differences) < RESAMPLED:
        low, high = stats.t.interval(confidence, len(differences) - 1, differences.mean(), stats.sem(differences))
        return float(low), float(high)
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, confidence_level=confidence, method="BCa",
        random_state=np.random.default_rng(seed),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def contrast(ours: Sequence[float], theirs: Sequence[float], seed: int = 0, grain: float = 0.0) -> dict[str, Any]:
    """How much lower or higher `ours` is, pair by pair: interval, wins, and the p-value of a paired t-test.

    The difference is that of logarithms in per cent, so that a pair of large values weighs no more than one of small
    ones; where a value is not above zero, it is the plain difference. `resolution` is the smallest difference that so
    many pairs of this spread could just have shown, alone. The interval is a bootstrap's (BCa) from eight pairs on. Of
    fewer it is Student's, as the test is: a bootstrap of three is hardly wider than their own range.

    Args:
        grain: The least step of a score that seeds change, such as one image of the test part. Differences that are
            all equal are then no more certain than that: they are judged as if they were spread by so much. 0: such
            differences have no chance in them.

    Raises:
        ConfigError: There are fewer than three pairs.
    """
    raw = _differences(ours, theirs)
    relative = min(*ours, *theirs) > 0
    each = 100 * _differences(np.log(ours).tolist(), np.log(theirs).tolist()) if relative else raw
    sure = float(np.ptp(each)) <= 1e-9 * max(1.0, float(np.abs(each).max()))
    mean, deviation = float(each.mean()), float(np.std(each, ddof=1))
    low, high = _interval(each, seed)
    always = 0.0 if abs(mean) > 1e-9 else 1.0
    p_value = always if sure else float(cast(Any, stats.ttest_1samp(each, 0.0)).pvalue)
    if sure and grain:
        deviation = 100 * grain / float(np.mean([*ours, *theirs])) if relative else grain
        error = deviation / np.sqrt(len(each))
        low, high = (float(edge) for edge in stats.t.interval(CONFIDENCE, len(each) - 1, mean, error))
        p_value = float(2 * stats.t.sf(abs(mean) / error, len(each) - 1))
    t = stats.t.ppf((1 + CONFIDENCE) / 2, len(each) - 1) * deviation / np.sqrt(len(each))
    return {
        "mean": float(np.mean(ours)), "rival": float(np.mean(theirs)), "unit": "%" if relative else "",
        "difference": _percent(mean, relative), "low": _percent(low, relative), "high": _percent(high, relative),
        "wins": int((raw < 0).sum()), "pairs": len(raw), "p": p_value, "resolution": _percent(float(t), relative),
    }  # fmt: skip


def grain(rows: Iterable[dict[str, Any]], higher_is_better: bool) -> float:
    """The least step of scores that count examples and that seeds change, one example of a test part; 0 of others."""
    # Records of before the size of the test part was kept do not know it.
    sizes = [row["test_windows"] for row in rows if not row["sure"] and row.get("test_windows")]
    return 1 / min(sizes) if higher_is_better and sizes else 0.0


def _percent(value: float, relative: bool) -> float:
    """A hundred times a difference of logarithms as a change in per cent."""
    return 100 * float(np.expm1(value / 100)) if relative else value


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, so that the chance of any false one stays below the level (Holm 1979)."""
    order, adjusted, highest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def over_bases(values: Sequence[float]) -> float:
    """The mean of one model's scores on several data sets: geometric, so that all weigh alike, where that can be."""
    return float(np.exp(np.log(values).mean())) if min(values) > 0 else fmean(values)


def judged(contrasts: Sequence[dict[str, Any]], higher_is_better: bool = False) -> list[dict[str, Any]]:
    """Contrasts that are looked at together, each with its adjusted p-value and an outcome: better, worse, level.

    A difference counts where the adjusted p-value is below 0.05 and the interval leaves zero out.
    """
    found = []
    for each, p_adjusted in zip(contrasts, holm([each["p"] for each in contrasts]), strict=True):
        real = p_adjusted < ERROR_RATE and (each["low"] > 0 or each["high"] < 0)
        good = (each["difference"] > 0) == higher_is_better
        outcome = ("better" if good else "worse") if real else "level"
        found.append({**each, "p_adjusted": p_adjusted, "outcome": outcome})
    return found
