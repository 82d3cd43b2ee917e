"""State-space duality, the recurrence of Mamba-2 with one decay a head."""

import functools

from torch import Tensor

from selectra.ops.dispatch import Backend, Op
from selectra.ops.ssd import cuda, portable, reference, registration
from selectra.ops.ssd.call import prepare
from selectra.ops.ssd.portable import CHUNK

ssd = Op(
    "ssd",
    prepare,
    [
        Backend("cuda", cuda.refuse, functools.partial(registration.run, backend="cuda")),
        Backend("portable", portable.refuse, functools.partial(registration.run, backend="portable")),
        Backend("reference", reference.refuse, reference.run, only_when_asked=True),
    ],
    returns=tuple[Tensor, Tensor],
)

__all__ = ["CHUNK", "ssd"]
