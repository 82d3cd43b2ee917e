"""The optimizer, the learning rate over time, and what happens to gradients between backward and step."""

from math import isfinite

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from selectra.spec import Optim
from selectra.train.stop import DivergedError


def decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: on matrices, unless they ask to be left out.

    Norms and biases have one dimension. `A_log` and `D` of a scan carry `_no_weight_decay`, as in mamba_ssm.
    """
    asks_not_to = getattr(parameter, "_no_weight_decay", False)
    return parameter.ndim > 1 and not asks_not_to and not name.endswith("bias")


def make_optimizer(model: nn.Module, optim: Optim) -> AdamW:
    """AdamW in two groups, with and without weight decay."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if decayed(name, p)], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in trained if not decayed(name, p)], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas)


def make_schedule(optimizer: AdamW, optim: Optim, steps: int) -> LRScheduler:
    """Linear warm-up, then a cosine down to zero at the last step, or a constant."""
    warmup = min(optim.warmup_steps, steps)
    if optim.schedule == "cosine":
        after: LRScheduler = CosineAnnealingLR(optimizer, T_max=max(steps - warmup, 1))
    else:
        after = ConstantLR(optimizer, factor=1.0)
    if warmup == 0:
        return after
    before = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [before, after], milestones=[warmup])


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply every gradient."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def clip(model: nn.Module, largest: float | None) -> float:
    """Shrink gradients to the norm `largest` where they exceed it; returns the norm before."""
    with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(with_gradient, largest, norm)
    return float(norm)


def require_finite(loss: float, norm: float, model: nn.Module, step: int) -> None:
    """Stop before the optimizer turns weights into NaN.

    Raises:
        DivergedError: The loss or a gradient is not finite; the message names the first such parameter.
    """
    if isfinite(loss) and isfinite(norm):
        return
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    where = f"the gradient of '{broken[0]}' ({len(broken)} in all) is not finite" if broken else "gradients are finite"
    raise DivergedError(
        f"step {step}: the loss is {loss} and {where}. Weights are as before this step. "
        "Look at the data of that step, lower optim.lr, or set optim.clip."
    )
