"""The short causal convolution with SiLU that stands before every selective scan."""

from functools import partial

from torch import Tensor

from selectra.ops.causal_conv1d import cpu, cuda, portable, reference, registration
from selectra.ops.causal_conv1d.call import CausalConv1d, prepare
from selectra.ops.dispatch import Backend

causal_conv1d = CausalConv1d(
    "causal_conv1d",
    prepare,
    [
        Backend("cuda", cuda.refuse, partial(registration.run, backend="cuda")),
        Backend("cpu", cpu.refuse, partial(registration.run, backend="cpu")),
        Backend("portable", portable.refuse, partial(registration.run, backend="portable")),
        Backend("reference", reference.refuse, reference.run, only_when_asked=True),
    ],
    returns=Tensor | tuple[Tensor, Tensor],
)

__all__ = ["causal_conv1d"]
