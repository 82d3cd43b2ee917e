"""Train VideoMamba-Ti on moving shapes, and beside it the control that sees one frame, and write one JSON record.

    python results/dense_video.py --out results/dense_video.json --steps 1500 --seconds 40

needs no file. Called again with the same record it goes on with what is missing. A rehearsal that runs on any machine:
`--steps 3 model=videomamba_clip_smoke train.batch_size=4 train.precision=float32 data.test=12`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from dense_camvid import begin, measure, missing, write

from selectra.compare.packed_images import Library
from selectra.compare.vision import train
from selectra.data.moving_shapes import CLASSES

RECIPES = ("videomamba_shapes", "videomamba_shapes_still")


def read_words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--packed", type=int, default=2, help="trainings side by side")
    words.add_argument("--seconds", type=float, default=60.0, help="nothing is begun after these")
    words.add_argument("--steps", type=int, default=None)
    words.add_argument("--note", default="", help="what the record says beside its figures")
    words.add_argument("changes", nargs="*", help="for every run, such as train.batch_size=8")
    return words.parse_intermixed_args()


def main() -> None:
    words, began = read_words(), time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = True
    # Weights are the running mean of the last ones: nothing is chosen on validation clips.
    changes = ["train.eval_every=1000000", *words.changes] + ([f"train.steps={words.steps}"] if words.steps else [])
    record = begin(words, changes) | {"what": "dense_video", "chance": 1 / len(CLASSES)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    library = Library(device)

    def say(row: dict[str, Any]) -> None:
        shown = {key: value for key, value in row.items() if key not in ("losses", "model")}
        print(round(time.monotonic() - began, 1), json.dumps(shown), flush=True)  # noqa: T201
        write(words.out, record)

    def finished(row: dict[str, Any]) -> None:
        record["trainings"].append(row)
        say(row)

    measure(RECIPES[:1], changes, library, record, say)
    wanted = missing(RECIPES, range(words.seeds), record)
    record["not_begun"] = train(wanted, changes, library, words.packed, began + words.seconds, finished)
    record["calls"][-1]["seconds"] = time.monotonic() - began
    write(words.out, record)


if __name__ == "__main__":
    main()
