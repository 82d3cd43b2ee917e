"""The running mean of a model's weights, which often does better than the last ones (Polyak and Juditsky 1992)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from selectra.train.sharding import local


def toward(decay: float) -> Callable[[Any, Any, Any], None]:
    """What moves means towards new values: by 1 - decay, and by more in the first steps, as (1 + n) / (10 + n) says.

    Statistics of batch norms are averaged likewise; what counts is taken as it is.
    """

    @torch.no_grad()
    def move(means: list[Tensor], news: list[Tensor], n_averaged: Tensor | int) -> None:
        # Of weights that are spread over processes, the parts that are here.
        means, news = [local(each) for each in means], [local(each) for each in news]
        if not means[0].is_floating_point():
            torch._foreach_copy_(means, news)  # pyright: ignore[reportPrivateImportUsage]
            return
        n = int(n_averaged)
        torch._foreach_lerp_(means, news, 1 - min(decay, (1 + n) / (10 + n)))  # pyright: ignore[reportPrivateImportUsage]

    return move


class RunningMean:
    """A copy of a model that follows it.

    Args:
        model: The model that trains.
        decay: What the mean keeps of itself in a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.averaged = AveragedModel(model, multi_avg_fn=toward(decay), use_buffers=True)
        self.averaged.eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The copy."""
        return self.averaged.module

    def follow(self, model: nn.Module) -> None:
        """Take one step's weights in; the first are taken as they are."""
        self.averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.averaged.load_state_dict(state)
