"""How fast a training is, and how long it waits for its data."""

import time
from collections.abc import Iterator
from typing import Any

from selectra.train.memory import peak_memory
from selectra.train.parallel import World


class Meter:
    """Counts the samples of a step and the time in which it waited for them.

    Nothing here waits for a device.

    Args:
        batches: Where the training's batches come from.
        world: The processes.
    """

    def __init__(self, batches: Iterator[Any], world: World) -> None:
        self.batches, self.world = batches, world
        self.samples, self.waited = 0, 0.0
        self.rate, self.wait = 0.0, 0.0

    def take(self, counts: bool = True) -> Any:
        """The next batch, on the training's device.

        Args:
            counts: Whether it is this process's own rather than one that it was handed to take part.
        """
        began = time.monotonic()
        batch = next(self.batches)
        self.samples += len(batch) * counts
        if getattr(batch, "reads", False):
            # Only now it is read.
            batch = batch.to(self.world.device)
            self.waited += time.monotonic() - began
            return batch
        # A transfer may stand behind what the device computes, which is no wait for data.
        self.waited += time.monotonic() - began
        return batch.to(self.world.device)

    def step(self, seconds: float, samples: float) -> dict[str, float | None]:
        """What the record says of a step that took so many seconds, data included; the next one is counted anew.

        Args:
            samples: Of all processes.

        `rate` is samples a second over all processes, `wait` the share of the time in which this one waited for data,
        `memory` the most GiB that were taken at once so far.
        """
        self.rate = samples / max(seconds, 1e-9)
        self.wait = self.waited / max(seconds, 1e-9)
        self.samples, self.waited = 0, 0.0
        return {"rate": self.rate, "wait": self.wait, "memory": peak_memory(self.world.device)}
