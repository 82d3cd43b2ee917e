"""The selective scan, the recurrence of Mamba (arXiv:2312.00752): one operator, several backends."""

from functools import partial

from torch import Tensor

from selectra.ops.dispatch import Backend
from selectra.ops.selective_scan import cpu, cuda, portable, reference, registration
from selectra.ops.selective_scan.call import SelectiveScan, prepare

selective_scan = SelectiveScan(
    "selective_scan",
    prepare,
    [
        Backend("cuda", cuda.refuse, partial(registration.run, backend="cuda")),
        Backend("cpu", cpu.refuse, partial(registration.run, backend="cpu")),
        Backend("portable", portable.refuse, partial(registration.run, backend="portable")),
        Backend("reference", reference.refuse, reference.run, only_when_asked=True),
    ],
    returns=Tensor | tuple[Tensor, Tensor],
)

__all__ = ["selective_scan"]
