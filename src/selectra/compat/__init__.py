"""The field's own repositories on our kernels: their imports, without their CUDA builds.

    import selectra.compat

    selectra.compat.install()
    from mamba_ssm import Mamba  # and causal_conv1d, selective_scan_cuda, ...

or, for a script that stays as it is, `python -m selectra.compat run train.py ARGS...`. A package that works is never
replaced: `mamba_ssm` and `causal_conv1d` are where they are not installed or lack their kernel, and where there is no
GPU, without which they compute nothing. What is covered stands in `selectra.compat.packages`.
"""

import logging

from selectra.compat.stand_in import StandIn, describe, find_missing

__all__ = ["install", "uninstall"]

logger = logging.getLogger("selectra")
_installed: list[tuple[StandIn, dict[str, str]]] = []
_said: set[str] = set()


def install() -> dict[str, str]:
    """Make the missing modules importable in this process, and say once which and by which backend.

    Returns:
        The replaced modules, each with the reason. A second call changes nothing and returns the same.
    """
    if _installed:
        return dict(_installed[0][1])
    missing = find_missing()
    finder = StandIn(missing)
    finder.enter()
    _installed.append((finder, missing))
    text = describe(missing)
    if text not in _said:
        _said.add(text)
        logger.warning("%s", text)
    return dict(missing)


def uninstall() -> None:
    """Undo `install`: the names are free again. Objects that were made meanwhile go on working."""
    while _installed:
        _installed.pop()[0].leave()
