"""Trials of settings: the same number for every variant, drawn and pruned alike.

A trial is a cell. What optuna draws next follows from the trials that are stored and from the trial's number, so that
a study that is killed, or done by several workers, draws the same settings as one that is not.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from selectra.compare.store import Store
from selectra.compare.study import Study, Tuning, Variant, trials_of
from selectra.errors import ConfigError
from selectra.spec import Run

# Trials whose settings do not follow from earlier ones, and with which no other is compared.
FREE_TRIALS = 3
Record = dict[str, Any]
Trials = Sequence[tuple[Mapping[str, Any], Record]]


class PrunedError(Exception):
    """A trial is worse than most before it; what it has shown so far is its result."""


def optuna() -> Any:
    """The library that draws and prunes.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        found = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "tuning over ranges needs optuna, which is not installed: pip install 'selectra[compare]'; "
            "or name the values to try, Tuning(values={'optim.lr': (2e-4, 1e-3, 5e-3)})."
        ) from error
    found.logging.set_verbosity(found.logging.WARNING)
    return found


def settings_of(tuning: Tuning, run: Run) -> dict[str, Any]:
    """What a trial's run has in place of the tuned settings."""
    found = {}
    for name in tuning.names:
        section, _, field = name.partition(".")
        found[name] = getattr(getattr(run, section), field)
    return found


def finished_trials(store: Store, study: Study, base: Run, variant: Variant) -> tuple[list[Any], int]:
    """Settings and records of the finished trials in order, and how many are not finished."""
    assert study.tuning is not None
    cells = store.cells(trials_of(base.name, variant.name))
    ended = [(cell, record) for cell, state, record in cells if state in ("done", "failed") and record is not None]
    ended.sort(key=lambda each: each[0].trial or 0)
    return [(settings_of(study.tuning, cell.run), record) for cell, record in ended], len(cells) - len(ended)


def next_settings(tuning: Tuning, base: Run, ended: Trials, n_open: int) -> dict[int, dict[str, Any]]:
    """The settings of the trials, by number, that can begin now."""
    if tuning.values:
        ((name, values),) = tuning.values.items()
        return {number: {name: values[number % len(values)]} for number in range(tuning.count)}
    if n_open or len(ended) >= tuning.trials:
        return {}
    if not ended:
        # The base's own settings come first, where they lie in the ranges.
        usual = settings_of(tuning, base)
        if all(low <= usual[name] <= high for name, (low, high) in tuning.ranges.items()):
            return {0: usual}
    trial = _told(tuning, ended).ask(_distributions(tuning))
    return {len(ended): dict(trial.params)}


def best_settings(ended: Trials) -> dict[str, Any] | None:
    """The settings with the lowest mean validation error over their trials; None where every trial failed.

    Pruned trials do not count. Of settings that were tried with several seeds, those count with which all trainings
    succeeded; where there are none, all that did.
    """
    scores: dict[tuple[Any, ...], list[float | None]] = {}
    for settings, record in ended:
        score = None if record.get("pruned") else record.get("score")
        scores.setdefault(tuple(settings.items()), []).append(score)
    whole = {key: [each for each in found if each is not None] for key, found in scores.items()}
    sure = {key: found for key, found in whole.items() if len(found) == len(scores[key])}
    means = {key: fmean(found) for key, found in (sure or whole).items() if found}
    return dict(min(means, key=lambda key: means[key])) if means else None


def pruner(tuning: Tuning, settings: Mapping[str, Any], ended: Trials) -> Callable[[Sequence[float]], bool]:
    """Whether a trial with these validation errors so far is to be ended, by the median of the earlier ones."""
    if not tuning.ranges or not tuning.prune:
        return lambda history: False
    study, trials = _told(tuning, ended), optuna().trial

    def ends(history: Sequence[float]) -> bool:
        shown = {step: value for step, value in enumerate(history) if math.isfinite(value)}
        running = trials.create_trial(
            state=trials.TrialState.RUNNING, params=dict(settings), distributions=_distributions(tuning),
            intermediate_values=shown,
        )  # fmt: skip
        return bool(study.pruner.prune(study, running))

    return ends


def _distributions(tuning: Tuning) -> dict[str, Any]:
    made = optuna().distributions.FloatDistribution
    return {name: made(low, high, log=True) for name, (low, high) in tuning.ranges.items()}


def _told(tuning: Tuning, ended: Trials) -> Any:
    """An optuna study in memory that knows the finished trials; the next one's number seeds what it draws."""
    library = optuna()
    trials = library.trial
    study = library.create_study(
        sampler=library.samplers.TPESampler(seed=len(ended), n_startup_trials=FREE_TRIALS),
        pruner=library.pruners.MedianPruner(n_startup_trials=FREE_TRIALS),
    )
    for settings, record in ended:
        state = trials.TrialState.FAIL if record.get("score") is None else (
            trials.TrialState.PRUNED if record.get("pruned") else trials.TrialState.COMPLETE
        )  # fmt: skip
        history = {step: value for step, value in enumerate(record.get("history", ())) if value is not None}
        study.add_trial(
            trials.create_trial(
                state=state, params=dict(settings), distributions=_distributions(tuning), value=record.get("score"),
                intermediate_values=history,
            )
        )  # fmt: skip
    return study
