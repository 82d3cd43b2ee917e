"""The stand-ins, put in place for one test."""

from collections.abc import Iterator

import pytest

from selectra import compat


@pytest.fixture
def installed() -> Iterator[dict[str, str]]:
    """Names of other packages, importable for the length of a test."""
    try:
        yield compat.install()
    finally:
        compat.uninstall()
