"""Batch norms over the whole batch, also where several processes share it: their statistics are those of one process.

Ioffe and Szegedy 2015, arXiv:1502.03167, Alg. 1. PyTorch's SyncBatchNorm does the same for its own layers on GPUs; this
acts on the operator, so that layers derived from it and CPUs are covered, and leaves modules as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from selectra.errors import ConfigError
from selectra.layers.norm import SharedBatch
from selectra.train.parallel import World


class Together(TorchFunctionMode):
    """Inside the block, forward and backward, batch norms that train take the mean and variance over all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = True
        """Whether this process's batch is its own: what it was handed to take part counts for nothing."""

    def __enter__(self) -> Self:
        SharedBatch.now = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        SharedBatch.now = False
        super().__exit__(*error)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._normed(*args, **kwargs)
        return func(*args, **kwargs)

    def _normed(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        # Loading it takes a while, and few need it.
        from torch.distributed.nn.functional import all_reduce  # noqa: PLC0415

        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        share = float(self.counts)
        own = wide.new_tensor([x.numel() / x.shape[1] * share])
        *sums, count = all_reduce(torch.cat([wide.sum(dims) * share, own])).split([x.shape[1], 1])
        mean = sums[0] / count
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims) * share) / count
        y = centred * (variance + eps).rsqrt().view(shape)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                unbiased = variance * (count / (count - 1).clamp(min=1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        y = y if weight is None else y * weight.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(x.dtype)


class Apart(contextlib.nullcontext[None]):
    """Nothing to see together."""

    counts = True


def has_batch_norms(model: nn.Module) -> bool:
    """Whether a model's output for one example depends, in training, on the others of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def together(model: nn.Module, world: World, compiled: bool) -> Together | Apart:
    """What the steps of a training run in, so that batch norms see all of a batch.

    Raises:
        ConfigError: The model is compiled, and what it makes of batch norms cannot be reached.
    """
    if world.size == 1 or not has_batch_norms(model):
        return Apart()
    if compiled:
        raise ConfigError(
            f"{type(model).__name__} has batch norms, which several processes share; leave train.compile off with them."
        )
    return Together()
