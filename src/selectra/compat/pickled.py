"""Modules that were pickled whole where another generation of the field's packages was installed."""

from typing import Any


def completed(state: dict[str, Any], **absent: Any) -> dict[str, Any]:
    """A pickled module's state, with what its class of that time did not keep; parts of it are left as they are."""
    parts = state.get("_modules", {})
    return {name: value for name, value in absent.items() if name not in parts} | state
