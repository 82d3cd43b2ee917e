"""The processes that torchrun started, as workers on one study."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selectra.train.parallel import pick_device

# Seconds that a process is given to end.
FAREWELL = 10.0


def dismiss(helpers: Sequence[Any]) -> None:
    """End processes; one that does not end when asked to is killed."""
    for helper in helpers:
        helper.terminate()
    for helper in helpers:
        helper.join(FAREWELL)
        if helper.is_alive():
            helper.kill()
            helper.join(FAREWELL)


@dataclass(frozen=True)
class Crew:
    """The processes that torchrun started, on this machine and on others; each is a worker on the same file.

    Args:
        rank: This one's number; the first one prepares the study and writes its page.
        size: How many there are.
        local: This one's number on its machine, which is also that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def found(cls) -> "Crew":
        """As torchrun says; one process without it."""
        return cls(*(int(os.environ.get(name, usual)) for name, usual in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))  # fmt: skip

    def device(self, name: str) -> torch.device:
        """This process's own."""
        device = pick_device(name, self.local)
        alone = device.type != "cuda" or device.index is not None
        return device if alone or self.size == 1 else torch.device("cuda", self.local)
