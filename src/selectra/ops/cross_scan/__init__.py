"""The selective scan along several routes through a grid, each with its own parameters: one operator."""

from functools import partial

from selectra.ops.cross_scan import composite, cpu, cuda, registration
from selectra.ops.cross_scan.call import CrossScan, prepare
from selectra.ops.dispatch import Backend

cross_scan = CrossScan(
    "cross_scan",
    prepare,
    [
        Backend("cuda", cuda.refuse, partial(registration.run, backend="cuda")),
        Backend("cpu", cpu.refuse, partial(registration.run, backend="cpu")),
        Backend("portable", composite.refuse, partial(composite.run, backend="portable")),
        Backend("reference", composite.refuse, partial(composite.run, backend="reference"), only_when_asked=True),
    ],
)

__all__ = ["cross_scan"]
