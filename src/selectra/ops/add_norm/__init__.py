"""The residual stream's step before every mixer: add the last mixer's output, and normalise the sum."""

from torch import Tensor

from selectra.ops.add_norm import cuda, portable, reference, registration
from selectra.ops.add_norm.call import prepare
from selectra.ops.dispatch import Backend, Op

add_norm = Op(
    "add_norm",
    prepare,
    [
        Backend("cuda", cuda.refuse, registration.run),
        Backend("portable", portable.refuse, portable.run),
        Backend("reference", reference.refuse, reference.run, only_when_asked=True),
    ],
    returns=tuple[Tensor, Tensor],
)

__all__ = ["add_norm"]
