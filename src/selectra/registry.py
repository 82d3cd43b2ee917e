"""Names for models, data sets, tasks and recipes, and the road of every argument to its constructor.

The signature of what is registered is the schema. A value comes, in rising precedence, from the signature's
default, from the registered size, from the data's facts, or from the run; `resolve` says which.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, get_type_hints

from selectra.errors import ConfigError
from selectra.spec import Spec, nearest
from selectra.values import read_value, require_finite, type_name

T = TypeVar("T")
Origin = Literal["default", "size", "data", "run", "missing"]
USUAL_SIZE = "base"


class Resolved(NamedTuple):
    """One argument's value, and where it came from."""

    value: Any
    origin: Origin


@dataclass(frozen=True)
class Entry:
    """One registered name."""

    name: str
    size: str
    target: Callable[..., Any]
    kind: str
    source: str
    takes: tuple[str, ...]
    defaults: Mapping[str, Any] = field(hash=False)

    @property
    def summary(self) -> str:
        """The first line of the target's docstring."""
        return (inspect.getdoc(self.target) or "").partition("\n")[0]

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments that can be set, as the signature has them."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {name: p for name, p in inspect.signature(self.target).parameters.items() if p.kind in named}

    def hints(self) -> dict[str, Any]:
        """The annotation of every argument, evaluated."""
        constructor = self.target.__init__ if inspect.isclass(self.target) else self.target
        hints = get_type_hints(constructor, include_extras=True)
        return {name: hints.get(name, Any) for name in self.parameters()}


class Registry:
    """Names of one sort of thing.

    Args:
        what: The sort, as error messages call it: "model", "dataset", "task", "recipe".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, Entry] = {}
        self._families: dict[str, list[str]] = {}

    def register(
        self, name: str, *, kind: str = "", source: str = "", takes: tuple[str, ...] = (), **sizes: dict[str, Any]
    ) -> Callable[[T], T]:
        """Register a class or a function under `name`, or under `name_size` for each of its sizes.

        The bare name then means the size "base", or the only size there is.

        Args:
            kind: What it works on: "series", "image", ... A task names the kinds that it takes.
            source: The paper or the code it follows, such as "arXiv:2403.19888".
            takes: Which optional inputs it handles itself, such as "observed".
            sizes: For each size the arguments that differ from the signature's defaults.
        """

        def decorator(target: T) -> T:
            assert callable(target)
            for size, defaults in (sizes or {"": {}}).items():
                full = f"{name}_{size}" if size else name
                assert full not in self._entries
                entry = Entry(full, size, target, kind, source, takes, dict(defaults))
                unknown = set(defaults) - set(entry.parameters())
                assert not unknown
                self._entries[full] = entry
                self._families.setdefault(name, []).append(full)
            return target

        return decorator

    def names(self, kind: str | None = None) -> list[str]:
        """The registered names in alphabetical order, of one kind if given."""
        return sorted(name for name, entry in self._entries.items() if kind is None or entry.kind == kind)

    def families(self, kind: str | None = None) -> list[str]:
        """The names without sizes, of one kind if given."""
        return sorted(
            name for name, sizes in self._families.items() if kind is None or self._entries[sizes[0]].kind == kind
        )

    def entry(self, name: str) -> Entry:
        """Look a name up; a name without its size means the size "base", or the only one.

        Raises:
            ConfigError: There is no such name; the message holds the nearest one.
        """
        if name in self._entries:
            return self._entries[name]
        members = self._families.get(name, [])
        usual = f"{name}_{USUAL_SIZE}"
        if usual in members or len(members) == 1:
            return self._entries[usual if usual in members else members[0]]
        if members:
            raise ConfigError(f"{self.what} '{name}' has several sizes; choose one of {members}.")
        known = [*self._entries, *self._families]
        sizes = f" `selectra list {self.what}s` shows their sizes." if self.names() != self.families() else ""
        raise ConfigError(
            f"there is no {self.what} '{name}'; there are {self.families()}.{nearest(name, known)}{sizes}"
        )

    def resolve(
        self, spec: Spec, facts: Mapping[str, Any] | None = None, *, partial: bool = False
    ) -> dict[str, Resolved]:
        """Every argument of what `spec` names, with its value and where it came from. Builds nothing.

        Args:
            facts: What the data says, such as {"horizon": 96}; a fact that is no argument is not used, and a value
                of None is not known.
            partial: Give a missing argument the origin "missing" where it would otherwise be an error.

        Raises:
            ConfigError: Unknown or missing arguments, a value that does not fit, a run that contradicts the data.
        """
        entry = self.entry(spec.name)
        parameters, hints = entry.parameters(), entry.hints()
        self._refuse_unknown(spec, hints)
        resolved: dict[str, Resolved] = {}
        for name, parameter in parameters.items():
            what = f"{spec.name}: '{name}'"
            found = self._find(name, parameter, entry, facts or {})
            if name in spec.args:
                value = self._read(spec.args[name], found, hints[name], what)
                if found.origin == "data" and value != found.value:
                    raise ConfigError(f"{what} is {value!r} in the run, and the data says {found.value!r}.")
                found = Resolved(value, "data" if found.origin == "data" else "run")
            resolved[name] = found
        for name, item in resolved.items():
            if item.origin == "missing" and not partial:
                raise ConfigError(f"{spec.name} needs '{name}'; neither the run nor the data says it.")
            if isinstance(item.value, Spec):
                self._check_inner(f"{spec.name}.{name}", item.value, _facts_within(entry, resolved, facts), partial)
        return resolved

    def build(self, spec: Spec, facts: Mapping[str, Any] | None = None) -> Any:
        """Build what `spec` names; arguments that are Specs are built first.

        Raises:
            ConfigError: As `resolve`.
        """
        resolved, entry = self.resolve(spec, facts), self.entry(spec.name)
        within = _facts_within(entry, resolved, facts)
        return entry.target(**{name: self._build_value(item.value, within) for name, item in resolved.items()})

    def typed(self, spec: Spec) -> Spec:
        """The same Spec with its text values read by the annotations."""
        resolved = self.resolve(spec, partial=True)
        values = {name: resolved[name].value for name in spec.args}
        inner = {name: self.typed(value) for name, value in values.items() if isinstance(value, Spec)}
        return Spec(spec.name, **{**values, **inner})

    def _refuse_unknown(self, spec: Spec, hints: Mapping[str, Any]) -> None:
        for name in spec.args:
            if name not in hints:
                close = difflib.get_close_matches(name, hints, n=1)
                hint = f" Did you mean '{close[0]}' ({type_name(hints[close[0]])})?" if close else ""
                raise ConfigError(f"'{spec.name}' takes no argument '{name}'; it takes {list(hints)}.{hint}")

    @staticmethod
    def _find(name: str, parameter: inspect.Parameter, entry: Entry, facts: Mapping[str, Any]) -> Resolved:
        """What holds for an argument before the run speaks."""
        if facts.get(name) is not None:
            return Resolved(facts[name], "data")
        if name in entry.defaults:
            return Resolved(entry.defaults[name], "size")
        if parameter.default is not inspect.Parameter.empty:
            return Resolved(parameter.default, "default")
        return Resolved(None, "missing")

    @staticmethod
    def _read(value: Any, found: Resolved, hint: Any, what: str) -> Any:
        if isinstance(value, Spec):
            if value.name:
                return value
            if not isinstance(found.value, Spec):
                raise ConfigError(f"{what} has no arguments of its own: it is {found.value!r}.")
            return found.value.replace(**value.args)
        if isinstance(value, str) and _is_built(hint):
            return Spec(value)
        read = read_value(value, hint, what)
        require_finite(read, what)
        return read

    def _check_inner(self, where: str, spec: Spec, facts: Mapping[str, Any] | None, partial: bool) -> None:
        try:
            self.resolve(spec, facts, partial=partial)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def _build_value(self, value: Any, facts: Mapping[str, Any] | None) -> Any:
        if isinstance(value, Spec):
            return self.build(value, facts)
        return tuple(self._build_value(item, facts) for item in value) if isinstance(value, tuple) else value


def _facts_within(
    entry: Entry, resolved: Mapping[str, Resolved], facts: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """What holds for arguments that are Specs: the data's facts, or what `facts_within` of a class makes of them."""
    own = getattr(entry.target, "facts_within", None)
    return facts if own is None else own(facts or {}, {name: item.value for name, item in resolved.items()})


def _is_built(hint: Any) -> bool:
    """Whether an argument is an object that a Spec builds, so that text for it is a registered name."""
    return inspect.isclass(hint) and hint.__module__.partition(".")[0] not in {"builtins", "types", "typing", "pathlib"}


models = Registry("model")
datasets = Registry("dataset")
tasks = Registry("task")
recipes = Registry("recipe")
studies = Registry("study")
