"""What parts told each other, kept where a forward is computed again during backward: nobody tells it twice."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

# The forwards that run now, innermost last; changed by one list operation at a time.
_running: list["Kept"] = []


class Kept:
    """What one forward heard, in the order of its calls."""

    def __init__(self) -> None:
        self.found: deque[Any] = deque()
        self.again = False

    @contextlib.contextmanager
    def first_time(self) -> Iterator[None]:
        """Around the forward: what it hears is kept."""
        with _inside(self):
            yield

    @contextlib.contextmanager
    def second_time(self) -> Iterator[None]:
        """Around the same forward later: it hears what was kept, and then nobody keeps it any longer."""
        self.again = True
        with _inside(self):
            yield


@contextlib.contextmanager
def _inside(kept: Kept) -> Iterator[None]:
    _running.append(kept)
    try:
        yield
    finally:
        _running.remove(kept)


def once(find: Callable[[], Any]) -> Any:
    """What `find` finds; where a forward is computed again what it found the first time."""
    kept = _running[-1] if _running else None
    if kept is None:
        return find()
    if kept.again:
        assert kept.found, "a forward that is computed again makes more calls than it made at first"
        return kept.found.popleft()
    found = find()
    kept.found.append(found)
    return found
