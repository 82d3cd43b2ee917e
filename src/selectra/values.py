"""Values from command lines and JSON files: read as an annotation says, and named as a user reads them."""

import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from selectra.errors import ConfigError


def describe_problem(error: ValidationError) -> str:
    """The first problem of a validation in one line: the field, its value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    place, value = ".".join(str(part) for part in first["loc"]), first["input"]
    if not place or isinstance(value, Mapping) or repr(value) in first["msg"]:
        return first_problem(error)
    return f"{place} is {value!r}: {str(first['msg']).removeprefix('Value error, ')}."


def type_name(hint: Any) -> str:
    """A type as a user reads it: `int`, `float | None`, `'mse' | 'mae'`."""
    origin = get_origin(hint)
    if origin is Annotated:
        return type_name(get_args(hint)[0])
    if origin is Literal:
        return " | ".join(repr(value) for value in get_args(hint))
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(part) for part in get_args(hint))
    if origin is tuple:
        return f"tuple[{', '.join('...' if part is Ellipsis else type_name(part) for part in get_args(hint))}]"
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    if get_origin(hint) is Annotated:
        return _parts(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def read_value(value: Any, hint: Any, what: str) -> Any:
    """Read a value, text from a command line or a Python value, as the annotation `hint` says.

    Text "none" is None where None is allowed, and "1,2" or "(1, 2)" is a tuple where one is asked for.

    Raises:
        ConfigError: The value does not fit; the message names `what`, the value and the type.
    """
    parts = _parts(hint)
    candidates = [value]
    if isinstance(value, str):
        if value.lower() == "none" and type(None) in parts:
            return None
        if any(part is tuple or get_origin(part) is tuple for part in parts):
            items = (item.strip() for item in value.strip("()[] ").split(","))
            candidates.append(tuple(item for item in items if item))
        # pydantic reads no number from text where only some are allowed.
        allowed = [each for part in parts if get_origin(part) is Literal for each in get_args(part)]
        candidates += [each for each in allowed if str(each) == value]
    # pydantic refuses a config beside a type that has its own, such as a model or a dataclass.
    own_config = isinstance(hint, type) and hasattr(hint, "__pydantic_config__")
    plain_class = isinstance(hint, type) and not issubclass(hint, BaseModel) and not own_config
    config = ConfigDict(arbitrary_types_allowed=True) if plain_class or len(parts) > 1 else None
    adapter = TypeAdapter(hint, config=config)
    problem: ValidationError | None = None
    for candidate in candidates:
        try:
            return adapter.validate_python(candidate)
        except ValidationError as error:
            problem = error
    raise ConfigError(f"{what} is {value!r}, which is no {type_name(hint)}: {first_problem(problem)}") from problem


def require_finite(value: Any, what: str) -> None:
    """Refuse a number that is infinite or none, as JSON files of other programs may hold; ranges may be open.

    Raises:
        ConfigError: It is; the message names `what`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{what} is {value}; it must be a finite number.")
    if isinstance(value, tuple) and any(isinstance(each, float) and math.isnan(each) for each in value):
        raise ConfigError(f"{what} is {value}; each must be a number.")


def first_problem(error: ValidationError | None) -> str:
    """The first problem of a validation in pydantic's words, with its place."""
    assert error is not None
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}." if place and error.title != "Annotated" else f"{message}."
