"""Train recipes of detection on one GPU, each in a process of its own beside the others, and write one JSON record.

    python results/dense_detection.py --out results/dense_bccd.json --recipes vmamba_bccd,resnet_bccd --seconds 190
    python results/dense_detection.py --out results/dense_coco_mini.json --recipes simba_coco_mini,vim2_coco_mini

finds the sets through SELECTRA_DATA. Steps are cut to the time by what a few take beside the others, and keep the
recipes' proportions. Called again with the same record it goes on with what is missing, from the checkpoints beside the
record. A rehearsal that runs on any machine: `--most 6 --seconds 300 train.batch_size=2 train.precision=float32
data.path=shapes data.join=false data.crop=48 model.backbone=vmamba_smoke model.d_pyramid=8 model.short_side=48`.
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

from selectra.classifier.detecting import Detector, objects_on
from selectra.registry import models
from selectra.report.detected import save_detected
from selectra.runs import find_run
from selectra.spec import Run, override
from selectra.train.checkpoint import replacing
from selectra.train.evaluation import evaluate
from selectra.train.job import Built, build, typed
from selectra.train.loop import fit
from selectra.train.parallel import World, pick_device
from selectra.train.record import environment
from selectra.train.same_data import describe_data

# Steps that are not timed, and those that are; a margin for the others; seconds of evaluation and of the end.
WARM, TIMED, MARGIN, END = 4, 10, 1.08, 18.0


def read_words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--recipes", default="vmamba_bccd,resnet_bccd")
    words.add_argument("--seconds", type=float, default=190.0, help="for everything")
    words.add_argument("--most", type=int, default=None, help="most steps of the longest training")
    words.add_argument("--note", default="", help="what the record says of the data")
    words.add_argument("--work", type=Path, default=None, help="folder of checkpoints; default: beside the record")
    words.add_argument("--part", default=None, help="one recipe, for the processes of this script's own")
    words.add_argument("--steps", type=int, default=None, help="of that one, where an earlier call has found it")
    words.add_argument("--until", type=float, default=None, help="when that one ends, as time.time() has it")
    words.add_argument("--pictures", type=Path, default=None, help="folder for pictures of four test images each")
    words.add_argument("changes", nargs="*", help="for every run, such as train.batch_size=8")
    return words.parse_intermixed_args()


def run_of(name: str, changes: list[str], steps: int) -> Run:
    """A recipe with changes and its number of steps; weights are those of the last step or their running mean."""
    found = find_run(name, [*changes, f"train.steps={steps}", f"train.eval_every={10**6}"])
    return typed(override(found, [f"train.save_every={max(1, steps // 2)}"]))


def fast() -> None:
    # No search for cuDNN's fastest algorithms: it would begin anew with every other number of proposals.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def measure(name: str, changes: list[str], built: Built) -> dict[str, Any]:
    """Seconds of a step, beside the others and views included; on a GPU also with processes that make the views."""
    device, windows = pick_device("auto"), built.data.windows("train")

    def seconds(steps: int, workers: int, windows: Any = windows) -> float:
        run = run_of(name, [*changes, f"train.workers={workers}"], steps)
        return fit(built.model, built.task, windows, None, run, progress=False).seconds / steps

    row: dict[str, Any] = {"recipe": name, "first_step_seconds": seconds(WARM, 0), "workers": 0}
    row["step_seconds"] = row["step_seconds_0_workers"] = seconds(TIMED, 0)
    # Short passes begin and end processes all the time.
    if device.type == "cuda" and len(windows) >= TIMED * built_batch(name, changes):
        try:
            # Processes begin with what lies in the computer's memory.
            fresh = built.data.windows("train")
            fresh.at_pass(0, 0)
            row["step_seconds_4_workers"] = seconds(TIMED, 4, fresh)
        except RuntimeError as error:
            # Too little shared memory ends the workers.
            row["error_4_workers"] = str(error).partition("\n")[0]
        if row.get("step_seconds_4_workers", 1e9) < 0.8 * row["step_seconds"]:
            row |= {"workers": 4, "step_seconds": row["step_seconds_4_workers"]}
    return {**row, "parameters": sum(p.numel() for p in built.model.parameters()), "at": time.time()}


def built_batch(name: str, changes: list[str]) -> int:
    return find_run(name, changes).train.batch_size


def together(words: argparse.Namespace, row: dict[str, Any], built: Built) -> tuple[int, list[dict[str, Any]]]:
    """Steps of this recipe, once all have measured theirs: all come to the same proportions by the same numbers."""
    folder, names = words.out.with_suffix(""), words.recipes.split(",")
    write(folder / f"{row['recipe']}.measured.json", row)
    files = [folder / f"{name}.measured.json" for name in names]
    while not all(file.is_file() for file in files):
        if time.time() > words.until:
            raise SystemExit("another training has not measured its steps in time")
        time.sleep(0.2)
    rows = [json.loads(file.read_text()) for file in files]
    left = words.until - max(each["at"] for each in rows) - END
    return affordable(rows, words.changes, left, words.most)[row["recipe"]], rows


def affordable(rows: list[dict[str, Any]], changes: list[str], seconds: float, most: int | None) -> dict[str, int]:
    """Steps of each recipe in their own proportions, so that the longest ends in time beside the others."""
    own = {row["recipe"]: find_run(row["recipe"], changes).train.steps or 1 for row in rows}
    longest = max(own[row["recipe"]] * row["step_seconds"] for row in rows)
    share = seconds / (longest * MARGIN)
    if most is not None:
        share = min(share, most / max(own.values()))
    return {name: max(1, int(share * steps)) for name, steps in own.items()}


def train_part(words: argparse.Namespace) -> None:
    """One recipe from start or checkpoint to its metrics, into a file of its own."""
    began, device = time.monotonic(), pick_device("auto")
    changes, steps, folder = words.changes, words.steps, (words.work or words.out.with_suffix("")) / words.part
    built = build(run_of(words.part, changes, steps or 1))
    row = read_row(words.out, words.part)
    if steps is None:
        row = measure(words.part, changes, built)
        steps, _ = together(words, row, built)
        write(words.out.with_suffix("") / f"{words.part}.measured.json", {**row, "steps": steps})
    run = run_of(words.part, [*changes, f"train.workers={row['workers']}"], steps)
    # The data is the same; weights begin anew.
    torch.manual_seed(run.train.seed)
    model = models.build(run.model, built.data.facts)
    about, train, test = describe_data(built.data), built.data.windows("train"), built.data.windows("test")
    fitted = fit(model, built.task, train, None, run, folder, progress=False, data=about)
    losses = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    losses = [(each["step"], round(each["loss"], 4)) for each in losses if "loss" in each]
    started, evaluator = time.monotonic(), built.task.evaluator()
    world, precision = World(device=device), run.train.precision
    metrics = evaluate(model, built.task, test, run.train.batch_size, world, precision, evaluator)
    found = {
        "recipe": words.part, "run": run.model_dump(mode="json"), "steps": fitted.steps,
        "training_seconds": fitted.seconds, "data": built.data.summary(), "test_images": len(test),
        "evaluation_seconds": time.monotonic() - started, "metrics": metrics, **evaluator.details(),
        "losses": losses[:: max(1, len(losses) // 50)], "process_seconds": time.monotonic() - began,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip
    write(part_file(words.out, words.part), found)
    if words.pictures is not None:
        draw(words, run.model.name, model, built.data, device)


def draw(words: argparse.Namespace, name: str, model: Any, data: Any, device: torch.device) -> None:
    """What is found on a few test images."""
    colours = tuple((red, green, blue) for red, green, blue in data.describe()["colours"])
    mean, std = (tuple(each.tolist()) for each in data.mean_std)
    trained = Detector(name, model.eval(), data.classes, colours, mean, std)
    rows = data.rows["test"]
    for row in rows[:: max(1, len(rows) // 4)][:4]:
        image, file = data.read(int(row))[0], data.listing.entries[int(row)].file
        save_detected(objects_on(trained, image, file, device), words.pictures / words.part)


def part_file(out: Path, name: str) -> Path:
    return out.with_suffix("") / f"{name}.json"


def read_row(out: Path, name: str) -> dict[str, Any]:
    """What an earlier call has measured."""
    file = out.with_suffix("") / f"{name}.measured.json"
    return json.loads(file.read_text()) if file.is_file() else {"workers": 0}


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
    write(words.out, record)
    train_all(words, names, began)
    collect(words, record)
    record["calls"][-1]["seconds"] = time.monotonic() - began
    write(words.out, record)


def collect(words: argparse.Namespace, record: dict[str, Any]) -> None:
    """Bring what the processes wrote into the record."""
    for name in words.recipes.split(","):
        row = read_row(words.out, name)
        if "steps" in row:
            record["steps"][name] = row["steps"]
            record["measured"] = [each for each in record["measured"] if each["recipe"] != name] + [row]
        kept = {each["recipe"] for each in record["trainings"]}
        if name not in kept and part_file(words.out, name).is_file():
            record["trainings"].append(json.loads(part_file(words.out, name).read_text()))
            shown = {key: value for key, value in record["trainings"][-1]["metrics"].items() if " " not in key}
            print(name, record["steps"][name], "steps:", json.dumps(shown), flush=True)  # noqa: T201


def train_all(words: argparse.Namespace, names: list[str], began: float) -> None:
    """What has no metrics yet, each in its process, until all end or the time does."""
    until = time.time() + words.seconds
    todo = [name for name in names if not part_file(words.out, name).is_file()]
    processes = {name: start(words, name, until) for name in todo}
    while processes and time.time() < until:
        time.sleep(0.3)
        ended = [name for name, process in processes.items() if process.poll() is not None]
        for name in ended:
            print(round(time.monotonic() - began, 1), name, "ended with", processes.pop(name).returncode, flush=True)  # noqa: T201
    for process in processes.values():
        process.terminate()
    for name, process in processes.items():
        process.wait()
        print(name, "is stopped by the time; the same command goes on with its checkpoint", flush=True)  # noqa: T201


def start(words: argparse.Namespace, name: str, until: float) -> "subprocess.Popen[bytes]":
    row = read_row(words.out, name)
    more = ["--part", name, "--until", str(until), "--recipes", words.recipes]
    more += ["--steps", str(row["steps"])] if "steps" in row else []
    given = {"--work": words.work, "--most": words.most, "--pictures": words.pictures}
    more += [word for option, value in given.items() if value is not None for word in (option, str(value))]
    return subprocess.Popen([sys.executable, __file__, "--out", str(words.out), *more, *words.changes])


if __name__ == "__main__":
    main()
