"""Time and memory of dense models against image size at batch 1, forward and training step, as one JSON record.

    python results/dense_sizes.py --out results/dense_sizes.json --seconds 125

Models of equal parameters below the same UPerNet: xT with Mamba over regions of 256 pixels, VMamba, and ViT. The device
is held to 80 GB. The training step (cross-entropy of every pixel, backward, AdamW) has its batch norms frozen, as one
image has no statistics, and bfloat16 in autocast. What does not fit is noted. After the given sizes, the largest side
that fits is looked for: estimated from the measured memory and run, then smaller or larger by 6 %. Called again with
the same record it goes on with what is missing; what ended the process is noted and not tried again. A rehearsal that
runs on any machine: `--sizes 64,96 --no-largest`.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Tensors of every size in turn leave holes that blocks of fixed size cannot use.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from selectra import models as _models  # noqa: F401
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.checkpoint import replacing
from selectra.train.precision import autocast
from selectra.train.record import environment

CARD, N_CLASSES, BATCH_SECONDS, FROM = 80e9, 11, 0.4, 2048
ENCODER = {"dims": (64, 128, 256, 512), "depths": (2, 2, 9, 2)}
XT = Spec("xt_base", backbone=Spec("vmamba_tiny_s1l8", **ENCODER), region=256, at_once=16, d_model=768, context="mamba")
BACKBONES = {
    "xt_mamba": XT,
    "vmamba": Spec("vmamba_tiny_s1l8"),
    "vit": Spec("vit_small", depth=15, img_size=512),
}
STEP = 1.06


def network(name: str) -> nn.Module:
    """A backbone below the same UPerNet."""
    spec = Spec("upernet_base", backbone=BACKBONES[name], d_decoder=128, d_aux=0)
    return models.build(spec, {"n_classes": N_CLASSES, "in_channels": 3}).eval()


class Bench:
    """One model on one device.

    Args:
        name: Of `BACKBONES`.
        device: Where.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.model = device, network(name).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def call(self, mode: str, side: int) -> Callable[[], None]:
        """A forward pass, or a step, over one image of this side."""
        x = torch.randn(1, 3, side, side, device=self.device)
        y = torch.randint(0, N_CLASSES, (1, side, side), device=self.device)

        def forward() -> None:
            with torch.no_grad(), autocast(self.device, "bfloat16"):
                self.model(x)

        def step() -> None:
            with autocast(self.device, "bfloat16"):
                loss = F.cross_entropy(self.model(x).float(), y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return forward if mode == "forward" else step

    def measure(self, mode: str, side: int) -> dict[str, Any]:
        """Seconds and peak memory; the first call compiles kernels and is never a time."""
        call = self.call(mode, side)
        self._clear()
        first = self._seconds(call)
        peak, reserved = self._peaks()
        again = self._seconds(call)
        rounds = min(5, int(BATCH_SECONDS / again))
        each = [again, *(self._seconds(call) for _ in range(rounds - 1))]
        middle = float(np.median(each))
        return {"seconds": middle, "calls": len(each), "first": first, "peak": peak, "reserved": reserved}

    def _seconds(self, call: Callable[[], None]) -> float:
        self._wait()
        began = time.monotonic()
        call()
        self._wait()
        return time.monotonic() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peaks(self) -> tuple[int, int]:
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def free(self) -> None:
        """After what did not fit."""
        self.optimizer.zero_grad()
        self._clear()


class Sizes:
    """The record, and what is missing in it."""

    def __init__(self, words: argparse.Namespace) -> None:
        self.words, self.began = words, time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.record: dict[str, Any] = {
            "what": "dense_sizes", "card_bytes": CARD, "calls": [], "parameters": {}, "rows": [], "slopes": [],
            "largest": [],
        }  # fmt: skip
        if words.out.is_file():
            self.record = json.loads(words.out.read_text())
            for row in self.record["rows"]:
                if "begun" in row:
                    del row["begun"]
                    row["error"] = "the process ended"
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
        call = {"command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(), **environment()}
        self.record["calls"].append(call)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.words.seconds - (time.monotonic() - self.began)

    def write(self) -> None:
        self.record["calls"][-1]["seconds"] = time.monotonic() - self.began
        self.record["slopes"] = slopes(self.record["rows"])
        self.record["largest"] = largest(self.record["rows"])
        with replacing(self.words.out) as partial:
            partial.write_text(json.dumps(self.record, indent=1) + "\n")

    def rows(self, name: str, mode: str) -> list[dict[str, Any]]:
        """What was tried, by size."""
        own = [row for row in self.record["rows"] if row["model"] == name and row["mode"] == mode]
        return sorted(own, key=lambda row: row["side"])

    def row(self, bench: Bench, name: str, mode: str, side: int) -> dict[str, Any] | None:
        """One measurement, from the record if it is there; None where there is no time for it."""
        found = next((row for row in self.rows(name, mode) if row["side"] == side), None)
        if found is not None:
            return found
        expected = predicted([row for row in self.rows(name, mode) if "seconds" in row], side)
        if expected * 2 > min(self.left, self.words.longest):
            print(f"{name} {mode} {side}: left out, would take about {expected:.0f} s", flush=True)  # noqa: T201
            return None
        row: dict[str, Any] = {"model": name, "mode": mode, "side": side, "begun": True}
        self.record["rows"].append(row)
        self.write()
        try:
            row |= bench.measure(mode, side)
        except RuntimeError as error:
            # torch.OutOfMemoryError is one; others are what a library says of too large a tensor.
            row |= {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        del row["begun"]
        bench.free()
        self.write()
        print(round(time.monotonic() - self.began, 1), json.dumps(row), flush=True)  # noqa: T201
        return row

    def run(self, name: str, modes: tuple[str, ...]) -> None:
        """One model at all sizes, then the largest that fits."""
        bench = Bench(name, self.device)
        self.record["parameters"][name] = bench.parameters
        for mode in modes:
            for side in self.words.sizes:
                row = self.row(bench, name, mode, side)
                if row is None or "error" in row:
                    break
        for mode in modes if self.words.largest else ():
            self.search(bench, name, mode)

    def search(self, bench: Bench, name: str, mode: str) -> None:
        """Sides by steps of 6 % around the estimate, until one fits and the next does not."""
        fits = [row for row in self.rows(name, mode) if row.get("peak")]
        if len(fits) < 2:
            return
        side = rounded(estimated(fits))
        for _ in range(6):
            row = self.row(bench, name, mode, side)
            if row is None:
                return
            beyond = [each["side"] for each in self.rows(name, mode) if "error" in each]
            most = max(each["side"] for each in self.rows(name, mode) if "seconds" in each)
            if beyond and min(beyond) <= max(most + 256, most * STEP**1.5):
                return
            side = min(side - 256, rounded(side / STEP)) if "error" in row else max(side + 256, rounded(side * STEP))


def rounded(side: float) -> int:
    """Whole regions of 256 pixels."""
    return max(256, int(side // 256) * 256)


def estimated(rows: list[dict[str, Any]]) -> float:
    """The side whose peak is the card, by the two largest images that fit."""
    (a, b) = ((row["side"] ** 2, row["peak"]) for row in rows[-2:])
    per_pixel = (b[1] - a[1]) / (b[0] - a[0])
    return float(np.sqrt(max(1.0, b[0] + (0.97 * CARD - b[1]) / max(1e-9, per_pixel))))


def predicted(rows: list[dict[str, Any]], side: int) -> float:
    """Seconds, by the growth between the two largest images so far."""
    if len(rows) < 2:
        return 0.0
    a, b = rows[-2:]
    power = max(2.0, np.log(b["seconds"] / a["seconds"]) / np.log(b["side"] / a["side"]))
    return float(b["seconds"] * (side / b["side"]) ** power)


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the logarithms of time and peak memory over that of pixels, from 2,048 pixels up."""
    found = []
    for name, mode in dict.fromkeys((row["model"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["model"], row["mode"]) == (name, mode)]
        used = sorted((r for r in own if "seconds" in r and r["side"] >= FROM), key=lambda r: r["side"])
        if len(used) > 1:
            pixels = np.log([row["side"] ** 2 for row in used])
            fit = {
                key: float(np.polyfit(pixels, np.log([row[key] for row in used]), 1)[0])
                for key in ("seconds", "peak") if used[0][key]
            }  # fmt: skip
            found.append({"model": name, "mode": mode, "sides": [row["side"] for row in used], **fit})
    return found


def largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest side that ran, and the smallest that did not."""
    found = []
    for name, mode in dict.fromkeys((row["model"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["model"], row["mode"]) == (name, mode)]
        fits, beyond = ([row["side"] for row in own if key in row] for key in ("seconds", "error"))
        found.append(
            {"model": name, "mode": mode, "fits": max(fits, default=None), "does_not": min(beyond, default=None)}
        )
    return found


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--sizes", type=lambda text: [int(each) for each in text.split(",")],
                       default=[512, 1024, 2048, 3072, 4096, 6144, 8192])  # fmt: skip
    words.add_argument("--models", default=",".join(BACKBONES))
    words.add_argument("--modes", default="forward,step")
    words.add_argument("--seconds", type=float, default=125.0, help="nothing is begun that would end after these")
    words.add_argument("--longest", type=float, default=16.0, help="nothing is begun that would take longer")
    words.add_argument("--no-largest", dest="largest", action="store_false")
    sizes = Sizes(words.parse_args())
    for name in sizes.words.models.split(","):
        sizes.run(name, tuple(sizes.words.modes.split(",")))
    sizes.write()
    print(json.dumps({key: sizes.record[key] for key in ("parameters", "slopes", "largest")}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
