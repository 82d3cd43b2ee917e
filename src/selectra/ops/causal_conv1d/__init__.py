"""The short causal convolution with SiLU that stands before every selective scan."""

from functools import partial

from selectra.ops.causal_conv1d import cpu, portable, reference, registration
from selectra.ops.causal_conv1d.call import prepare
from selectra.ops.dispatch import Backend, Op

causal_conv1d = Op(
    "causal_conv1d",
    prepare,
    [
        Backend("cpu", cpu.refuse, partial(registration.run, backend="cpu")),
        Backend("portable", portable.refuse, partial(registration.run, backend="portable")),
        Backend("reference", reference.refuse, reference.run, only_when_asked=True),
    ],
)

__all__ = ["causal_conv1d"]
