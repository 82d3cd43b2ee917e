"""Errors in the words of the command line."""

import difflib
import inspect
import re
from enum import StrEnum
from typing import Any, get_type_hints

from selectra.errors import ConfigError
from selectra.values import type_name


def describe_usage(error: Any) -> str:
    """A usage error in one line; an unknown option with the nearest one and its type."""
    unknown, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if unknown is None or context is None:
        return error.format_message()
    # The annotations say more than what typer keeps of them.
    hints = get_type_hints(inspect.unwrap(context.command.callback))
    options = {option: hints.get(p.name) for p in context.command.params for option in p.opts if option[:2] == "--"}
    close = difflib.get_close_matches(unknown, options, n=1)
    hint = f" Did you mean {close[0]} ({_option_type(options[close[0]])})?" if close else ""
    return f"'{context.command_path}' has no option '{unknown}'; it has {', '.join(options)}.{hint}"


def _option_type(hint: Any) -> str:
    if inspect.isclass(hint) and issubclass(hint, StrEnum):
        return " | ".join(hint)
    return "no value" if hint is bool else type_name(hint).removesuffix(" | None")


def with_options(message: str) -> str:
    """A message about the data that names arguments of Python, `freq=...`, with the options of `forecast` instead."""
    message = re.sub(r"\bfutr_df(=\.\.\.)?", "--futr", message)
    return re.sub(r"(?<![\w.'-])(time|freq|stamps|target|split)=(?=[\w.])", r"--\1 ", message)


def read_lookback(text: str) -> Any:
    """A look-back in rows, or "auto".

    Raises:
        ConfigError: It is neither.
    """
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise ConfigError(f"--lookback {text!r}: a whole number of at least 1, or auto")
    return text if text == "auto" else int(text)


def read_levels(text: str) -> tuple[float, ...]:
    """Levels in per cent from "80,95"; none from "none".

    Raises:
        ConfigError: A part is no number between 0 and 100.
    """
    if text.strip().lower() == "none":
        return ()
    try:
        levels = {float(part) for part in text.split(",")}
    except ValueError:
        levels = {0.0}
    if not all(0 < level < 100 for level in levels):
        raise ConfigError(f"--level {text!r}: numbers between 0 and 100, as 80,95, or none")
    return tuple(sorted(levels))
