"""Energy from the hardware's own counters: NVIDIA's by NVML, Intel's and AMD's processors' by RAPL.

Counters move in steps, some milliseconds to a tenth of a second apart. So the power under a steady load is taken
between two steps that were seen, and the energy of a call is that power times the call's time.
"""

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
# Seconds between two looks at a counter.
LOOK_EVERY = 2e-3
EXTRA = "pip install 'selectra[compare]'"


@dataclass(frozen=True)
class Counter:
    """A counter of joules.

    Args:
        source: What counts, for the record.
        read: Joules since some moment; None where nothing counts, and then `source` is the reason.
    """

    source: str
    read: Callable[[], float] | None

    @property
    def there(self) -> bool:
        """Whether anything counts."""
        return self.read is not None


def counter_of(device: torch.device) -> Counter:
    """The energy counter of a device, or why it has none."""
    return _nvml(device) if device.type == "cuda" else rapl() if device.type == "cpu" else Counter(
        f"no counter of energy is known for {device.type}", None)  # fmt: skip


def _nvml(device: torch.device) -> Counter:
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return Counter(f"energy is left out: NVIDIA's counter is read by nvidia-ml-py, {EXTRA}", None)
    try:
        nvml.nvmlInit()
        # NVML numbers all GPUs, PyTorch those that it may see: the identity tells which is which.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return Counter(f"energy is left out: NVML does not give it: {error}", None)
    return Counter(
        "nvmlDeviceGetTotalEnergyConsumption, the whole board",
        lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
    )


def rapl(folder: Path = POWERCAP) -> Counter:
    """The counters of all processor packages and their memory, where this user may read them."""
    zones = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        name = zone / "name"
        if name.is_file() and name.read_text().strip().startswith(("package", "dram")):
            zones.append(_Zone(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()), name.read_text()))
    if not zones:
        return Counter(f"energy is left out: no RAPL counters in {folder}", None)
    try:
        for zone in zones:
            zone.joules()
    except PermissionError:
        return Counter(f"energy is left out: {zones[0].path} is readable by the administrator alone", None)
    names = ", ".join(zone.name.strip() for zone in zones)
    return Counter(f"RAPL: {names}, the whole machine", lambda: sum(zone.joules() for zone in zones))


@dataclass
class _Zone:
    """One RAPL counter, which begins anew at its range."""

    path: Path
    range_uj: int
    name: str
    last: int | None = None
    turns: int = 0

    def joules(self) -> float:
        now = int(self.path.read_text())
        self.turns += self.last is not None and now < self.last
        self.last = now
        return (now + self.turns * self.range_uj) / 1e6


class Power:
    """Watches a counter while something runs, and says the mean power between the first and the last step seen.

    A thread of its own looks every few milliseconds: whoever runs the work may wait for the device for longer, and
    would date a step too late.

    Args:
        counter: What is watched; with one that is not there nothing happens.
        every: Seconds between two looks.
    """

    def __init__(self, counter: Counter, every: float = LOOK_EVERY) -> None:
        self.counter, self.every = counter, every
        self.steps: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Power":
        if self.counter.there:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.counter.there:
            # A driver that does not answer must not hold up what was measured.
            self._thread.join(10.0)

    def _watch(self) -> None:
        assert self.counter.read is not None
        last = self.counter.read()
        while not self._over.wait(self.every):
            now, joules = time.perf_counter(), self.counter.read()
            # When the first value was reached is not known; later ones are seen to come.
            if joules != last:
                self.steps.append((now, joules))
            last = joules

    @property
    def watts(self) -> float | None:
        """None where the counter did not move twice."""
        if len(self.steps) < 2:
            return None
        (t0, e0), (t1, e1) = self.steps[0], self.steps[-1]
        return (e1 - e0) / (t1 - t0)

    @property
    def covered(self) -> float:
        """Seconds between the first and the last step."""
        return self.steps[-1][0] - self.steps[0][0] if self.steps else 0.0
