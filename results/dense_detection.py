"""Train recipes of detection on one GPU, each in a process of its own beside the others, and write one JSON record.

    python results/dense_detection.py --out results/dense_bccd.json --recipes vmamba_bccd,resnet_bccd --seconds 190
    python results/dense_detection.py --out results/dense_coco_mini.json --recipes simba_coco_mini,vim2_coco_mini

finds the sets through SELECTRA_DATA. Steps are cut to the time by what a few take, and keep the recipes' proportions.
Called again with the same record it goes on with what is missing, from the checkpoints beside the record. A rehearsal
that runs on any machine: `--most 6 --seconds 300 train.batch_size=2 train.precision=float32 data.path=shapes
data.join=false data.crop=48 model.backbone=vmamba_smoke model.d_pyramid=8 model.short_side=48`.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from selectra.runs import find_run
from selectra.spec import Run, override
from selectra.train.checkpoint import replacing
from selectra.train.evaluation import evaluate
from selectra.train.job import build, typed
from selectra.train.loop import fit
from selectra.train.parallel import World, pick_device
from selectra.train.record import environment
from selectra.train.same_data import describe_data

# A step beside another training takes longer than alone by up to this; evaluation and start come on top.
BESIDE, START, WARM, TIMED = 1.5, 35.0, 4, 12


def read_words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--recipes", default="vmamba_bccd,resnet_bccd")
    words.add_argument("--seconds", type=float, default=190.0, help="for everything")
    words.add_argument("--most", type=int, default=None, help="most steps of the longest training")
    words.add_argument("--note", default="", help="what the record says of the data")
    words.add_argument("--work", type=Path, default=None, help="folder of checkpoints; default: beside the record")
    words.add_argument("--part", default=None, help="one recipe, for the processes of this script's own")
    words.add_argument("--steps", type=int, default=None)
    words.add_argument("changes", nargs="*", help="for every run, such as train.batch_size=8")
    return words.parse_intermixed_args()


def run_of(name: str, changes: list[str], steps: int) -> Run:
    """A recipe with changes and its number of steps; weights are those of the last step or their running mean."""
    found = find_run(name, [*changes, f"train.steps={steps}", f"train.eval_every={10**6}"])
    return typed(override(found, [f"train.save_every={max(1, steps // 4)}"]))


def fast() -> None:
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def measure(name: str, changes: list[str]) -> dict[str, Any]:
    """Seconds of a step, alone, views included; on a GPU also with processes that make them."""
    device = pick_device("auto")
    built = build(run_of(name, changes, WARM))
    windows = built.data.windows("train")

    def seconds(steps: int, workers: int) -> float:
        run = run_of(name, [*changes, f"train.workers={workers}"], steps)
        return fit(built.model, built.task, windows, None, run, progress=False).seconds / steps

    row: dict[str, Any] = {"recipe": name, "first_step_seconds": seconds(WARM, 0), "workers": 0}
    row["step_seconds"] = row["step_seconds_0_workers"] = seconds(TIMED, 0)
    if device.type == "cuda":
        try:
            row["step_seconds_4_workers"] = seconds(TIMED, 4)
        except RuntimeError as error:
            # Too little shared memory ends the workers.
            row["error_4_workers"] = str(error).partition("\n")[0]
        if row.get("step_seconds_4_workers", 1e9) < 0.8 * row["step_seconds"]:
            row |= {"workers": 4, "step_seconds": row["step_seconds_4_workers"]}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {**row, "parameters": sum(p.numel() for p in built.model.parameters())}


def affordable(rows: list[dict[str, Any]], changes: list[str], seconds: float, most: int | None) -> dict[str, int]:
    """Steps of each recipe in their own proportions, so that the longest ends in time beside the others."""
    own = {row["recipe"]: find_run(row["recipe"], changes).train.steps or 1 for row in rows}
    longest = max(own[row["recipe"]] * row["step_seconds"] for row in rows)
    share = seconds / (longest * (BESIDE if len(rows) > 1 else 1.05))
    if most is not None:
        share = min(share, most / max(own.values()))
    return {name: max(1, int(share * steps)) for name, steps in own.items()}


def train_part(words: argparse.Namespace) -> None:
    """One recipe from start or checkpoint to its metrics, into a file of its own."""
    began = time.monotonic()
    device = pick_device("auto")
    run = run_of(words.part, words.changes, words.steps)
    built, folder = build(run), (words.work or words.out.with_suffix("")) / words.part
    about = describe_data(built.data)
    fitted = fit(built.model, built.task, built.data.windows("train"), None, run, folder, progress=False, data=about)
    losses = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    losses = [(each["step"], round(each["loss"], 4)) for each in losses if "loss" in each]
    started, evaluator = time.monotonic(), built.task.evaluator()
    windows = built.data.windows("test")
    metrics = evaluate(
        built.model, built.task, windows, run.train.batch_size, World(device=device), run.train.precision, evaluator
    )
    row = {
        "recipe": words.part, "run": run.model_dump(mode="json"), "steps": fitted.steps,
        "training_seconds": fitted.seconds, "data": built.data.summary(), "test_images": len(windows),
        "evaluation_seconds": time.monotonic() - started, "metrics": metrics, **evaluator.details(),
        "losses": losses[:: max(1, len(losses) // 50)], "process_seconds": time.monotonic() - began,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip
    write(part_file(words.out, words.part), row)


def part_file(out: Path, name: str) -> Path:
    return out.with_suffix("") / f"{name}.json"


def write(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def begin(words: argparse.Namespace) -> dict[str, Any]:
    """The record of an earlier call with the same changes, or a new one."""
    command = {"command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(), **environment()}
    if words.out.is_file():
        record = json.loads(words.out.read_text())
        if record["changes"] != words.changes:
            raise SystemExit(f"'{words.out}' is of other changes: {record['changes']}; name another record.")
        record["calls"].append(command)
        return record
    empty = {"measured": [], "steps": {}, "trainings": []}
    return {"what": "dense_detection", "note": words.note, "calls": [command], "changes": words.changes, **empty}


def main() -> None:
    words, began = read_words(), time.monotonic()
    fast()
    if words.part is not None:
        train_part(words)
        return
    record, names = begin(words), words.recipes.split(",")
    for name in names:
        if name not in {row["recipe"] for row in record["measured"]}:
            record["measured"].append(measure(name, words.changes))
            print(round(time.monotonic() - began, 1), json.dumps(record["measured"][-1]), flush=True)  # noqa: T201
            write(words.out, record)
    if not set(names) <= record["steps"].keys():
        left = words.seconds - (time.monotonic() - began) - START
        record["steps"] = affordable(record["measured"], words.changes, left, words.most)
        write(words.out, record)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    train_all(words, names, record, began)
    kept = {row["recipe"] for row in record["trainings"]}
    for name in names:
        if name not in kept and part_file(words.out, name).is_file():
            record["trainings"].append(json.loads(part_file(words.out, name).read_text()))
            print(name, json.dumps(record["trainings"][-1]["metrics"]), flush=True)  # noqa: T201
    record["calls"][-1]["seconds"] = time.monotonic() - began
    write(words.out, record)


def train_all(words: argparse.Namespace, names: list[str], record: dict[str, Any], began: float) -> None:
    """What has no metrics yet, each in its process, until all end or the time does."""
    processes = {name: start(words, name, record) for name in names if not part_file(words.out, name).is_file()}
    while processes and time.monotonic() - began < words.seconds:
        time.sleep(0.5)
        ended = [name for name, process in processes.items() if process.poll() is not None]
        for name in ended:
            print(round(time.monotonic() - began, 1), name, "ended with", processes.pop(name).returncode, flush=True)  # noqa: T201
    for name, process in processes.items():
        process.terminate()
        process.wait()
        print(name, "is stopped by the time; the same command goes on with its checkpoint", flush=True)  # noqa: T201


def start(words: argparse.Namespace, name: str, record: dict[str, Any]) -> "subprocess.Popen[bytes]":
    row = next(row for row in record["measured"] if row["recipe"] == name)
    steps = ["--part", name, "--steps", str(record["steps"][name])]
    steps += ["--work", str(words.work)] if words.work is not None else []
    changes = [*words.changes, f"train.workers={row['workers']}"]
    return subprocess.Popen([sys.executable, __file__, "--out", str(words.out), *steps, *changes])


if __name__ == "__main__":
    main()
