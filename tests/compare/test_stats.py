"""The statistics against known figures, and how often they are wrong over simulated studies."""

import numpy as np
import pytest
from scipy import stats

from selectra.compare.stats import ERROR_RATE, RESAMPLED, contrast, holm, judged, paired
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


# 97.5 % points of Student's distribution for that many pairs less one, from a printed table.
STUDENT = {3: 4.302653, 4: 3.182446, 5: 2.776445, 6: 2.570582, 7: 2.446912}


@pytest.mark.parametrize(("pairs", "quantile"), STUDENT.items())
def test_an_interval_of_few_pairs_is_students(pairs: int, quantile: float) -> None:
    draw = np.random.default_rng(pairs)
    ours, theirs = (2 + draw.normal(0, 0.1, pairs) for _ in range(2))
    for found, each in (
        (paired(ours.tolist(), theirs.tolist()), ours - theirs),
        # Plain differences, since one value is below zero.
        (contrast([-1.0, *ours[1:]], theirs.tolist()), np.array([-1.0, *ours[1:]]) - theirs),
    ):
        half = quantile * each.std(ddof=1) / np.sqrt(pairs)
        assert (found["low"], found["high"]) == pytest.approx((each.mean() - half, each.mean() + half), rel=1e-5)
    relative = contrast(ours.tolist(), theirs.tolist())
    logs = np.log(ours / theirs)
    half = quantile * logs.std(ddof=1) / np.sqrt(pairs)
    wanted = [100 * np.expm1(logs.mean() + side * half) for side in (-1, 1)]
    assert [relative["low"], relative["high"]] == pytest.approx(wanted, rel=1e-5)
    # What so many pairs could just have shown is half of that interval's width.
    assert relative["resolution"] == pytest.approx(100 * np.expm1(half), rel=1e-5)


def test_from_eight_pairs_on_an_interval_is_resampled() -> None:
    draw = np.random.default_rng(0)
    # Skewed: Student's interval is symmetric whatever the values are, and a resampled one is not.
    ours, theirs = (draw.exponential(1, RESAMPLED) ** 2 + 3).tolist(), [3.0] * RESAMPLED
    found, few = paired(ours, theirs), paired(ours[:-1], theirs[:-1])
    assert len(STUDENT) + 3 == RESAMPLED
    assert found["high"] - found["difference"] > 1.05 * (found["difference"] - found["low"])
    assert few["high"] - few["difference"] == pytest.approx(few["difference"] - few["low"])
    assert min(ours) - 3 <= found["low"] and found["high"] <= max(ours) - 3
    # Drawn from a seed: the same values have the same interval.
    assert paired(ours, theirs) == found != paired(ours, theirs, seed=1)


def test_intervals_of_three_pairs_hold_the_truth_as_often_as_they_say() -> None:
    studies, draw = 300, np.random.default_rng(1)
    held = [found["low"] <= 0 <= found["high"] for found in (
        paired((1 + draw.normal(0, 0.01, 3)).tolist(), (1 + draw.normal(0, 0.01, 3)).tolist()) for _ in range(studies)
    )]  # fmt: skip
    low, high = stats.binom.interval(0.999, studies, 0.95)
    assert low <= sum(held) <= high


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


def test_intervals_of_several_rivals_leave_each_its_share_of_the_error() -> None:
    draw, studies, rivals = np.random.default_rng(3), 400, 4
    alone = together = 0
    for _ in range(studies):
        found = [paired((1 + draw.normal(0, 0.01, 5)).tolist(), (1 + draw.normal(0, 0.01, 5)).tolist(), compared=rivals)
                 for _ in range(rivals)]  # fmt: skip
        alone += any(each["low"] > 0 or each["high"] < 0 for each in found)
        together += any(each["corrected"][0] > 0 or each["corrected"][1] < 0 for each in found)
    # No difference exists: one of four is found in 19 of 100 studies by its own interval, in 5 by the corrected ones.
    assert alone / studies > 0.12
    assert together / studies < 0.08


def test_equal_differences_on_few_images_are_no_certainty() -> None:
    # Four test images: every seed gets one more right than the rival's, and three seeds are three throws of a coin.
    found = contrast([0.75] * 3, [0.5] * 3, grain=0.25)
    (few,) = judged([found], higher_is_better=True)
    assert few["outcome"] == "level" and few["low"] < 0 < few["high"] and few["resolution"] > few["difference"]
    # As a paired t-test of differences that are spread by one image.
    t = np.log(0.75 / 0.5) / (0.25 / 0.625 / np.sqrt(3))
    assert found["p"] == pytest.approx(2 * stats.t.sf(t, 2))
    (many,) = judged([contrast([0.75] * 3, [0.5] * 3, grain=0.001)], higher_is_better=True)
    assert many["outcome"] == "better"
    (same,) = judged([contrast([1.0] * 3, [1.0] * 3, grain=0.25)], higher_is_better=True)
    assert same["outcome"] == "level" and same["difference"] == 0
    # Nothing of chance: both are solved.
    assert contrast([0.75] * 3, [0.5] * 3)["p"] == 0
