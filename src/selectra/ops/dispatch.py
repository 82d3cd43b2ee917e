"""One dispatch for every operator: which backend runs a call, why, and how to ask for another.

An `Op` tries its backends in order of preference. Each says in words why it refuses a call; the first that does
not refuse runs it. A backend that was asked for (`using`, or the environment variable SELECTRA_KERNEL) and refuses
raises `BackendError` with its reason: nothing falls back in silence.
"""

import contextlib
import difflib
import inspect
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from selectra.errors import BackendError

P = ParamSpec("P")
Call = TypeVar("Call")
Result = TypeVar("Result")

ENVIRONMENT_VARIABLE = "SELECTRA_KERNEL"
logger = logging.getLogger("selectra")


@dataclass(frozen=True)
class Backend(Generic[Call, Result]):
    """One implementation of an operator.

    `refuse` looks at device, dtype, shape and flags alone: it is pure, cheap and traceable. An exception inside it
    is a bug, not a refusal.
    """

    name: str
    refuse: Callable[[Call], str | None]
    run: Callable[[Call], Result]
    only_when_asked: bool = False


class Op(Generic[P, Call, Result]):
    """An operator with several backends.

    Args:
        name: The operator's name, as in SELECTRA_KERNEL.
        prepare: Checks the arguments and turns them into one call; its signature and docstring are the operator's.
        backends: In order of preference.
        returns: What a call returns, for the operator's signature; `prepare` itself returns the call.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[P, Call],
        backends: Sequence[Backend[Call, Result]],
        returns: Any = inspect.Signature.empty,
    ) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        # The only state, changed by one list operation at a time: threads need no lock, and a compiled function that
        # finds another choice is compiled anew.
        self._entries: list[_Entry] = []
        self._wrappers: list[Callable[[Call], Result]] = []
        self._prepare = prepare
        self.__doc__ = prepare.__doc__
        self.__name__ = name
        self.__signature__ = inspect.signature(prepare).replace(return_annotation=returns)
        OPS[name] = self

    def __reduce__(self) -> tuple[Callable[[str], "Op[Any, Any, Any]"], tuple[str]]:
        """A copy or an unpickled operator is the same operator."""
        return _by_name, (self.name,)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        call = self._prepare(*args, **kwargs)
        if self._wrappers:
            return self._wrappers[-1](call)
        return self.run(call)

    def run(self, call: Call) -> Result:
        """Run a checked call on the backend that takes it, past any wrapper."""
        return self.choose(call).run(call)

    @property
    def wrapped(self) -> bool:
        """Whether calls go to a wrapper now: then nobody may go past this operator to its kernels."""
        return bool(self._wrappers)

    @contextlib.contextmanager
    def wrapping(self, wrapper: Callable[[Call], Result]) -> Iterator[None]:
        """Hand every checked call inside the block to `wrapper`, in this whole process; the innermost block decides."""
        self._wrappers.append(wrapper)
        try:
            yield
        finally:
            self._wrappers.remove(wrapper)

    @property
    def asked(self) -> str | None:
        """The backend that a `using` block asks for."""
        # One slice: another thread may leave its block between a look and a read.
        last = self._entries[-1:]
        return last[0].backend if last else None

    def wish(self) -> str | None:
        """The backend that a `using` block or the environment asks for."""
        return self.asked or _environment.choice(self.name)

    def choose(self, call: Call) -> Backend[Call, Result]:
        """The backend that takes `call`.

        Raises:
            BackendError: The backend that was asked for refuses; the message is its reason.
        """
        asked = self.wish()
        if asked is not None:
            backend = self.backends[asked]
            reason = backend.refuse(call)
            if reason is not None:
                raise BackendError(f"{self.name}: backend '{asked}' was asked for and cannot take this call: {reason}")
            return backend
        for backend in self.backends.values():
            if not backend.only_when_asked and backend.refuse(call) is None:
                return backend
        raise BackendError(f"{self.name}: no backend takes this call: {self._reasons(call)}")

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str]:
        """For each backend "ok", or why it refuses this call."""
        return self._reasons(self._prepare(*args, **kwargs))

    def _reasons(self, call: Call) -> dict[str, str]:
        return {name: backend.refuse(call) or "ok" for name, backend in self.backends.items()}

    def backend_for(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The name of the backend that this call would run on."""
        return self.choose(self._prepare(*args, **kwargs)).name

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run every call inside the block on backend `name`, in this whole process; a refusal raises.

        Where blocks of several threads overlap, the one that was entered last and is not left yet decides.
        """
        _require_known(name, self.backends, f"backend of {self.name}")
        entry = _Entry(name)
        self._entries.append(entry)
        try:
            yield
        finally:
            self._entries.remove(entry)


class _Entry:
    """One `using` block that is not left yet; equal to itself alone."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


OPS: dict[str, Op[Any, Any, Any]] = {}


def _by_name(name: str) -> Op[Any, Any, Any]:
    return OPS[name]


def _require_known(name: str, known: dict[str, Any], what: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise BackendError(f"'{name}' is no {what}; there are {', '.join(known)}.{hint}")


class _Environment:
    """What SELECTRA_KERNEL asks for, read once when `selectra.ops` is imported."""

    def __init__(self) -> None:
        self.choices: dict[str, str] = {}
        self.problem: str | None = None

    def choice(self, op: str) -> str | None:
        if self.problem is not None:
            raise BackendError(self.problem)
        return self.choices.get(op)

    def read(self, text: str) -> None:
        """Read `op=backend[,op=backend]`; what is wrong with it is raised at the first call, and shown by doctor."""
        self.choices, self.problem = {}, None
        for item in filter(None, (part.strip() for part in text.split(","))):
            op, equals, backend = (part.strip() for part in item.partition("="))
            try:
                if not equals:
                    raise BackendError(f"'{item}' is not of the form operator=backend.")
                _require_known(op, OPS, "operator")
                _require_known(backend, OPS[op].backends, f"backend of {op}")
            except BackendError as error:
                self.problem = f"{ENVIRONMENT_VARIABLE}='{text}': {error}"
                return
            self.choices[op] = backend


_environment = _Environment()


def read_environment() -> None:
    """Take SELECTRA_KERNEL over and announce it; called when all operators are defined."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    _environment.read(text)
    if _environment.choices:
        logger.warning("%s is set: %s", ENVIRONMENT_VARIABLE, _environment.choices)


def environment_problem() -> str | None:
    """What is wrong with SELECTRA_KERNEL, in words, or None."""
    return _environment.problem


_said: set[tuple[str, str, str]] = set()


def say_slow_path(op_name: str, backend: str, call: Any, device: str) -> None:
    """Log, once for each operator and kind of device, why a slower backend runs that nobody asked for."""
    key = (op_name, backend, device)
    op = OPS[op_name]
    if key in _said or op.wish() is not None:
        return
    faster = itertools.takewhile(lambda name: name != backend, op.backends)
    reasons = {name: op.backends[name].refuse(call) for name in faster}
    if None in reasons.values():
        # It was asked for when this call was compiled or exported.
        return
    _said.add(key)
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    logger.warning("%s runs on its %s backend, which is slow on %s (%s).", op_name, backend, device, said)
