"""What parts of a sequence tell each other in one exchange, and views whose gradients meet in place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selectra.ops.length_parallel.kept import once
from selectra.ops.length_parallel.link import Link

Combine = Callable[[list[tuple[Tensor, ...]], tuple[Tensor, ...]], tuple[Tensor, ...]]
"""From what each process told, in order of rank, and what all of them hold alike, to tensors: plain PyTorch."""


def exchange(
    link: Link, what: str, combine: Combine, told: Sequence[Tensor], shared: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`combine` of what every process tells, of one shape and type in each.

    Gradients are those of the sum of all processes' losses: what is told gets its whole gradient, and what all hold
    alike gets each process's share. Every process takes part in the backward, whatever its own results hang on.
    """
    return _Exchange.apply(link, what, combine, len(told), *told, *shared)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, what: str, combine: Combine, n_told: int, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        told, shared = tensors[:n_told], tensors[n_told:]
        everything = once(lambda: link.gather(packed(told), what))
        ctx.save_for_backward(everything, *shared)
        ctx.link, ctx.what, ctx.combine, ctx.shapes = link, what, combine, [x.shape for x in told]
        return combine(unpacked(everything, ctx.shapes), shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        everything, *shared = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (everything, *shared)]
            found = ctx.combine(unpacked(leaves[0], ctx.shapes), tuple(leaves[1:]))
            pairs = [(x, grad) for x, grad in zip(found, grads, strict=True) if x.requires_grad]
            if pairs:
                results, given = zip(*pairs, strict=True)
                found = torch.autograd.grad(results, leaves, given, allow_unused=True, materialize_grads=True)
            else:
                found = [torch.zeros_like(leaf) for leaf in leaves]
        # What every process needs of what this one told.
        whole = ctx.link.sum_(found[0].contiguous(), f"the backward of {ctx.what}")[ctx.link.rank]
        return (None, None, None, None, *unpacked(whole[None], ctx.shapes)[0], *found[1:])


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of tensors of one type, in a row."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unpacked(rows: Tensor, shapes: Sequence[torch.Size]) -> list[tuple[Tensor, ...]]:
    """The tensors of these shapes in every row."""
    sizes = [shape.numel() for shape in shapes]
    return [
        tuple(part.view(shape) for part, shape in zip(row.split(sizes), shapes, strict=True)) for row in rows.unbind(0)
    ]


def with_end(x: Tensor, length: int, reverse: bool, fresh: bool) -> tuple[Tensor, Tensor]:
    """x, and its last `length` positions in scan order, as views.

    Autograd's own slices make a gradient as long as x for each; here the end's is added where x's is.

    Args:
        x: (b, l, ...).
        length: Positions.
        reverse: Whether the scan runs from the last position to the first.
        fresh: Whether nobody else sees the gradient of the first view, so that it may be written.
    """
    start = 0 if reverse else x.shape[1] - length
    return _WithEnd.apply(x, start, length, fresh)  # pyright: ignore[reportReturnType]


class _WithEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, length: int, fresh: bool) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.place, ctx.shape, ctx.fresh = (start, length), x.shape, fresh
        return x.view_as(x), x.narrow(1, start, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dend: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if dend is not None:
            if dx is None:
                dx = dend.new_zeros(ctx.shape)
            elif not ctx.fresh:
                dx = dx.clone(memory_format=torch.contiguous_format)
            dx.narrow(1, *ctx.place).add_(dend)
        return dx, None, None, None
