"""The processes among which a sequence is split, and what they tell each other, each time within a limit."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from selectra.errors import ConfigError, RankError

# Exchanges of GPUs that may be under way before the host waits for the oldest.
MOST_UNDER_WAY = 16
# Gradients go together in pieces of as many bytes.
BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class Link:
    """One process's place among those that share a sequence; process r holds the r-th part."""

    group: Any
    rank: int
    size: int
    timeout: float
    """Seconds after which an exchange is given up."""
    under_way: deque[tuple[Any, str]] = field(default_factory=deque, repr=False, compare=False)
    """Exchanges that a GPU's stream waits for and the host does not."""

    def chunk(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of a whole sequence, a view; parts differ by one position at most.

        Parts may be cut in any other way, too, as long as they follow each other in order of rank.
        """
        return x.tensor_split(self.size, dim)[self.rank]

    def sum_(self, tensor: Tensor, what: str = "sum") -> Tensor:
        """The sum over all processes, written into `tensor`, without gradient.

        Raises:
            RankError: A process ended or did not answer in time.
        """
        self._finish(what, tensor, lambda: distributed.all_reduce(tensor, group=self.group, async_op=True))
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up over all processes the gradients of parameters, of which each process has a share after backward.

        A parameter that got a gradient in some process alone counts as zero in the others.

        Raises:
            RankError: A process ended or did not answer in time.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            return
        # Here the host waits anyway: within the limit, not in the copies.
        self.settle()
        found = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        self.sum_(found, "sum_gradients")
        self.settle()
        grads: list[Tensor] = []
        for parameter, n_found in zip(trained, found.tolist(), strict=True):
            if n_found:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        for together in _pieces(grads):
            flat = self.sum_(torch.cat([grad.reshape(-1) for grad in together]), "sum_gradients")
            for grad, total in zip(together, flat.split([grad.numel() for grad in together]), strict=True):
                grad.copy_(total.view(grad.shape))

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        """Every process's tensor, of one shape, one behind the other along a new first dimension."""
        found = tensor.new_empty(self.size, *tensor.shape)
        tensor = tensor.contiguous()
        into = list(found.unbind(0))
        self._finish(what, tensor, lambda: distributed.all_gather(into, tensor, group=self.group, async_op=True))
        return found

    def settle(self) -> None:
        """Wait until every exchange has come to its end.

        Raises:
            RankError: A process ended or did not answer in time.
        """
        while self.under_way:
            self._wait_for(*self.under_way.popleft())

    def _finish(self, what: str, tensor: Tensor, start: Any) -> None:
        """Start an exchange; what comes next sees its results.

        On a GPU its stream waits and the host goes on: with a limit PyTorch lets the host sleep, a millisecond at a
        time, and the GPU is idle when it wakes up. The limit is held to later, when enough others are under way.
        """
        with self._named(what):
            work = start()
        if not tensor.is_cuda:
            self._wait_for(work, what)
            return
        with self._named(what):
            work.wait()
        self.under_way.append((work, what))
        if len(self.under_way) > MOST_UNDER_WAY:
            self._wait_for(*self.under_way.popleft())

    def _wait_for(self, work: Any, what: str) -> None:
        with self._named(what):
            work.wait(timedelta(seconds=self.timeout))

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"{what}: process {self.rank} of {self.size} that share a sequence waited for the others, and one "
                f"ended, failed or did not answer within {self.timeout:g} s ({error}). Look for the first error among "
                "their outputs; every process must make the same calls in the same order, backward too, with the same "
                "batch and widths. If one is only slow, raise length_parallel(timeout=...) and the group's own timeout."
            ) from error


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, together of `BYTES_AT_ONCE` or a single one."""
    piece: list[Tensor] = []
    size = 0
    for tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        alike = not piece or (tensor.dtype, tensor.device) == (piece[0].dtype, piece[0].device)
        if piece and not (alike and size + n_bytes <= BYTES_AT_ONCE):
            yield piece
            piece, size = [], 0
        piece.append(tensor)
        size += n_bytes
    if piece:
        yield piece


def join(group: Any, timeout: float) -> Link:
    """This process's place in `group`.

    Raises:
        ConfigError: There is no group, this process is not in it, or the limit is no time.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout={timeout}: needs seconds above 0")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ConfigError(
            "length_parallel needs a process group, and there is none; start the program with torchrun and call "
            "torch.distributed.init_process_group first."
        )
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ConfigError("this process is not in the group that length_parallel was given.")
    return Link(group, rank, distributed.get_world_size(group), timeout)
