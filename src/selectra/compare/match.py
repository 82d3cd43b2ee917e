"""Models of equal size: the width or depth at which a model meets a budget of parameters, of FLOPs or of time.

A width is one whole number. Everything that belongs to it grows with it in the proportion of the registered size: the
widths of all stages, and the inner width of feed-forward networks. Where heads or blocks allow few widths, that inner
width alone then makes up the rest; where stages grow in steps too large for a budget, the last stage's width does. Of a
detector or a segmenter it is its backbone that is turned.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch

from selectra.compare.measure import Cost, count_parameters, flops_unbuilt, measure
from selectra.compare.room import fits, require_room
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.precision import Precision

TOLERANCE = 0.02
# What is a width, or a depth: the first one that a model takes is turned, the others follow in proportion.
WIDTHS = ("d_model", "dims", "n1", "n2", "d_ff", "channel_dims", "d_stem")
DEPTHS = ("depth", "depths")
LARGEST = 2**14
# Widths on each side of the best that are looked at, since heads and blocks allow some widths alone.
NEIGHBOURS = 48
# Times waver: medians of so many seconds are compared.
LATENCY_SECONDS = 0.2
# Milliseconds of the longest forward pass that is searched for: some thirty such models are run on the way to one.
LONGEST = 10_000
# Powers of two above this one make no product faster.
EVEN = 64
Quantity = Literal["params", "flops", "latency"]
UNITS = {"params": "parameters", "flops": "FLOPs", "latency": "ms"}


@dataclass(frozen=True)
class Matched:
    """A model that meets a budget, with all that it costs."""

    spec: Spec
    quantity: Quantity
    wanted: float
    got: float
    over: str
    value: int
    cost: Cost


def match(
    spec: Spec,
    facts: Mapping[str, Any],
    *,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    over: Literal["width", "depth"] = "width",
    tolerance: float = TOLERANCE,
    align: int = 1,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Matched:
    """Find the width (or depth) at which a model meets one budget.

    Args:
        facts: What the data says, such as seq_len, horizon and n_series, or n_classes and img_size.
        params: Parameters that are trained.
        flops: FLOPs of a forward pass of one sample.
        latency: Milliseconds of a forward pass of a batch of 32, measured here.
        tolerance: How far off the budget is still met, as a part of it.
        align: Widths are multiples of this; half-precision products of others are slow on a GPU.
        precision: In which the cost of what was found is measured.

    Raises:
        ConfigError: Not exactly one budget is given, the model has no width, or no width meets the budget; then the
            message names the nearest ones.
    """
    given: dict[Quantity, float | None] = {"params": params, "flops": flops, "latency": latency}
    asked: list[tuple[Quantity, float]] = [(name, value) for name, value in given.items() if value is not None]
    if len(asked) != 1 or not 0 < asked[0][1] < math.inf:
        raise ConfigError(f"match takes one budget above 0: params=, flops= or latency=; got {given}.")
    quantity, wanted = asked[0]
    best = meet(spec, facts, quantity, wanted, over=over, tolerance=tolerance, device=device, align=align)
    assert best.got is not None
    require_room(spec.name, count_parameters(best.spec, facts), torch.device(device))
    measured = measure(best.spec, facts, device=device, precision=precision)
    return Matched(best.spec, quantity, wanted, best.got, best.turned.label, best.value, measured)


def meet(
    spec: Spec, facts: Mapping[str, Any], quantity: Quantity, wanted: float, *,
    over: Literal["width", "depth"] = "width", tolerance: float = TOLERANCE, device: torch.device | str = "cpu",
    align: int = 1, before_each: Callable[[], None] = lambda: None,
) -> "_Tried":  # fmt: skip
    """`match` without measuring what the model costs.

    Args:
        before_each: Called before each size that is tried; what it raises ends the search.
    """
    if quantity == "latency" and wanted > LONGEST:
        raise ConfigError(
            f"a latency of {wanted:,.6g} ms is asked for; a budget is at most {LONGEST:,} ms of a forward pass of 32 "
            "samples, since many models are timed on the way to it. Take a smaller one, or a budget of FLOPs."
        )
    turned = _turned(spec, facts, over, align)

    def cost(tried: Spec) -> float:
        before_each()
        return _quantity(quantity, tried, facts=dict(facts), device=device)

    return _best(turned, cost, wanted, tolerance, quantity)


def match_even(spec: Spec, facts: Mapping[str, Any], params: float, tolerance: float = TOLERANCE) -> tuple[Spec, int]:
    """The model at a number of parameters, and how many it has: of all widths within the tolerance the most even one.

    For measuring speed: products of odd widths are slow on every GPU, and that would be a model's bad luck. A model
    that meets the budget as it is stays so.

    Raises:
        ConfigError: No width meets the budget; the message names the nearest ones.
    """
    turned, cost = _turned(spec, facts, "width", 1), partial(_quantity, "params", facts=dict(facts), device="cpu")
    own = cost(spec)
    if abs(own / params - 1) <= tolerance:
        return spec, int(own)
    best = _best(turned, cost, params, tolerance, "params")
    assert best.got is not None
    around = range(max(1, round(best.value * (1 - tolerance))), round(best.value * (1 + tolerance)) + 1)
    for value in sorted(around, key=lambda each: (-_evenness(best.turned(each)), abs(each - best.value))):
        try:
            got = cost(best.turned(value))
        except ConfigError:
            continue
        if abs(got / params - 1) <= tolerance:
            return best.turned(value), int(got)
    return best.turned(best.value), int(best.got)


def _evenness(spec: Spec) -> int:
    """The largest power of two that divides all widths."""
    sizes = [each for name in WIDTHS if name in spec.args for each in np.atleast_1d(spec.args[name]).tolist()]
    # The lowest bit that is set.
    return min((min(each & -each, EVEN) for each in sizes), default=1)


def _best(
    turned: "_Turned", cost: Callable[[Spec], float], wanted: float, tolerance: float, quantity: Quantity
) -> "_Tried":  # fmt: skip
    """The width, or the inner width, that comes nearest to a budget; refused where that is not near enough."""
    if quantity == "params":
        # Most of a search's time is for models that were made for the budget.
        own, value = cost(turned.whole), _first(turned.values[turned.name])
        if abs(own / wanted - 1) <= tolerance / 4 and value % turned.align == 0:
            return _Tried(turned, value, own, {value: own})

    def hopeless(value: int) -> bool:
        """Whether the inner widths, too, leave the model too large at this value, the least that it can have."""
        least = (_next_valid(_safe(each, cost), 1) for each in turned.followers([value]))
        return all(each is None or each > wanted * (1 + tolerance) for each in least)

    tried = [_try(turned, cost, wanted, hopeless)]
    for follower in turned.followers(tried[0].seen) if tried[0].off(wanted) > tolerance else ():
        tried.append(_try(follower, cost, wanted))
    # Stages out of proportion are the last resort, those nearest to it first.
    nearest = sorted(tried[0].seen, key=lambda value: abs(tried[0].seen[value] - wanted))
    for stage in turned.last_stages(nearest):
        if min(each.off(wanted) for each in tried) <= tolerance:
            break
        tried.append(_try(stage, cost, wanted))
    best = min(tried, key=lambda each: each.off(wanted))
    if best.got is None or best.off(wanted) > tolerance:
        name, unit, model = turned.label, UNITS[quantity], turned.whole.name
        raise ConfigError(
            f"no {model}.{name} brings {model} within {100 * tolerance:g} % of {wanted:,.6g} {unit}: "
            f"{_nearest(tried[0], wanted, unit)}, or match another quantity."
        )
    return best


@dataclass(frozen=True)
class _Turned:
    """A spec as a function of its width or depth."""

    spec: Spec
    name: str
    values: Mapping[str, Any]
    align: int = 1
    above: Spec | None = None
    """The model of which `spec` is the backbone, if it is one."""
    unset: tuple[str, ...] = ()
    """Inner widths that follow the first one by themselves, as long as nobody sets them."""
    last: bool = False
    """Whether the last stage's width alone is turned."""

    def __call__(self, value: int) -> Spec:
        inner = self.inner(value)
        return inner if self.above is None else self.above.replace(backbone=inner)

    @property
    def whole(self) -> Spec:
        """The model as it is, with what it is the backbone of."""
        return self.spec if self.above is None else self.above.replace(backbone=self.spec)

    @property
    def label(self) -> str:
        """What is turned, as the command line says it."""
        name = f"{self.name}[-1]" if self.last else self.name
        return name if self.above is None else f"backbone.{name}"

    def inner(self, value: int) -> Spec:
        """The model itself, without what it is the backbone of."""
        if value % self.align:
            raise ConfigError(f"{self.name}={value} is no multiple of {self.align}.")
        if self.last:
            return self.spec.replace(**{self.name: (*self.values[self.name][:-1], value)})
        ratio = value / _first(self.values[self.name])
        return self.spec.replace(**{name: _scaled(each, ratio, self.align) for name, each in self.values.items()})

    def followers(self, values: Iterable[int]) -> "list[_Turned]":
        """With the width as it is at each of these values, each inner width to be turned alone."""
        fixed = [(value, self.inner(value)) for value in values]
        names = (*(*self.values,)[1:], *self.unset)
        return [
            _Turned(spec, name, {name: spec.args.get(name, value)}, self.align, self.above)
            for name in names for value, spec in fixed
        ]  # fmt: skip

    def last_stages(self, values: Iterable[int]) -> "list[_Turned]":
        """With the widths as they are at each of these values, the last stage's to be turned alone."""
        stages = self.values[self.name]
        if self.name in DEPTHS or not isinstance(stages, tuple) or len(stages) < 2:
            return []
        specs = [self.inner(value) for value in values]
        return [
            _Turned(spec, self.name, {self.name: spec.args[self.name]}, self.align, self.above, last=True)
            for spec in specs
        ]


@dataclass
class _Tried:
    """The value of a width that comes nearest to a budget, and what was seen on the way."""

    turned: _Turned
    value: int
    got: float | None
    seen: dict[int, float]

    @property
    def spec(self) -> Spec:
        """The model at this value."""
        return self.turned(self.value)

    def off(self, wanted: float) -> float:
        """How far off the budget, as a part of it."""
        return math.inf if self.got is None else abs(self.got / wanted - 1)


def has_size(spec: Spec, facts: Mapping[str, Any], over: Literal["width", "depth"]) -> bool:
    """Whether a model has a width (or depth) to turn, itself or in its backbone."""
    return bool(_sizes(spec, facts, over)[2])


def _turned(spec: Spec, facts: Mapping[str, Any], over: Literal["width", "depth"], align: int) -> _Turned:
    above, inner, values = _sizes(spec, facts, over)
    if not values:
        takes = ", ".join(name for name in models.resolve(spec, facts) if name not in facts) or "nothing"
        raise ConfigError(
            f"'{spec.name}' has no {over} to match a budget with: beside the data's facts it takes {takes}."
        )
    known = models.resolve(inner, partial=True)
    unset = tuple(name for name in WIDTHS if over == "width" and name in known and known[name].value is None)
    return _Turned(inner, next(iter(values)), values, align if over == "width" else 1, above, unset)


def _sizes(
    spec: Spec, facts: Mapping[str, Any], over: Literal["width", "depth"]
) -> tuple[Spec | None, Spec, dict[str, Any]]:
    """What can be turned, of which model, and what stands above that one where it is a backbone."""
    names, above = WIDTHS if over == "width" else DEPTHS, None
    resolved = models.resolve(spec, facts)
    backbone = resolved["backbone"].value if "backbone" in resolved else None
    if isinstance(backbone, Spec) and not any(name in resolved for name in names):
        above, spec = spec, backbone
        resolved = models.resolve(backbone, partial=True)
    values = {name: resolved[name].value for name in names if name in resolved and _is_size(resolved[name].value)}
    return above, spec, values


def _is_size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(each, int) for each in value))


def _first(value: Any) -> int:
    return value[0] if isinstance(value, tuple) else value


def _scaled(value: Any, ratio: float, align: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(each, ratio, align) for each in value)
    return max(1, round(value * ratio / align)) * align


def _quantity(quantity: Quantity, spec: Spec, *, facts: Mapping[str, Any], device: torch.device | str) -> float:
    if quantity == "params":
        return count_parameters(spec, facts)
    if quantity == "flops":
        return flops_unbuilt(spec, facts)
    # One that is too large to be timed is above every budget of time.
    if not fits(count_parameters(spec, facts), torch.device(device)):
        return math.inf
    return measure(spec, facts, device=device, seconds=LATENCY_SECONDS).forward_ms


def _safe(turned: _Turned, cost: Callable[[Spec], float]) -> Callable[[int], float | None]:
    """The cost at a value, None where the model cannot have it; counted once."""

    @cache
    def at(value: int) -> float | None:
        try:
            return cost(turned(value))
        except ConfigError:
            return None

    return at


def _try(
    turned: _Turned, cost: Callable[[Spec], float], wanted: float, hopeless: Callable[[int], bool] = lambda value: True
) -> _Tried:  # fmt: skip
    """The value nearest to the budget: doubled until above it, halved between, then its neighbours.

    Args:
        hopeless: Asked where already the least value that the model can have is above the budget: whether its
            neighbours are of no interest.
    """
    at = _safe(turned, cost)
    low, high = 1, 2
    while high < LARGEST and (_next_valid(at, high) or 0) < wanted:
        low, high = high, 2 * high
    # Costs rise with the width: where the greatest value is below the budget it is the nearest, or the least above it.
    if high >= LARGEST and (top := _last_valid(at, LARGEST + NEIGHBOURS)) and (at(top) or 0) < wanted:
        return _Tried(turned, top, at(top), {top: at(top) or 0})
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (_next_valid(at, middle) or math.inf) < wanted else (low, middle)
    if low <= NEIGHBOURS:
        least = next((value for value in range(1, low + NEIGHBOURS + 1) if at(value) is not None), None)
        if least is not None and (at(least) or 0) > wanted and hopeless(least):
            return _Tried(turned, least, at(least), {least: at(least) or 0})
    seen: dict[int, float] = {}
    for value in sorted(range(max(1, low - NEIGHBOURS), low + NEIGHBOURS + 1), key=lambda each: abs(each - low)):
        found = at(value)
        if found is not None:
            seen[value] = found
            # One on each side is enough.
            if min(seen.values()) <= wanted <= max(seen.values()):
                break
    best = min(seen, key=lambda value: abs(seen[value] - wanted), default=low)
    return _Tried(turned, best, seen.get(best), seen)


def _next_valid(at: Callable[[int], float | None], value: int) -> float | None:
    """The cost of the next value, from here on, that the model can have."""
    costs = (at(each) for each in range(value, value + NEIGHBOURS))
    return next((cost for cost in costs if cost is not None), None)


def _last_valid(at: Callable[[int], float | None], value: int) -> int | None:
    """The last value, up to here, that the model can have."""
    return next((each for each in range(value - 1, value - 2 * NEIGHBOURS, -1) if at(each) is not None), None)


def _nearest(tried: _Tried, wanted: float, unit: str) -> str:
    below = [value for value, cost in tried.seen.items() if cost <= wanted]
    above = [value for value, cost in tried.seen.items() if cost > wanted]
    sides = [*([max(below)] if below else []), *([min(above)] if above else [])]
    if not sides:
        return "none that was tried can be built; take another size of it"
    shown = [f"{tried.turned.label}={value} {_costing(tried.seen[value], unit)}" for value in sides]
    if len(sides) == 1:
        bound = "least" if below == [] else "most"
        return f"the {bound} is {shown[0]}; ask for that"
    return f"the nearest are {' and '.join(shown)}; ask for one of these"


def _costing(cost: float, unit: str) -> str:
    return f"with {cost:,.6g} {unit}" if cost < math.inf else "too large for the memory here"
