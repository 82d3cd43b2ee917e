"""Where numbers went wrong: the first layer and tensor that is not finite, found by doing a step once more."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Draws:
    """The generators' states before a step, so that doing it again drops the same paths."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Draw the same numbers again."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of floating point in a value that a layer takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def finite(value: Any) -> bool:
    """Whether every number in it is."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(value))


def first_broken(model: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any], Tensor], draws: Draws) -> str:
    """A sentence that names the first layer and tensor that is not finite, in the order of the computation.

    Args:
        model: The model, with the weights that the step began with.
        batches: What the step saw.
        loss_of: The loss of a batch by this model; its gradient is taken.
        draws: The generators' states at the step's beginning.
    """
    for name, tensor in model.named_parameters():
        if not finite(tensor):
            return f"Before this step '{name}' is not finite already."
    draws.restore()
    for number, batch in enumerate(batches):
        wrong = [name for name, value in vars(batch).items() if not finite(value)]
        if wrong:
            return f"Of the step's batch {number}, '{wrong[0]}' is not finite."
        found = _watched(model, lambda batch=batch: loss_of(batch))
        if found:
            return found
    return "Done once more, everything of that step was finite."


def _watched(model: nn.Module, loss_of: Callable[[], Tensor]) -> str:
    forward: list[str] = []
    backward: list[str] = []
    model.zero_grad()
    with _hooked(model, forward, backward):
        loss = loss_of()
        if forward or not finite(loss):
            return forward[0] if forward else "All layers' outputs are finite, and the loss of them is not."
        loss.backward()
    if backward:
        return backward[0]
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not finite(p.grad)]
    return f"All layers' outputs are finite; the first gradient that is not is that of '{broken[0]}'." if broken else ""


@contextmanager
def _hooked(model: nn.Module, forward: list[str], backward: list[str]) -> Iterator[None]:
    """Inside the block every layer's output and its gradient are looked at, in the order in which they are computed."""
    handles = []

    def look(name: str, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not forward and not finite(output):
                inputs = "finite" if finite(args) else "not finite"
                forward.append(
                    f"The first that is not finite is the output of '{name}' ({kind}); its inputs are {inputs}."
                )
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note(name, kind, gradient))

        return hook

    def note(name: str, kind: str, gradient: Tensor) -> None:
        if not backward and not finite(gradient):
            backward.append(f"The first that is not finite is the gradient of the output of '{name}' ({kind}).")

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(look(name or "the model", type(module).__name__)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
