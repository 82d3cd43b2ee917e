"""One way to call every contender: forward as in training, and backward alone, below autograd."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from selectra.ops import selective_scan
from selectra.ops.selective_scan.call import ScanCall

Arguments = dict[str, Tensor | None]
# In the order of the operator.
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


class Prepared(Protocol):
    """One contender with the inputs of one case, in the layout that it wants, so that nobody is timed for a copy."""

    def forward(self) -> Any:
        """Run the scan and keep what the backward needs."""
        ...

    def backward(self, outputs: Any, dy: Tensor) -> Any:
        """The gradients of all inputs, from what `forward` gave."""
        ...

    def own(self, dy: Tensor) -> Tensor:
        """A gradient (b, l, d) of y as this contender wants it to lie in memory."""
        ...

    def y(self, outputs: Any) -> Tensor:
        """The gated output as (b, l, d)."""
        ...

    def gradients(self, grads: Any) -> dict[str, Tensor]:
        """By name, in the layout of our operator."""
        ...


class Ours:
    """Our operator at its lowest level, `torch.ops.selectra.selective_scan`.

    Args:
        arguments: As `Case.arguments` gives them.
        backend: Which backend runs.
        save: Whether the forward keeps what the backward needs.
        softplus: Whether the steps go through it.
    """

    def __init__(self, arguments: Arguments, backend: str, save: bool = True, softplus: bool = True) -> None:
        u, A = arguments["u"], arguments["A"]
        assert u is not None
        assert A is not None
        self._names = [name for name in NAMES if arguments[name] is not None]
        tensors = [arguments[name] for name in NAMES]
        call = ScanCall._make((*tensors, None, None, None, softplus, False, u.dtype, True))
        self._words, self._save = (*call[:-1], backend), save
        self._dfinal = A.new_zeros(u.shape[0], *A.shape)

    def forward(self) -> Any:
        """y, the final state and the checkpoints."""
        return torch.ops.selectra.selective_scan(*self._words, self._save)

    def backward(self, outputs: Any, dy: Tensor) -> Any:
        """Gradients in the operator's order."""
        return torch.ops.selectra.selective_scan_backward(dy, self._dfinal, outputs[2], *self._words)

    def own(self, dy: Tensor) -> Tensor:
        """As it is."""
        return dy

    def y(self, outputs: Any) -> Tensor:
        """As it is."""
        return outputs[0]

    def gradients(self, grads: Any) -> dict[str, Tensor]:
        """Without those of absent inputs."""
        return {name: grad for name, grad in zip(NAMES, grads, strict=False) if name in self._names}


def chosen_backend(arguments: Arguments) -> str:
    """The backend that a call with these arguments gets."""
    return selective_scan.backend_for(**public(arguments))


def public(arguments: Arguments) -> dict[str, Any]:
    """The arguments of a call of the public operator."""
    return {**arguments, "delta_softplus": True}


def results(prepared: Prepared, dy: Tensor) -> dict[str, Tensor]:
    """y and every gradient, named "y", "du", "ddelta", ..."""
    outputs = prepared.forward()
    grads = prepared.gradients(prepared.backward(outputs, prepared.own(dy)))
    return {"y": prepared.y(outputs), **{f"d{name}": grad for name, grad in grads.items()}}


def kept_bytes(prepared: Prepared, arguments: Arguments) -> int:
    """Bytes that a forward leaves for the backward beside the inputs and y.

    Counted in whole storages, so that a view of a larger tensor counts as what it holds alive.
    """
    outputs = prepared.forward()
    y = prepared.y(outputs)
    known = {y.untyped_storage().data_ptr()}
    known |= {x.untyped_storage().data_ptr() for x in arguments.values() if x is not None}
    # Ours returns the final state too, which nobody keeps for the backward.
    kept = outputs[2:] if isinstance(prepared, Ours) else outputs
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_in(kept)}
    return sum(size for pointer, size in found.items() if pointer not in known)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
