"""A study: base runs, variants of the model, and nothing else that may differ unless it is declared with a reason."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from selectra.compare.cells import Cell, require_fair
from selectra.errors import ConfigError
from selectra.spec import Run, Section, Spec, nearest, override

FEWEST_SEEDS = 3
# Seeds of trials of settings: none of those that are scored.
TRIAL_SEED = 1000
# Places of a stage: more than a study has cells.
SPAN = 1_000_000


class Variant(Section):
    """A model that takes part."""

    name: str
    """What tables call it."""
    model: Spec
    """The model and its arguments."""
    kind: str = ""
    """Its sort, such as "mamba", "attention" or "linear"; variants of one sort can be the study's subject together."""
    changes: tuple[str, ...] = ()
    """Differences outside the model, as on the command line: `optim.lr=0.005`. Each must be declared."""


class Tuning(Section):
    """The same trials of settings for every variant, judged on the validation part alone with seeds of their own."""

    values: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Settings to try, each of one dotted name with all its values: every value is one trial."""
    repeats: int = Field(default=1, ge=1)
    """Seeds with which each of the values is tried; the mean error judges it, a training that failed rules it out."""
    ranges: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Settings drawn by optuna from a range, even in logarithm; takes the extra "compare"."""
    trials: int = Field(default=0, ge=0)
    """Draws from the ranges, as many for every variant."""
    prune: bool = True
    """End a trial that is worse than the median of its variant's earlier ones at the same evaluation."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.values) == bool(self.ranges):
            raise ValueError("give either 'values' or 'ranges', and not both")
        if bool(self.ranges) != bool(self.trials):
            raise ValueError("'ranges' need 'trials', and 'trials' need 'ranges'")
        if len(self.values) > 1:
            raise ValueError(f"'values' has one setting, and got {list(self.values)}; for several take 'ranges'")
        if self.ranges and self.repeats > 1:
            raise ValueError("'repeats' are of 'values': draws from ranges follow from each other")
        for name, (low, high) in self.ranges.items():
            if not 0 < low < high < math.inf:
                raise ValueError(f"the range of {name} is ({low}, {high}); it must be 0 < low < high")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The settings that are tuned."""
        return (*self.values, *self.ranges)

    @property
    def count(self) -> int:
        """Trials of each variant on each base."""
        return self.trials or self.repeats * len(next(iter(self.values.values())))

    def seed(self, number: int) -> int:
        """That of a trial: all values are tried with the first one, then all with the next."""
        return TRIAL_SEED if self.ranges else TRIAL_SEED + number // len(next(iter(self.values.values())))


class Budget(Section):
    """What every model that has a width is brought to, within 2 %."""

    quantity: Literal["params", "flops", "latency"]
    """Parameters; FLOPs of a forward pass of one sample; milliseconds of a forward pass of 32 samples."""
    amount: float = Field(gt=0, allow_inf_nan=False)
    """How much."""
    over: Literal["width", "depth"] = "width"
    """What is turned."""
    align: int = Field(default=1, ge=1)
    """Widths are multiples of this; half-precision products of others are slow on a GPU."""


class Study(Section):
    """Base runs on which every variant is trained with the same seeds, data order, steps and trials."""

    name: str
    """A short name, for files."""
    question: str
    """What it answers, in one sentence."""
    bases: tuple[Run, ...] = Field(min_length=1)
    """Runs that the variants share, each with a name of its own; their model only holds the place."""
    variants: tuple[Variant, ...] = Field(min_length=2)
    """The models that are compared."""
    subject: str
    """A variant, or a sort of variants of which the one best on validation is set against those of other sorts."""
    subject_title: str = ""
    """What headings call it; default: the subject as it is."""
    seeds: int = Field(default=FEWEST_SEEDS, ge=1)
    """Trainings of every variant on every base."""
    declared: dict[str, str] = Field(default_factory=dict)
    """What may differ beside the model, by dotted name, each with the reason, which the report prints."""
    tuning: Tuning | None = None
    """Trials of settings before the scored trainings."""
    budget: Budget | None = None
    """Equal sizes."""
    metric: str = "mse"
    """The test metric that decides."""
    higher_is_better: bool = False
    """Whether more of it is better."""
    lengths: tuple[int, ...] = ()
    """Look-backs at which time and memory are measured."""

    def check(self) -> None:
        """Refuse what would be no fair comparison; builds nothing.

        Raises:
            ConfigError: What is wrong, and what to do.
        """
        if self.seeds < FEWEST_SEEDS:
            raise ConfigError(
                f"the study '{self.name}' has {self.seeds} seed{'s' if self.seeds > 1 else ''}, too few for a verdict: "
                f"chance cannot be told from a difference; take at least {FEWEST_SEEDS}."
            )
        for what, names in (("variants", [each.name for each in self.variants]),
                            ("bases", [each.name for each in self.bases])):  # fmt: skip
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ConfigError(f"two {what} of the study '{self.name}' have the name '{twice[0]}'; rename one.")
        self._check_subject()
        for name, reason in self.declared.items():
            if not reason.strip():
                raise ConfigError(f"'{name}' is declared to differ without a reason; the report prints one.")
            if name.partition(".")[0] in ("model", ""):
                raise ConfigError(f"'{name}' is declared to differ; the model may differ anyway, leave it out.")
        for name in () if self.tuning is None else self.tuning.names:
            if name not in self.declared:
                raise ConfigError(f"{name} is tuned, so it differs between variants; declare it with a reason.")
        for base in self.bases:
            self._check_runs(base)

    def _check_subject(self) -> None:
        names, kinds = [each.name for each in self.variants], {each.kind for each in self.variants if each.kind}
        if self.subject not in (*names, *kinds):
            known = [*names, *sorted(kinds)]
            raise ConfigError(f"the subject '{self.subject}' is no variant and no kind of variants; there are {known}."
                              f"{nearest(self.subject, known)}")  # fmt: skip
        if all(self.is_subject(each) for each in self.variants):
            raise ConfigError(f"every variant is '{self.subject}'; a study needs one to set it against.")

    def _check_runs(self, base: Run) -> None:
        seen: dict[str, str] = {}
        for variant in self.variants:
            run = self.run(base, variant, 0)
            require_fair(seeded(base, 0), run, self.declared)
            text = run.model_copy(update={"name": ""}).to_json()
            if text in seen:
                raise ConfigError(f"the variants '{seen[text]}' and '{variant.name}' are the same run; drop one.")
            seen[text] = variant.name

    def is_subject(self, variant: Variant) -> bool:
        """Whether a variant is the subject, or one of those that it may be."""
        return self.subject in (variant.name, variant.kind)

    def rivals(self, subject: str) -> list[str]:
        """The variants that the subject is set against: one of its own sort is none."""
        return [each.name for each in self.variants if each.name != subject and not self.is_subject(each)]

    def run(self, base: Run, variant: Variant, seed: int, settings: Mapping[str, Any] | None = None) -> Run:
        """One training.

        Args:
            settings: What tuning chose, by dotted name.
        """
        words = [*variant.changes, *(f"{name}={value!r}" for name, value in (settings or {}).items())]
        run = override(base.model_copy(update={"model": variant.model}), words)
        return seeded(run, seed).model_copy(update={"name": f"{base.name} {variant.name} seed {seed}"})

    def base(self, name: str) -> Run:
        """A base by its name."""
        return next(each for each in self.bases if each.name == name)

    def variant(self, name: str) -> Variant:
        """A variant by its name."""
        return next(each for each in self.variants if each.name == name)

    def scored(
        self, base: Run, variant: Variant, by_gradient: bool, settings: Mapping[str, Any] | None = None
    ) -> Iterator[Cell]:  # fmt: skip
        """The cells of a variant on a base: one for each seed, and a single one where no seed can change anything."""
        number, rank = self.bases.index(base), [each.name for each in self.variants].index(variant.name)
        for seed in range(self.seeds if by_gradient else 1):
            # All variants of a seed stand together: a limit of time cuts off whole comparisons.
            place = SPAN + (seed * len(self.bases) + number) * len(self.variants) + rank
            run = self.run(base, variant, seed, settings)
            require_fair(seeded(base, seed), run, self.declared)
            yield Cell(run, place, label_of(base, variant, seed), by_gradient=by_gradient)

    def trial(self, base: Run, variant: Variant, number: int, settings: Mapping[str, Any]) -> Cell:
        """The cell of a trial."""
        rank = self.bases.index(base) * len(self.variants) + [each.name for each in self.variants].index(variant.name)
        assert self.tuning is not None
        seed = self.tuning.seed(number)
        run = self.run(base, variant, seed, settings)
        label = MappingProxyType({**label_of(base, variant, seed), "trial": number})
        place = number * len(self.bases) * len(self.variants) + rank
        return Cell(run, place, label, group=trials_of(base.name, variant.name), trial=number)


def seeded(run: Run, seed: int) -> Run:
    """The same run from another seed."""
    return run.model_copy(update={"train": run.train.model_copy(update={"seed": seed})})


def label_of(base: Run, variant: Variant, seed: int) -> Mapping[str, Any]:
    """What tables call a cell."""
    return MappingProxyType({"base": base.name, "variant": variant.name, "seed": seed})


def trials_of(base: str, variant: str) -> str:
    """The group of a variant's trials."""
    return f"trials of {variant} on {base}"


def changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What two studies, in JSON's types, differ in, by dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from changes(*pair, f"{name}.{number}")
    elif before != now:
        yield f"{name} is {_brief(before)} there and {_brief(now)} now"


def _brief(value: Any) -> str:
    """A value; of several, their names or how many they are."""
    if isinstance(value, list):
        return f"[{', '.join(str(each['name']) if isinstance(each, dict) else str(each) for each in value)}]"
    return "absent" if value is None else "another" if isinstance(value, dict) else repr(value)
