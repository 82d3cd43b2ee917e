"""Models of equal size: the width or depth at which a model meets a budget of parameters, of FLOPs or of time.

A width is one whole number. Everything that belongs to it grows with it in the proportion of the registered size: the
widths of all stages, and the inner width of feed-forward networks. Where heads or blocks allow few widths, that inner
width alone then makes up the rest, or the multiple of the width that it is; where stages grow in steps too large for a
budget, the last stage's width does. Of a detector or a segmenter it is its backbone that is turned.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch

from selectra.compare.measure import Cost, count_parameters, flops_unbuilt, measure
from selectra.compare.room import fits, require_room
from selectra.compare.turned import WIDTHS, Turned, first_of, turn
from selectra.errors import ConfigError
from selectra.spec import Spec
from selectra.train.precision import Precision

TOLERANCE = 0.02
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
    turned = turn(spec, facts, over, align)

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
    turned, cost = turn(spec, facts, "width", 1), partial(_quantity, "params", facts=dict(facts), device="cpu")
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
    turned: Turned, cost: Callable[[Spec], float], wanted: float, tolerance: float, quantity: Quantity
) -> "_Tried":  # fmt: skip
    """The width, or the inner width, that comes nearest to a budget; refused where that is not near enough."""
    if quantity == "params":
        # Most of a search's time is for models that were made for the budget.
        own, value = cost(turned.whole), first_of(turned.values[turned.name])
        if abs(own / wanted - 1) <= tolerance / 4 and value % turned.align == 0:
            return _Tried(turned, value, own, {value: own})

    def hopeless(value: int) -> bool:
        """Whether the inner widths, too, leave the model too large at this value, the least that it can have."""
        least = (_next_valid(_safe(each, cost), 1) for each in turned.followers([value]))
        return all(each is None or each > wanted * (1 + tolerance) for each in least)

    tried = [_try(turned, cost, wanted, hopeless)]
    for follower in turned.followers(tried[0].seen) if tried[0].off(wanted) > tolerance else ():
        tried.append(_try(follower, cost, wanted))
    # What leaves the proportion is the last resort, what is nearest to it first.
    nearest = sorted(tried[0].seen, key=lambda value: abs(tried[0].seen[value] - wanted))
    for remainder in turned.remainders(nearest):
        if min(each.off(wanted) for each in tried) <= tolerance:
            break
        tried.append(_try(remainder, cost, wanted))
    best = min(tried, key=lambda each: each.off(wanted))
    if best.got is None or best.off(wanted) > tolerance:
        name, unit, model = turned.label, UNITS[quantity], turned.whole.name
        raise ConfigError(
            f"no {model}.{name} brings {model} within {100 * tolerance:g} % of {wanted:,.6g} {unit}: "
            f"{_nearest(tried[0], wanted, unit)}, or match another quantity."
        )
    return best


@dataclass
class _Tried:
    """The value of a width that comes nearest to a budget, and what was seen on the way."""

    turned: Turned
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


def _quantity(quantity: Quantity, spec: Spec, *, facts: Mapping[str, Any], device: torch.device | str) -> float:
    if quantity == "params":
        return count_parameters(spec, facts)
    if quantity == "flops":
        return flops_unbuilt(spec, facts)
    # One that is too large to be timed is above every budget of time.
    if not fits(count_parameters(spec, facts), torch.device(device)):
        return math.inf
    return measure(spec, facts, device=device, seconds=LATENCY_SECONDS).forward_ms


def _safe(turned: Turned, cost: Callable[[Spec], float]) -> Callable[[int], float | None]:
    """The cost at a value, None where the model cannot have it; counted once."""

    @cache
    def at(value: int) -> float | None:
        try:
            return cost(turned(value))
        except ConfigError:
            return None

    return at


def _try(
    turned: Turned, cost: Callable[[Spec], float], wanted: float, hopeless: Callable[[int], bool] = lambda value: True
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
