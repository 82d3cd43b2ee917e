"""Train the CamVid recipes side by side on one GPU, with several seeds, and write one JSON record.

    python results/dense_camvid.py --out results/dense_camvid.json --steps 1500 --packed 2 --seconds 300

finds CamVid through SELECTRA_DATA. Called again with the same record it goes on with what is missing. A rehearsal that
runs on any machine: `--data shapes --steps 3 train.batch_size=2 train.precision=float32 data.crop=32`.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from selectra.compare.vision import Study
from selectra.train.checkpoint import replacing
from selectra.train.record import environment

MODELS = ("samba", "vmamba", "vim2", "convnext", "vit")


def read_words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--recipes", default=",".join(f"{name}_camvid" for name in MODELS))
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--packed", type=int, default=2)
    words.add_argument("--seconds", type=float, default=300.0, help="nothing is begun after these")
    words.add_argument("--steps", type=int, default=None)
    words.add_argument("--data", default=None, help="another set than CamVid")
    words.add_argument("--no-measure", action="store_true")
    words.add_argument("--no-train", action="store_true")
    words.add_argument("changes", nargs="*", help="for every run, such as train.batch_size=8")
    return words.parse_args()


def begin(words: argparse.Namespace, changes: list[str]) -> dict[str, Any]:
    """The record of an earlier call with the same changes, or a new one."""
    command = {"command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(), **environment()}
    if words.out.is_file():
        record = json.loads(words.out.read_text())
        if record["changes"] != changes:
            raise SystemExit(f"'{words.out}' is of other changes: {record['changes']}; name another record.")
        record["calls"].append(command)
        return record
    return {"what": "dense_camvid", "calls": [command], "changes": changes, "models": [], "trainings": []}


def main() -> None:
    words, began = read_words(), time.monotonic()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    changes = list(words.changes) + ([f"train.steps={words.steps}"] if words.steps else [])
    changes += [f"data.path={words.data}"] if words.data else []
    record = begin(words, changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = tuple(words.recipes.split(","))
    done = frozenset((row["recipe"], row["seed"]) for row in record["trainings"])
    study = Study(names, tuple(range(words.seeds)), tuple(changes), device, words.packed, done=done)

    def say(row: dict[str, Any]) -> None:
        shown = {key: value for key, value in row.items() if key not in ("losses", "model")}
        print(round(time.monotonic() - began, 1), json.dumps(shown), flush=True)  # noqa: T201
        with replacing(words.out) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")

    measured = {row["recipe"] for row in record["models"]}
    for name in () if words.no_measure else (name for name in names if name not in measured):
        try:
            record["models"].append(study.measure(name))
        except torch.OutOfMemoryError as error:
            record["models"].append({"recipe": name, "out_of_memory": str(error).partition("\n")[0]})
        say(record["models"][-1])
    if not words.no_train:

        def finished(row: dict[str, Any]) -> None:
            record["trainings"].append(row)
            say(row)

        record["not_begun"] = study.train(began + words.seconds, finished)
    record["calls"][-1]["seconds"] = time.monotonic() - began
    with replacing(words.out) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
