"""Train the image models of the CIFAR-10-JPEG recipes side by side on one GPU, and write one JSON record.

    python results/vision_cifar10.py --out results/vision_cifar10.json --steps 2900 --packed 3 --seconds 300

finds the images through SELECTRA_DATA. `--data shapes --steps 20` is a rehearsal that runs on any machine; with
`--random N` images are noise of the right shape, for measuring speed alone.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selectra.compare.packed_images import Library
from selectra.compare.vision import measure, train
from selectra.data import image_examples, image_files
from selectra.train.record import environment

MODELS = ("vim2", "vmamba", "vim", "simba", "vit", "convnext", "resnet18", "mlp_mixer")
ONCE = ("mlp_mixer_cifar10",)


def noise(count: int) -> image_examples.Example:
    """Images of 32 x 32 pixels with nothing in them."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return pixels, np.arange(count) % 10, tuple(f"class {i}" for i in range(10))


def read_words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--recipes", default=",".join(f"{name}_cifar10" for name in MODELS))
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--first-seed", type=int, default=0, help="go on from this one, below --seeds")
    words.add_argument("--packed", type=int, default=2)
    words.add_argument("--seconds", type=float, default=600.0, help="nothing is begun after these")
    words.add_argument("--steps", type=int, default=None)
    words.add_argument("--data", default=None, help="another set than the recipes'")
    words.add_argument("--random", type=int, default=None, help="so many images of noise instead")
    words.add_argument("--no-measure", action="store_true")
    words.add_argument("--no-train", action="store_true")
    words.add_argument("changes", nargs="*", help="for every run, such as train.batch_size=256")
    return words.parse_args()


def main() -> None:
    words, began = read_words(), time.monotonic()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    changes = list(words.changes) + ([f"train.steps={words.steps}"] if words.steps else [])
    if words.random:
        image_files.EXAMPLES["noise"] = lambda: noise(words.random)
    data = "noise" if words.random else words.data
    changes += [f"data.path={data}"] if data else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = tuple(words.recipes.split(","))
    seeds = tuple(range(words.first_seed, words.seeds))
    library = Library(device)
    record: dict[str, Any] = {
        "what": "vision_cifar10", "command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(),
        **environment(), "changes": changes, "models": [], "trainings": [], "not_begun": [],
    }  # fmt: skip

    def say(row: dict[str, Any]) -> None:
        print(  # noqa: T201
            round(time.monotonic() - began, 1), json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True
        )
        words.out.write_text(json.dumps(record, indent=1) + "\n")

    for name in () if words.no_measure else names:
        record["models"].append(measure(name, changes, library, seeds[0]))
        say(record["models"][-1])
    if not words.no_train:

        def done(row: dict[str, Any]) -> None:
            record["trainings"].append(row)
            say(row)

        # Seed by seed, so that what a limit cuts off is a whole seed of all models.
        wanted = [(name, seed) for seed in seeds for name in names if seed == seeds[0] or name not in ONCE]
        record["not_begun"] = train(wanted, changes, library, words.packed, began + words.seconds, done)
    record["seconds"] = time.monotonic() - began
    words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
