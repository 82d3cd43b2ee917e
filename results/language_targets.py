"""Mamba and the hybrid beside the Transformer: paired differences of loss over seeds, from a study's records.

    python results/language_targets.py STUDY.json

writes them into the study's record, beside what stands there.

Losses are nats a character: of the best weights on the half that chose them ("val"), on the half that did not ("test")
and on both together ("held_out", the last tenth of the text), and of the last weights on both ("last"). Beside each
p-value stands the one that is corrected for all of these comparisons by Holm's method.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from selectra.compare.stats import CONFIDENCE, holm
from selectra.report.study import read_study

RIVAL, OURS = "gpt", ("mamba", "hybrid")


def losses(content: dict[str, Any], variant: str) -> dict[str, dict[int, float]]:
    """A variant's losses by part and seed."""
    found: dict[str, dict[int, float]] = {"val": {}, "test": {}, "held_out": {}, "last": {}}
    for cell in content["cells"]:
        if cell["variant"] == variant and "test" in cell:
            found["val"][cell["seed"]] = cell["val"]["loss"]
            found["test"][cell["seed"]] = cell["test"]["loss"]
            for part, which in (("held_out", "best"), ("last", "last")):
                if "held_out" in cell:
                    found[part][cell["seed"]] = cell["held_out"][which]["loss"]
    return found


def against(ours: dict[int, float], rival: dict[int, float]) -> dict[str, Any]:
    """The means, their paired difference with Student's interval and test over seeds, and its side of zero, alone."""
    seeds = sorted(ours.keys() & rival.keys())
    if len(seeds) < 3:
        return {"seeds": len(seeds), "outcome": "too few seeds"}
    each = [ours[seed] - rival[seed] for seed in seeds]
    mean, error = fmean(each), float(stats.sem(each))
    low, high = map(float, stats.t.interval(CONFIDENCE, len(each) - 1, mean, error)) if error else (mean, mean)
    p_value = float(stats.ttest_1samp(each, 0.0).pvalue) if error else float(mean == 0)
    outcome = "below" if high < 0 else "above" if low > 0 else "level"
    return {
        "mean": fmean(ours[seed] for seed in seeds), "rival_mean": fmean(rival[seed] for seed in seeds),
        "difference": mean, "low": low, "high": high, "seeds": len(seeds), "outcome": outcome,
        "p": p_value,
    }  # fmt: skip


def main() -> None:
    """Read, compare, write back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    words = parser.parse_args()
    content = read_study(words.study)
    rival, targets = losses(content, RIVAL), []
    for model in OURS:
        ours = losses(content, model)
        targets += [{"model": model, "rival": RIVAL, "on": part, **against(ours[part], rival[part])} for part in ours]
    tested = [each for each in targets if "p" in each]
    for each, p_adjusted in zip(tested, holm([each["p"] for each in tested]), strict=True):
        each["p_adjusted"] = p_adjusted
    record = json.loads(words.study.read_text("utf-8")) | {"targets": targets}
    words.study.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
