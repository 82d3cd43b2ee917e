"""What a model does with missing values that it cannot handle itself."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]


def is_complete(observed: Bool[Tensor, "b l *s"] | None) -> bool:
    """Whether nothing is missing, as far as that can be known without waiting for a device or breaking a trace."""
    if observed is None:
        return True
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    plain = observed.device.type == "cpu" and type(observed) is Tensor and not traced
    return plain and _functorch.maybe_current_level() is None and bool(observed.all())


def carry_forward(
    x: Float[Tensor, "b l *s"], observed: Bool[Tensor, "b l *s"] | None, axis: int = 1
) -> Float[Tensor, "b l *s"]:
    """Replace what is not observed by the last observed value before it along `axis`.

    Where nothing was observed before, the first observed value stands; a series without any gets 0, the mean of
    standardised data. What lies beneath the mask has no influence, NaN included.
    """
    if observed is None or is_complete(observed):
        return x
    length = x.shape[axis]
    shape = [1] * x.ndim
    shape[axis] = length
    position = torch.arange(length, device=x.device).view(shape)
    last = torch.where(observed, position, -1).cummax(axis).values
    first = torch.where(observed, position, length).amin(axis, keepdim=True)
    source = torch.where(last < 0, first, last).clamp(max=length - 1)
    return x.masked_fill(~observed, 0.0).gather(axis, source.expand_as(x))
