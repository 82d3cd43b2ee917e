"""The directions in which a model's mixers scan, and what becomes of it without one of them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectra.mixers import Bidirectional, CrossPaths, SelectiveChannel
from selectra.models.rsmamba import PathMixer

# Names for people; of a grid, of a line of tokens, and of what scans channels.
GRID = {"right": "→ row by row", "down": "↓ column by column", "left": "← rows backwards", "up": "↑ columns backwards"}
LINE = ("→ first to last", "← last to first", "⇄ shuffled order")
CHANNELS = ("channels, first to last", "channels, last to first")


@dataclass(frozen=True)
class Site:
    """A mixer that scans in several directions."""

    layer: str
    mixer: nn.Module
    kind: str
    """"tokens" or "channels"."""
    routes: tuple[str, ...]
    without: Callable[[int], contextlib.AbstractContextManager[None]]
    """Inside it the direction of this number adds nothing."""


def sites(model: nn.Module) -> list[Site]:
    """All mixers of a model that scan in more than one direction, in the model's order."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, CrossPaths) and len(module.routes) > 1:
            found.append(Site(name, module, "tokens", tuple(GRID[route] for route in module.routes), _of_grid(module)))
        elif isinstance(module, PathMixer) and module.n_paths > 1:
            found.append(Site(name, module, "tokens", LINE[: module.n_paths], _of_paths(module)))
        elif isinstance(module, (Bidirectional, SelectiveChannel)):
            kind, routes = ("tokens", LINE[:2]) if isinstance(module, Bidirectional) else ("channels", CHANNELS)
            found.append(Site(name, module, kind, routes, _of_two(module)))
    return found


def _of_grid(mixer: CrossPaths) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    first = mixer.dt_rank + mixer.d_state

    @contextlib.contextmanager
    def without(route: int) -> Iterator[None]:
        # A scan whose C and D are zero gives zero.
        parts = (mixer.x_proj.detach()[route, first:], mixer.D.detach()[route])
        kept = [part.clone() for part in parts]
        try:
            for part in parts:
                part.zero_()
            yield
        finally:
            for part, value in zip(parts, kept, strict=True):
                part.copy_(value)

    return without


def _of_two(mixer: Any) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def without(route: int) -> Iterator[None]:
        path = (mixer.ahead, mixer.back)[route]
        path.mix_whole = lambda u, *_, **__: torch.zeros_like(u)
        try:
            yield
        finally:
            del path.mix_whole

    return without


def _of_paths(mixer: PathMixer) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def without(route: int) -> Iterator[None]:
        mamba, whole, calls = mixer.mamba, mixer.mamba.mix_whole, 0

        def counted(u: Tensor, *args: Any, **options: Any) -> Tensor:
            nonlocal calls
            calls += 1
            # The mixer asks for its paths in their order.
            missing = (calls - 1) % mixer.n_paths == route
            return torch.zeros_like(u) if missing else whole(u, *args, **options)

        mamba.mix_whole = counted  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            del mamba.mix_whole

    return without


def without_everywhere(found: list[Site], route: str) -> contextlib.ExitStack:
    """A direction left out of all mixers that have it, until the stack is closed."""
    stack = contextlib.ExitStack()
    for site in found:
        if route in site.routes:
            stack.enter_context(site.without(site.routes.index(route)))
    return stack
