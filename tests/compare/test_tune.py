"""Trials of settings: what they draw, when they end, and which settings they choose."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from selectra.compare.conduct import Wish, conduct
from selectra.compare.store import Store
from selectra.compare.study import TRIAL_SEED, Tuning
from selectra.compare.tune import best_settings, next_settings, pruner
from selectra.errors import ConfigError
from tests.compare.small import write_series
from tests.compare.studies import make_study

QUIET = Console(quiet=True)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    return write_series(tmp_path)


def test_trials_of_optuna_follow_from_what_is_stored() -> None:
    pytest.importorskip("optuna")
    tuning = Tuning(ranges={"optim.lr": (0.001, 0.1)}, trials=6)
    run = make_study(Path("x.csv")).bases[0]
    ended: list[Any] = []
    drawn = []
    for number in range(6):
        (found,) = next_settings(tuning, run, ended, 0).items()
        assert found == next(iter(next_settings(tuning, run, ended, 0).items()))
        assert found[0] == number
        drawn.append(found[1]["optim.lr"])
        ended.append((found[1], {"score": abs(found[1]["optim.lr"] - 0.02), "history": [1.0, 0.5]}))
        assert next_settings(tuning, run, ended, 1) == {}
    assert next_settings(tuning, run, ended, 0) == {}
    # The base's own rate comes first, and no two are the same.
    assert drawn[0] == 0.01
    assert len(set(drawn)) == 6
    assert all(0.001 <= each <= 0.1 for each in drawn)
    assert best_settings(ended) == {"optim.lr": min(drawn, key=lambda each: abs(each - 0.02))}


def test_a_trial_worse_than_the_median_is_pruned_and_never_chosen() -> None:
    pytest.importorskip("optuna")
    tuning = Tuning(ranges={"optim.lr": (0.001, 0.1)}, trials=6)
    ended = [({"optim.lr": 0.01 * (i + 1)}, {"score": 0.1, "history": [1.0 + i, 0.1]}) for i in range(3)]
    ends = pruner(tuning, {"optim.lr": 0.05}, ended)
    assert ends([5.0])
    assert not ends([1.5])
    free = pruner(tuning.model_copy(update={"prune": False}), {"optim.lr": 0.05}, ended)
    assert not free([5.0])
    # Too few to compare with.
    assert not pruner(tuning, {"optim.lr": 0.05}, ended[:2])([5.0])
    assert best_settings([*ended, ({"optim.lr": 0.09}, {"score": 0.0, "pruned": True})]) == {"optim.lr": 0.01}


def test_values_tried_with_several_seeds_are_judged_by_their_mean(series: Path, tmp_path: Path) -> None:
    tuning = Tuning(values={"optim.lr": (0.01, 0.05)}, repeats=2)
    study = make_study(series, tuning=tuning)
    drawn = next_settings(tuning, study.bases[0], [], 0)
    assert tuning.count == len(drawn) == 4
    cells = [study.trial(study.bases[0], study.variants[0], number, settings) for number, settings in drawn.items()]
    seeds = [cell.run.train.seed for cell in cells]
    assert [cell.run.optim.lr for cell in cells] == [0.01, 0.05, 0.01, 0.05]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3] and len({cell.key for cell in cells}) == 4
    # The lowest error of all is of a rate that fails with the other seed.
    low, high = {"optim.lr": 0.01}, {"optim.lr": 0.05}
    lowest_once = [(low, {"score": 0.2}), (high, {"score": 0.1}), (low, {"score": 0.2}), (high, {"score": 3.0})]
    assert best_settings(lowest_once) == low
    assert best_settings([(low, {"score": 0.2}), (high, {"score": 0.1}), (low, {"score": 0.2}), (high, {})]) == low
    assert best_settings([(low, {}), (high, {"score": 0.1}), (low, {"score": 0.2}), (high, {})]) == high
    assert best_settings([(low, {}), (high, {})]) is None
    path = tmp_path / "a.sqlite"
    conduct(study, Wish(path, device="cpu"), QUIET)
    store = Store(path)
    found = Counter(cell.run.train.seed >= TRIAL_SEED for cell, state, _ in store.cells() if state == "done")
    store.close()
    # Four trials of each of two models, three seeds of them and one of the closed form.
    assert found == {True: 8, False: 7}
    with pytest.raises(ValidationError, match="'repeats' are of 'values'"):
        Tuning(ranges={"optim.lr": (0.001, 0.1)}, trials=3, repeats=2)


def test_without_optuna_the_message_says_what_to_install(series: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    study = make_study(series, tuning=Tuning(ranges={"optim.lr": (0.001, 0.1)}, trials=3))
    with pytest.raises(ConfigError, match=r"selectra\[compare\]"):
        conduct(study, Wish(tmp_path / "a.sqlite", device="cpu"), QUIET)
