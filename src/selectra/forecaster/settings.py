"""What a Forecaster is told: read, checked, and turned into a run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from pydantic import ValidationError

from selectra.errors import ConfigError
from selectra.spec import Optim, Run, Spec, Train
from selectra.values import describe_problem

# What train_args may hold, in the words of this border, and where it goes.
OPTIM = {"learning_rate": "lr", "weight_decay": "weight_decay", "warmup_steps": "warmup_steps", "clip": "clip"}
OPTIM |= {"schedule": "schedule"}
TRAIN = {"max_steps": "steps", "epochs": "epochs", "batch_size": "batch_size", "accumulate": "accumulate"}
TRAIN |= {"early_stop_patience": "patience", "eval_every": "eval_every", "device": "device", "threads": "threads"}
OTHERS = ("loss", "verbose")
TRAIN_ARGS = (*TRAIN, *OPTIM, *OTHERS)
DEFAULTS: dict[str, Any] = {"epochs": 10, "learning_rate": 1e-3, "early_stop_patience": 3}
BATCH_SIZE = 32
# Windows times series in one pass where nobody says otherwise: what a training of many series takes stays bounded.
MAX_SERIES_IN_BATCH = 2**14


def usual_batch(batch_size: int, n_series: int) -> int:
    """So many windows, or fewer where there are many series in each."""
    return max(1, min(batch_size, MAX_SERIES_IN_BATCH // n_series))


def refuse_unknown(moved: Mapping[str, Any], known: list[str]) -> None:
    """Say where an argument belongs that the constructor does not take.

    Raises:
        ConfigError: There is one.
    """
    for name, value in moved.items():
        if name in TRAIN_ARGS:
            raise ConfigError(f"Forecaster takes {name!r} in train_args: train_args={{{name!r}: {value!r}}}")
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"Forecaster takes no argument {name!r}; it takes {known}.{hint}")


def check_count(name: str, value: object, *, least: int = 1, optional: bool = False) -> None:
    """Refuse what is no whole number of at least `least`, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        allowed = " or None" if optional else ""
        raise ConfigError(f"{name} must be a whole number of at least {least}{allowed}, got {value!r}")


def model_spec(model: object, model_args: object) -> Spec:
    """The model and its arguments.

    Raises:
        ConfigError: One of them is not of its kind.
    """
    if not isinstance(model, str | Spec):
        raise ConfigError(f"model must be a name or a Spec, got {model!r}")
    spec = Spec(model) if isinstance(model, str) else model
    return spec.replace(**_arguments("model_args", model_args))


def _arguments(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must be a dictionary of arguments by name, got {value!r}")
    return dict(value)


def run_of(spec: Spec, task: Spec, train_args: object, seed: int, alias: str, n_series: int = 1) -> Run:
    """The training that `train_args` asks for; without a batch size one that suits the number of series.

    Raises:
        ConfigError: An argument is unknown, or its value does not fit.
    """
    given = _arguments("train_args", train_args)
    for name in given:
        if name not in TRAIN_ARGS:
            close = difflib.get_close_matches(name, TRAIN_ARGS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"train_args takes no {name!r}; it takes {list(TRAIN_ARGS)}.{hint}")
    if "max_steps" in given and "epochs" in given:
        raise ConfigError("train_args has both 'max_steps' and 'epochs'; name one")
    for name in ("max_steps", "batch_size", "accumulate", "eval_every", "threads"):
        if name in given:
            check_count(name, given[name], optional=name in ("max_steps", "eval_every", "threads"))
    if "early_stop_patience" in given:
        check_count("early_stop_patience", given["early_stop_patience"], optional=True)
    rate = given.get("learning_rate", 1.0)
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 < float(rate) < math.inf:
        raise ConfigError(f"learning_rate must be a number above 0, got {rate!r}")
    values = {**DEFAULTS, "batch_size": usual_batch(BATCH_SIZE, n_series), **given}
    if values.get("max_steps") is not None:
        values.pop("epochs")
    try:
        optim = Optim(**{ours: values[name] for name, ours in OPTIM.items() if name in values})
        train = Train(seed=seed, **{ours: values[name] for name, ours in TRAIN.items() if name in values})
    except ValidationError as error:
        raise ConfigError(f"train_args: {describe_problem(error)}") from error
    return Run(model=spec, data=Spec("data_frame"), task=task, optim=optim, train=train, name=alias)
