"""Skip, gate and norm behind the scan of Mamba-2, at once."""

from torch import Tensor

from selectra.ops.dispatch import Backend, Op
from selectra.ops.gated_norm import cuda, portable
from selectra.ops.gated_norm.call import prepare

gated_norm = Op(
    "gated_norm",
    prepare,
    [
        Backend("cuda", cuda.refuse, cuda.run),
        Backend("portable", portable.refuse, portable.run),
    ],
    returns=Tensor,
)

__all__ = ["gated_norm"]
