"""The built-in comparison of forecasters: which cells there are, and with what settings.

Tables: (a) look-back 96 on ETTh1, ETTh2 and Exchange, every model, three seeds; (b) the same on ETTm1, ETTm2 and
Weather, the main models, one seed; (orders) the models that scan across series, with the series in other orders; (c)
longer look-backs.

Every model has its registered size for the data set where there is one. Everything else is the same for all: steps,
batch, optimizer, schedule. The learning rate alone is chosen for each model and data set, from the same few, on the
validation part at horizon 96 with the first seed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np

from selectra import models as _models
from selectra.compare.cells import Cell, require_fair
from selectra.compare.store import Store
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Optim, Run, Spec, Train

__all__ = ["DATA", "RATES", "TABLES", "Budget", "Table", "_models", "base_run", "first_cells", "table_cells"]

DATA: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "etth1": {"path": "ett-small/ETTh1.csv.gz", "split": "ett"},
        "etth2": {"path": "ett-small/ETTh2.csv.gz", "split": "ett"},
        "ettm1": {"path": "ett-small/ETTm1.csv.gz", "split": "ett"},
        "ettm2": {"path": "ett-small/ETTm2.csv.gz", "split": "ett"},
        "exchange": {"path": "ltsf-extra/exchange_rate.csv.gz", "split": "ratio", "stamps": "order"},
        # The benchmark counts rows: one stamp is there twice, and some rows are missing.
        "weather": {"path": "ltsf-extra/weather.csv.gz", "split": "ratio", "stamps": "order"},
    }
)
HORIZONS = (96, 192, 336, 720)
RATES = (2e-4, 1e-3, 5e-3)
MAMBAS = ("tsm2", "timemachine", "simba_series", "s_mamba")
WITHOUT_GRADIENT = ("linear", "naive", "seasonal_naive")
MAIN = (*MAMBAS, "patchtst", "itransformer", "dlinear")
TRAINED = (*MAIN, "tsmixer", "nlinear", "rlinear", "gru")
# TSM2's sizes are not published: as with PatchTST the smaller one for the small data sets.
OWN_SIZES = MappingProxyType({("tsm2", data): "tsm2_large" for data in ("ettm1", "ettm2", "weather")})
# The models whose result depends on the order of the series; TimeMachine where it mixes them.
SCANNING: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"tsm2": {}, "s_mamba": {}, "timemachine": {"channel_independent": False}}
)
N_ORDERS = 5
# What TSM2 is without one of its parts.
ABLATIONS = ({"without": "time"}, {"without": "channels"}, {"without": "averages"}, {"window_norm": "none"})
# Places of a GPU, which has about 16, that a training takes where it is not one: the activations of TimeMachine, whose
# states stand beside every number of its scales, fill gibibytes, and three times as many with Weather's 21 series.
HEAVY = MappingProxyType({("timemachine", ""): 5, ("timemachine", "weather"): 16})
# Places of a stage: more than a table has cells.
SPAN = 1_000_000
BUDGETS = (250, 500, 1000, 2000)
BUDGET_TRIALS = "budget"
# Of their own, so that no such trial is a cell of a table.
BUDGET_SEED = 100
DECLARED = MappingProxyType({"optim.lr": "chosen for each model and data set on validation, of the same few"})


@dataclass(frozen=True)
class Budget:
    """What every training has alike.

    Args:
        steps: Optimizer steps.
        batch_size: Windows in a step.
        evaluations: Evaluations on validation, evenly spread, of which the best one's weights are kept.
    """

    steps: int = 1000
    batch_size: int = 32
    evaluations: int = 10


@dataclass(frozen=True)
class Table:
    """A rectangle of cells."""

    name: str
    data: tuple[str, ...]
    models: tuple[str, ...]
    seeds: int = 1
    lookbacks: tuple[int, ...] = (96,)
    horizons: tuple[int, ...] = HORIZONS
    orders: int = 1
    variants: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    """Arguments of a model that differ from its size's, one tuple entry for each variant of it."""


TABLES = {
    "a": Table("a", ("etth1", "etth2", "exchange"), (*TRAINED, *WITHOUT_GRADIENT), seeds=3),
    "b": Table("b", ("ettm1", "ettm2", "weather"), (*MAIN, "linear")),
    "orders": Table(
        "orders",
        ("etth1", "etth2", "exchange"),
        tuple(SCANNING),
        horizons=(96,),
        orders=N_ORDERS,
        variants={family: (args,) for family, args in SCANNING.items()},
    ),
    "ablation": Table(
        "ablation",
        ("etth1", "exchange", "ettm1", "weather"),
        ("tsm2",),
        horizons=(96, 336),
        variants={"tsm2": ABLATIONS},
    ),
    "c": Table(
        "c", ("etth1", "etth2", "ettm1", "weather"), ("tsm2", "patchtst", "dlinear", "linear"), lookbacks=(512, 336, 96)
    ),
}
# Its second Mamba model is the one that the other tables' validation errors choose.
LAST = "c"


def base_run(data: str, lookback: int, horizon: int, seed: int, budget: Budget) -> Run:
    """The run that all models of a cell share; its model is the one without parameters."""
    return Run(
        name=f"{data} {lookback} {horizon}",
        model=Spec("naive"),
        data=Spec("series_file", seq_len=lookback, horizon=horizon, **DATA[data]),
        task=Spec("forecasting", loss="mse"),
        optim=Optim(lr=RATES[1], weight_decay=0.01, warmup_steps=budget.steps // 20),
        train=Train(
            steps=budget.steps, batch_size=budget.batch_size, seed=seed,
            eval_every=max(1, budget.steps // budget.evaluations),
        ),
    )  # fmt: skip


def model_for(family: str, data: str, horizon: int) -> Spec:
    """The registered size for a data set (and horizon), or the usual one."""
    known = models.names("series")
    names = (f"{family}_{data}_{horizon}", f"{family}_{data}", OWN_SIZES.get((family, data), family))
    return Spec(next((name for name in names if name in known), names[-1]))


def cell(
    data: str, horizon: int, family: str, *, budget: Budget, place: int, lookback: int = 96, seed: int = 0,
    rate: float | None = None, order: int = 0, group: str = "", **args: Any,
) -> Cell:  # fmt: skip
    """One training of a model."""
    base = base_run(data, lookback, horizon, seed, budget)
    spec = model_for(family, data, horizon).replace(**args)
    optim = base.optim if rate is None else base.optim.model_copy(update={"lr": rate})
    name = f"{data} {lookback} {horizon} {family} seed {seed}"
    run = base.model_copy(update={"model": spec, "optim": optim, "name": name})
    require_fair(base, run, DECLARED)
    label = {"data": data, "lookback": lookback, "horizon": horizon, "model": family, "seed": seed, "order": order}
    if args:
        label["args"] = args
    weight = HEAVY.get((family, data), HEAVY.get((family, ""), 1))
    return Cell(run, place, MappingProxyType(label), order, family not in WITHOUT_GRADIENT, group, weight)


def budget_cells(batch_size: int) -> Iterator[Cell]:
    """Every trained model on ETTh1 at the middle rate, with each budget of steps: what the budget is chosen by."""
    for steps in BUDGETS:
        for family in TRAINED:
            budget = Budget(steps, batch_size)
            yield cell(
                "etth1", HORIZONS[0], family, budget=budget, place=-steps, rate=RATES[1], group=BUDGET_TRIALS,
                seed=BUDGET_SEED,
            )  # fmt: skip


def trials_of(data: str, family: str) -> str:
    """The group of a model's trials on a data set."""
    return f"rates {data} {family}"


def first_cells(tables: Iterable[str], budget: Budget) -> Iterator[Cell]:
    """What can be done at once: the trials of learning rates, and all that has none."""
    for rank, table in _named(tables):
        for index, (data, family) in enumerate((d, f) for d in table.data for f in table.models):
            if family in WITHOUT_GRADIENT:
                yield from table_cells(table, rank, data, family, budget, None)
                continue
            for rate in RATES:
                yield cell(
                    data, table.horizons[0], family, budget=budget, place=_stage(rank, family) * SPAN + index,
                    rate=rate, group=trials_of(data, family), lookback=min(table.lookbacks),
                )  # fmt: skip


def _stage(rank: int, family: str) -> int:
    """Light models of a table first, then those whose every step fills a GPU: beside these the others only wait."""
    return 4 * rank + 2 * ((family, "") in HEAVY)


def table_cells(
    table: Table, rank: int, data: str, family: str, budget: Budget, rate: float | None
) -> Iterator[Cell]:  # fmt: skip
    """The cells of a model on a data set with the chosen learning rate."""
    seeds = 1 if family in WITHOUT_GRADIENT else table.seeds
    for lookback in table.lookbacks:
        for number, horizon in enumerate(table.horizons):
            for seed in range(seeds):
                for order, args in product(range(table.orders), table.variants.get(family, ({},))):
                    # All models of a cell stand together: a limit of time cuts off whole cells.
                    steps = (table.lookbacks.index(lookback), table.data.index(data), number, seed, order)
                    within = sum(step * 10**power for step, power in zip(steps, range(5, 0, -1), strict=True))
                    place = (_stage(rank, family) + 1) * SPAN + within
                    yield cell(
                        data, horizon, family, lookback=lookback, seed=seed, budget=budget, place=place, rate=rate,
                        order=order, **args,
                    )  # fmt: skip


def chosen_rate(store: Store, data: str, family: str) -> float | None:
    """The learning rate with the lowest validation error; None while a trial is not finished.

    Raises:
        ConfigError: Every trial failed.
    """
    found = store.cells(trials_of(data, family))
    if not found or any(state in ("open", "taken") for _, state, _ in found):
        return None
    scores = {each.run.optim.lr: record["val"]["mse"] for each, state, record in found if state == "done" and record}
    if not scores:
        raise ConfigError(f"every trial of {family} on {data} failed; look at their reasons in '{store.path}'.")
    return min(scores, key=lambda rate: scores[rate])


def add_decided(store: Store, tables: Iterable[str], budget: Budget, only: tuple[str, str] | None = None) -> None:
    """Add the cells whose learning rate is known.

    Args:
        only: A data set and a model whose trials have just ended; None looks at all.
    """
    for rank, table in _named(tables):
        for data in table.data:
            for family in table.models:
                if family in WITHOUT_GRADIENT or (only is not None and only != (data, family)):
                    continue
                rate = chosen_rate(store, data, family)
                if rate is not None:
                    store.add(table_cells(table, rank, data, family, budget, rate))


def add_best_other(store: Store, budget: Budget) -> str | None:
    """Add the last table's cells of the Mamba model, beside TSM2, with the lowest mean validation error; its name."""
    scores: dict[str, list[float]] = {}
    for each, state, record in store.cells():
        family, horizon = each.label["model"], each.label["horizon"]
        mine = each.label["lookback"] == 96 and each.label["seed"] == 0 and not each.label["order"]
        if family in MAMBAS and state == "done" and record and mine and (horizon != HORIZONS[0] or not each.group):
            scores.setdefault(family, []).append(record["val"]["mse"])
    others = {family: fmean(found) for family, found in scores.items() if family not in TABLES[LAST].models}
    if not others:
        return None
    best = min(others, key=lambda family: others[family])
    table = replace(TABLES[LAST], models=(best,))
    for data in table.data:
        rate = chosen_rate(store, data, best)
        if rate is not None:
            store.add(table_cells(table, len(TABLES), data, best, budget, rate))
    return best


def _named(tables: Iterable[str]) -> list[tuple[int, Table]]:
    """The tables of these names, each with its number in the order of work."""
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise ConfigError(f"there is no table '{unknown[0]}'; there are {', '.join(TABLES)}.")
    return [(list(TABLES).index(name), TABLES[name]) for name in tables]


def variate_order(n_series: int, seed: int) -> np.ndarray:
    """The order in which the series stand: the file's for 0."""
    return np.arange(n_series) if seed == 0 else np.random.default_rng(seed).permutation(n_series)
