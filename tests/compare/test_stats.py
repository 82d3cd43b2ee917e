"""The statistics against known figures, and how often they are wrong over simulated studies."""

import numpy as np
import pytest
from scipy import stats

from selectra.compare.stats import ERROR_RATE, contrast, holm, judged
from selectra.errors import ConfigError

STUDIES = 200


def test_holm_adjusts_as_the_paper_says() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_contrast_is_a_change_in_per_cent_with_the_t_test_of_scipy() -> None:
    ours, theirs = [0.98, 1.97, 2.96], [1.0, 2.0, 3.0]
    found = contrast(ours, theirs)
    logs = np.log(ours) - np.log(theirs)
    assert found["difference"] == pytest.approx(100 * np.expm1(logs.mean()))
    assert found["p"] == pytest.approx(stats.ttest_rel(np.log(ours), np.log(theirs)).pvalue)
    assert found["low"] < found["difference"] < found["high"] < 0
    assert (found["wins"], found["pairs"], found["unit"]) == (3, 3, "%")


def test_values_without_chance_and_values_at_zero() -> None:
    same = judged([contrast([1.0] * 3, [1.0] * 3)])[0]
    assert (same["outcome"], same["difference"], same["p"]) == ("level", 0.0, 1.0)
    sure = judged([contrast([0.9] * 3, [1.0] * 3)])[0]
    assert (sure["outcome"], sure["p"]) == ("better", 0.0)
    assert sure["difference"] == pytest.approx(-10)
    plain = contrast([0.0, 0.1, 0.2], [1.0, 1.2, 1.3])
    assert plain["unit"] == ""
    assert plain["difference"] == pytest.approx(-1.0667, abs=1e-3)


def test_more_is_better_where_the_metric_says_so() -> None:
    found = contrast([0.91, 0.92, 0.90], [0.80, 0.81, 0.79])
    assert judged([found], higher_is_better=True)[0]["outcome"] == "better"
    assert judged([found])[0]["outcome"] == "worse"


def test_two_pairs_are_too_few() -> None:
    with pytest.raises(ConfigError, match="needs 3 pairs"):
        contrast([1.0, 2.0], [1.0, 2.0])


def outcomes(n_seeds: int, seed: int) -> dict[str, str]:
    """One study: a rival that is 2 % worse, and three that are alike, on four bases; seeds move results by 0.5 %."""
    draw = np.random.default_rng(seed)
    level = {"ours": 1.0, "worse": 1.02, "same 1": 1.0, "same 2": 1.0, "same 3": 1.0}
    bases = np.array([0.3, 0.5, 1.0, 2.0])
    # What a seed does is in part common to all models: the order of the data.
    common = draw.normal(0, 0.005, (n_seeds, 4))
    errors = {name: bases * each * np.exp(common + draw.normal(0, 0.005, (n_seeds, 4))) for name, each in level.items()}
    means = {name: np.exp(np.log(each).mean(1)).tolist() for name, each in errors.items()}
    rivals = [name for name in level if name != "ours"]
    found = judged([contrast(means["ours"], means[name], seed) for name in rivals])
    return {name: each["outcome"] for name, each in zip(rivals, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("n_seeds", "least_found"), [(3, 0.6), (5, 0.97)])
def test_a_planted_difference_is_found_and_a_planted_null_is_not(n_seeds: int, least_found: float) -> None:
    found = [outcomes(n_seeds, seed) for seed in range(STUDIES)]
    assert np.mean([each["worse"] == "better" for each in found]) >= least_found
    assert not any(each["worse"] == "worse" for each in found)
    # Any null called a difference makes a study wrong; at the stated rate so many happen in 99 of 100 tests at most.
    wrong = sum(any(each[name] != "level" for name in each if name != "worse") for each in found)
    assert wrong <= stats.binom.ppf(0.99, STUDIES, ERROR_RATE)
