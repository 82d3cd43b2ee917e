"""A model as a function of its width or depth: one whole number, which everything that belongs to it follows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Spec

# What is a width, or a depth: the first one that a model takes is turned, the others follow in proportion.
WIDTHS = ("d_model", "dims", "n1", "n2", "d_ff", "channel_dims", "d_stem")
DEPTHS = ("depth", "depths")
# The inner width of feed-forward networks as a multiple of the width.
RATIO = "mlp_ratio"


@dataclass(frozen=True)
class Turned:
    """A spec as a function of its width or depth."""

    spec: Spec
    name: str
    values: Mapping[str, Any]
    align: int = 1
    above: Spec | None = None
    """The model of which `spec` is the backbone, if it is one."""
    unset: tuple[str, ...] = ()
    """Inner widths that follow the first one by themselves, as long as nobody sets them."""
    part: Literal["all", "last stage", "inner width"] = "all"
    """What is turned: all in proportion, or that alone."""

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
        name = {"all": "", "last stage": "[-1]", "inner width": f" * {RATIO}"}[self.part]
        name = self.name + name
        return name if self.above is None else f"backbone.{name}"

    def inner(self, value: int) -> Spec:
        """The model itself, without what it is the backbone of."""
        if value % self.align:
            raise ConfigError(f"{self.name}={value} is no multiple of {self.align}.")
        if self.part == "last stage":
            return self.spec.replace(**{self.name: (*self.values[self.name][:-1], value)})
        if self.part == "inner width":
            # Models cut the product off; a little more keeps rounding from taking one away.
            return self.spec.replace(**{RATIO: (value + 1e-4) / self.values[self.name]})
        ratio = value / first_of(self.values[self.name])
        return self.spec.replace(**{name: _scaled(each, ratio, self.align) for name, each in self.values.items()})

    def followers(self, values: Iterable[int]) -> "list[Turned]":
        """With the width as it is at each of these values, each inner width to be turned alone."""
        fixed = [(value, self.inner(value)) for value in values]
        names = (*(*self.values,)[1:], *self.unset)
        return [
            Turned(spec, name, {name: spec.args.get(name, value)}, self.align, self.above)
            for name in names for value, spec in fixed
        ]  # fmt: skip

    def remainders(self, values: Iterable[int]) -> "list[Turned]":
        """With the widths as they are at each of these values, what can make up the rest out of proportion.

        Of stages that is the last one's width, of others the inner width where it is a multiple of the width.
        """
        stages = self.values[self.name]
        if isinstance(stages, tuple) and len(stages) > 1 and self.name not in DEPTHS:
            part = "last stage"
        elif isinstance(stages, int) and self.name in WIDTHS and RATIO in models.resolve(self.spec, partial=True):
            part = "inner width"
        else:
            return []
        specs = [self.inner(value) for value in values]
        return [
            Turned(spec, self.name, {self.name: spec.args[self.name]}, self.align, self.above, part=part)
            for spec in specs
        ]


def has_size(spec: Spec, facts: Mapping[str, Any], over: Literal["width", "depth"]) -> bool:
    """Whether a model has a width (or depth) to turn, itself or in its backbone."""
    return bool(_sizes(spec, facts, over)[2])


def turn(spec: Spec, facts: Mapping[str, Any], over: Literal["width", "depth"], align: int) -> Turned:
    """The model as a function of its width (or depth).

    Raises:
        ConfigError: It has none.
    """
    above, inner, values = _sizes(spec, facts, over)
    if not values:
        takes = ", ".join(name for name in models.resolve(spec, facts) if name not in facts) or "nothing"
        raise ConfigError(
            f"'{spec.name}' has no {over} to match a budget with: beside the data's facts it takes {takes}."
        )
    known = models.resolve(inner, partial=True)
    unset = tuple(name for name in WIDTHS if over == "width" and name in known and known[name].value is None)
    return Turned(inner, next(iter(values)), values, align if over == "width" else 1, above, unset)


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


def first_of(value: Any) -> int:
    """A width, or the first of several."""
    return value[0] if isinstance(value, tuple) else value


def _scaled(value: Any, ratio: float, align: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(each, ratio, align) for each in value)
    return max(1, round(value * ratio / align)) * align
