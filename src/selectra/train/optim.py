"""The optimizer, the learning rate over time, and what happens to gradients between backward and step."""

from collections.abc import Callable, Collection
from math import isfinite
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from selectra.spec import Optim
from selectra.train.depth import depths
from selectra.train.sharding import local, whole
from selectra.train.stop import DivergedError

_scale_all: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]


def without_decay(model: nn.Module) -> set[int]:
    """Identities of the parameters that a module leaves out of weight decay.

    A module says so by `no_decay`, the names of parameters of its own: that outlives copies, `to_empty` and wrappers,
    which marks on the tensors do not.
    """
    return {id(module.get_parameter(name)) for module in model.modules() for name in getattr(module, "no_decay", ())}


def decayed(name: str, parameter: nn.Parameter, left_out: Collection[int] = ()) -> bool:
    """Whether weight decay acts on a parameter: on matrices, unless they are left out.

    Norms and biases have one dimension. Modules from elsewhere mark tensors by `_no_weight_decay`, as mamba_ssm does.

    Args:
        left_out: Identities of parameters that are.
    """
    asks_not_to = id(parameter) in left_out or getattr(parameter, "_no_weight_decay", False)
    return parameter.ndim > 1 and not asks_not_to and not name.endswith("bias")


def make_optimizer(model: nn.Module, optim: Optim, fused: bool = False) -> AdamW:
    """AdamW in two groups, with and without weight decay; with `layer_decay` two for every depth.

    Args:
        fused: Whether one kernel does all of it, on CUDA devices: without temporary copies of what it updates.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    without = without_decay(model)
    depth_of, n_units = depths(model) if optim.layer_decay < 1 else ({}, 0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    # The head's groups come first: theirs is the learning rate that is shown.
    for depth in range(n_units + 1, -1, -1) if depth_of else [n_units + 1]:
        for acts in (True, False):
            rate = optim.lr * optim.layer_decay ** (n_units + 1 - depth)
            groups[depth, acts] = {"params": [], "weight_decay": optim.weight_decay if acts else 0.0, "lr": rate}
    for name, parameter in trained:
        groups[depth_of.get(name, n_units + 1), decayed(name, parameter, without)]["params"].append(parameter)
    return AdamW(
        [group for group in groups.values() if group["params"]], lr=optim.lr, betas=optim.betas, fused=fused or None
    )


def make_schedule(optimizer: AdamW, optim: Optim, steps: int) -> LRScheduler:
    """Linear warm-up, then a cosine down to zero at the last step, or a constant."""
    warmup = min(optim.warmup_steps, steps) if optim.warmup_share is None else round(optim.warmup_share * steps)
    if optim.schedule == "cosine":
        after: LRScheduler = CosineAnnealingLR(optimizer, T_max=max(steps - warmup, 1))
    else:
        after = ConstantLR(optimizer, factor=1.0)
    if warmup == 0:
        return after
    before = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [before, after], milestones=[warmup])


def all_warmup(optim: Optim, steps: int) -> str | None:
    """In words, that every step is warm-up, after which none is left; None where that is not so.

    A recipe's steps are often cut for a first try, and its warm-up is forgotten.
    """
    if optim.warmup_share is not None or optim.warmup_steps < max(steps, 2):
        return None
    return (
        f"All {steps} steps are warm-up (optim.warmup_steps={optim.warmup_steps}): the learning rate only rises. Set "
        f"optim.warmup_steps={steps // 10}, say, or more train.steps."
    )


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply every gradient, all in one call: a launch for each takes the host of a GPU milliseconds."""
    grads = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    if grads:
        _scale_all(grads, factor)


def clip(model: nn.Module, largest: float | None) -> float:
    """Shrink gradients to the norm `largest` where they exceed it; returns the norm before."""
    with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None]))
    if largest is not None:
        nn.utils.clip_grads_with_norm_(with_gradient, largest, norm)
    return float(norm)


def require_finite(loss: float, norm: float, model: nn.Module, step: int, find: Callable[[], str] = lambda: "") -> None:
    """Stop before the optimizer turns weights into NaN.

    Args:
        find: Finds the first layer and tensor that is not finite, and says so in a sentence.

    Raises:
        DivergedError: The loss or a gradient is not finite; the message names the first such parameter.
    """
    if isfinite(loss) and isfinite(norm):
        return
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all()
    ]
    where = f"the gradient of '{broken[0]}' ({len(broken)} in all) is not finite" if broken else "gradients are finite"
    found = find()
    found = f"{found} " if found else ""
    raise DivergedError(
        f"step {step}: the loss is {loss} and {where}. {found}Weights are as before this step. "
        "Look at the data of that step, lower optim.lr, or set optim.clip."
    )
