"""Train the CamVid recipes side by side on one GPU, with several seeds, and write one JSON record.

    python results/dense_camvid.py --out results/dense_camvid.json --steps 1500 --seconds 300

finds CamVid through SELECTRA_DATA. In regions, with and without context:

    ... --recipes xt_none_camvid120,xt_mamba_camvid120,xt_hyper_camvid120,xt_xl_camvid120 --against xt_none_camvid120

Called again with the same record it goes on with what is missing. A rehearsal that
runs on any machine: `--data shapes --steps 3 train.batch_size=2 train.precision=float32 data.crop=32`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from selectra.compare import vision
from selectra.compare.packed_images import Library
from selectra.train.checkpoint import replacing
from selectra.train.record import environment

MODELS = ("samba", "vmamba", "vim2", "convnext", "vit")


def read_words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--recipes", default=",".join(f"{name}_camvid" for name in MODELS))
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--packed", type=int, default=0, help="trainings side by side; 0: two where memory suffices")
    words.add_argument("--seconds", type=float, default=300.0, help="nothing is begun after these")
    words.add_argument("--steps", type=int, default=None)
    words.add_argument("--budget", type=float, default=None, help="as many steps as all take so many seconds for")
    words.add_argument("--data", default=None, help="another set than CamVid")
    words.add_argument("--note", default="", help="what the record says of the data")
    words.add_argument("--against", default=None, help="also the paired differences of mIoU to this recipe")
    words.add_argument("--no-measure", action="store_true")
    words.add_argument("--no-train", action="store_true")
    words.add_argument("changes", nargs="*", help="for every run, such as train.batch_size=8")
    return words.parse_intermixed_args()


def begin(words: argparse.Namespace, changes: list[str]) -> dict[str, Any]:
    """The record of an earlier call with the same changes, or a new one."""
    command = {"command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(), **environment()}
    if words.out.is_file():
        record = json.loads(words.out.read_text())
        if record["changes"] != changes:
            raise SystemExit(f"'{words.out}' is of other changes: {record['changes']}; name another record.")
        record["calls"].append(command)
        return record
    return {
        "what": "dense_camvid",
        "note": words.note,
        "calls": [command],
        "changes": changes,
        "models": [],
        "trainings": [],
    }


def main() -> None:
    words, began = read_words(), time.monotonic()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    # Weights are the running mean of the last ones: nothing is chosen on the validation part.
    changes = ["train.eval_every=1000000", *words.changes] + ([f"train.steps={words.steps}"] if words.steps else [])
    changes += [f"data.path={words.data}"] if words.data else []
    record = begin(words, changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, seeds, library = tuple(words.recipes.split(",")), range(words.seeds), Library(device)

    def say(row: dict[str, Any]) -> None:
        shown = {key: value for key, value in row.items() if key not in ("losses", "model")}
        print(round(time.monotonic() - began, 1), json.dumps(shown), flush=True)  # noqa: T201
        write(words.out, record)

    if not words.no_measure:
        measure(names, changes, library, record, say)
    fits = tuple(name for name in names if name not in {row["recipe"] for row in record["models"] if "error" in row})
    if words.budget and "steps" not in record:
        record["steps"] = affordable(record, fits, len(seeds), words.budget)
    steps = [f"train.steps={record['steps']}"] if "steps" in record else []
    if not words.no_train:
        packed = words.packed or (2 if enough_for_two(record, device) else 1)

        def finished(row: dict[str, Any]) -> None:
            record["trainings"].append(row)
            if words.against:
                record["differences"] = differences(record["trainings"], words.against)
            say(row)

        wanted = missing(fits, seeds, record)
        until = began + words.seconds
        record["not_begun"] = vision.train(wanted, [*changes, *steps], library, packed, until, finished)
    record["calls"][-1]["seconds"] = time.monotonic() - began
    write(words.out, record)


def differences(trainings: Sequence[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """Of each recipe's mIoU to another recipe's, seed by seed: the mean, and Student's interval of it (95 %)."""
    found = {(row["recipe"], row["seed"]): row["test"]["miou"] for row in trainings}
    rows = []
    for recipe in dict.fromkeys(name for name, _ in found if name != against):
        seeds = sorted(seed for name, seed in found if name == recipe and (against, seed) in found)
        each = [found[recipe, seed] - found[against, seed] for seed in seeds]
        row: dict[str, Any] = {"recipe": recipe, "against": against, "seeds": seeds, "each": each}
        if len(each) > 1:
            mean, half = np.mean(each), stats.t.ppf(0.975, len(each) - 1) * np.std(each, ddof=1) / np.sqrt(len(each))
            row |= {"mean": float(mean), "low": float(mean - half), "high": float(mean + half)}
        rows.append(row)
    return rows


def write(out: Path, record: dict[str, Any]) -> None:
    with replacing(out) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def missing(names: Sequence[str], seeds: Iterable[int], record: dict[str, Any]) -> list[tuple[str, int]]:
    """Recipes and seeds without a training, seed by seed, so that what a limit cuts off is a whole seed of all."""
    done = {(row["recipe"], row["seed"]) for row in record["trainings"]}
    return [(name, seed) for seed in seeds for name in names if (name, seed) not in done]


def measure(
    names: Sequence[str], changes: Sequence[str], library: Library, record: dict[str, Any],
    say: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Each model alone; one that does not fit is noted and not trained."""
    measured = {row["recipe"] for row in record["models"]}
    for name in names:
        if name in measured:
            continue
        try:
            record["models"].append(vision.measure(name, changes, library))
        except torch.OutOfMemoryError as error:
            record["models"].append({"recipe": name, "error": str(error).partition("\n")[0]})
            torch.cuda.empty_cache()
        say(record["models"][-1])


def affordable(record: dict[str, Any], names: Sequence[str], seeds: int, seconds: float) -> int:
    """Steps, the same for all models, that take so long by the measured times, one training behind the other."""
    each = sum(row["train_ms"] / 1e3 for row in record["models"] if row["recipe"] in names)
    return max(50, int(seconds / (each * seeds)) // 50 * 50)


def enough_for_two(record: dict[str, Any], device: torch.device) -> bool:
    """Whether two of the largest trainings fit beside each other, with room for evaluations."""
    peaks = [row["peak_gib"] for row in record["models"] if "peak_gib" in row]
    if device.type != "cuda" or not peaks:
        return False
    return 2.6 * max(peaks) < torch.cuda.get_device_properties(device).total_memory / 2**30


if __name__ == "__main__":
    main()
