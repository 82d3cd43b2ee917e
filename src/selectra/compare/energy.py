"""Energy from the hardware's own counters: NVIDIA's by NVML, Intel's and AMD's processors' by RAPL.

Counters move in steps, some milliseconds to a tenth of a second apart. So the power under a steady load is taken
between two steps that were seen, and the energy of a call is that power times the call's time.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass
class Power:
    """Looks at a counter while something runs, and says the mean power between the first and the last step seen.

    Args:
        counter: What is looked at.
        clock: Seconds.
    """

    counter: Counter
    clock: Callable[[], float] = time.perf_counter
    steps: list[tuple[float, float]] = field(default_factory=list)
    _looked: float = -1.0
    _last: float | None = None

    def look(self) -> None:
        """Note the counter if it has moved; costs nothing if the last look was just now."""
        now = self.clock()
        if self.counter.read is None or now - self._looked < LOOK_EVERY:
            return
        self._looked, joules = now, self.counter.read()
        # When the first value was reached is not known; later ones are seen to come.
        if self._last is not None and joules != self._last:
            self.steps.append((now, joules))
        self._last = joules

    @property
    def watts(self) -> float | None:
        """None where the counter did not move twice."""
        if len(self.steps) < 2:
            return None
        (t0, e0), (t1, e1) = self.steps[0], self.steps[-1]
        return (e1 - e0) / (t1 - t0)
