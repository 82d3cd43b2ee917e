"""Studies of language models on one GPU within a limit: the speed of every family's step first, and from it the steps.

    python results/language_train_gpu.py language_shakespeare --seconds 240 --packed 4 --out FOLDER

A family's step is measured alone, as the CUDA graph that the study replays. All families get the same number of steps,
the largest of those below at which all trainings fit; `selectra compare NAME --steps N --packed M` does the same study.
Every training is stored as it ends, and the record is written before the limit; the same command in the same folder
goes on with what is not done, and with `--seconds 0` writes the record of what is. With `--device cpu` all trainings
go one after the other, and the one that has begun is ended after the limit.
"""

import argparse
import json
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from selectra.compare.cells import Cell
from selectra.compare.conduct import Wish, conduct
from selectra.compare.match import match
from selectra.compare.on_device_text import TextOnDevice
from selectra.compare.questions import Asked, find_study
from selectra.compare.results import write_results
from selectra.compare.study import Budget, Study
from selectra.compare.worker import PARTS, build
from selectra.data.held_text import held_split, hold
from selectra.errors import ConfigError
from selectra.report.study import read_study, write_reports
from selectra.spec import override
from selectra.train.job import typed
from selectra.train.record import environment

STEPS = (100, 200, 300, 400, 500, 600, 800, 1000, 1200, 1500, 1800, 2100, 2500, 3000, 4000, 5000)
MEASURED = 20
# Seconds to measure a model's costs, and what beginning a training adds.
COSTS_S, BEGUN_S = 0.7, 0.1


def timed(study: Study, base_name: str, variant_name: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds and memory of a family's training step, alone."""
    assert study.budget is not None
    base, variant = study.base(base_name), study.variant(variant_name)
    run = override(typed(study.run(base, variant, 0)), ["train.steps=100"])
    facts = build(Cell(override(run, ["model=gpt_smoke"]), 0, {})).data.facts
    found = match(run.model, facts, params=study.budget.amount, align=study.budget.align, device=device,
                  precision=run.train.precision)  # fmt: skip
    run = run.model_copy(update={"model": found.spec})
    built = build(Cell(run, 0, {}))
    on_gpu, before = device.type == "cuda", 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    stream = torch.cuda.Stream(device) if on_gpu else None
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    splits = {part: held_split(built.data, part) for part in PARTS}
    began = time.monotonic()
    training = TextOnDevice(built.model.to(device), built.task, hold(built.data, device), splits, run, stream, pool)
    training.prepare()
    if on_gpu:
        torch.cuda.synchronize()
    prepared = time.monotonic() - began
    began = time.monotonic()
    with training.on_stream():
        for _ in range(MEASURED if on_gpu else 2):
            training.step_again()
    if on_gpu:
        torch.cuda.synchronize()
    step = (time.monotonic() - began) / (MEASURED if on_gpu else 2)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None
    tokens = run.train.batch_size * facts["seq_len"]
    found_losses = training.losses[: training.number].tolist()[::5]
    del training.step_again, training.evaluate_again, training.note_again
    return {
        "base": base_name, "variant": variant_name, "model": found.spec.to_json(), "parameters": found.got,
        "step_ms": 1e3 * step, "tokens_per_s": tokens / step, "peak_gib": peak, "prepare_s": prepared,
        "loss": found_losses, "backends": training.backends,
    }  # fmt: skip


def fitting(study: Study, speeds: list[dict[str, Any]], seconds: float, gain: float) -> int:
    """The largest number of steps at which all trainings take no more than `seconds`."""
    trainings = study.seeds + (study.tuning.count if study.tuning else 0)
    each = sum(speed["step_ms"] for speed in speeds) * trainings / 1e3 / gain
    # Costs of every model come first; beginning a training takes the host while others keep the GPU busy.
    fixed = len(speeds) * COSTS_S + len(speeds) * trainings * BEGUN_S
    return max([steps for steps in STEPS if fixed + each * steps <= seconds], default=STEPS[0])


def without(study: Study, names: set[str]) -> Study:
    """The study without families that cannot be trained here; the record says why."""
    kept = tuple(each for each in study.variants if each.name not in names)
    return study.model_copy(update={"variants": kept})


def chosen(asked: argparse.Namespace, steps: int | None) -> Study:
    """The study as it is asked for: some of its bases, another size, length or batch."""
    budget = Budget(quantity="params", amount=asked.params, align=asked.align) if asked.params else None
    study = find_study(asked.study, Asked(steps=steps, batch_size=asked.batch_size, trials=asked.trials, budget=budget))
    if asked.bases:
        names, known = asked.bases.split(","), [base.name for base in study.bases]
        if not set(names) <= set(known):
            raise ConfigError(f"--bases has {names}; the study's are {known}.")
        study = study.model_copy(update={"bases": tuple(study.base(name) for name in names)})
    if asked.rate:
        changed = tuple(override(base, [f"optim.lr={asked.rate}"]) for base in study.bases)
        study = study.model_copy(update={"bases": changed})
    if asked.precision:
        changed = tuple(override(base, [f"train.precision={asked.precision}"]) for base in study.bases)
        study = study.model_copy(update={"bases": changed})
    return study


def measured(study: Study, asked: argparse.Namespace, device: torch.device, console: Console) -> dict[str, Any]:
    """Every family's step on every base, alone, as far as none of it is in the folder from an earlier call."""
    path = asked.out / f"{study.name}_speed.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    record: dict[str, Any] = {"study": study.name, "speeds": [], "failed": [], **environment()}
    for base in study.bases:
        for variant in study.variants:
            try:
                record["speeds"].append(timed(study, base.name, variant.name, device))
            except RuntimeError as error:
                record["failed"].append({"base": base.name, "variant": variant.name, "reason": str(error)[:500]})
                console.print(record["failed"][-1], highlight=False, markup=False)
                continue
            told = ("base", "variant", "step_ms", "tokens_per_s", "prepare_s")
            console.print({name: record["speeds"][-1][name] for name in told}, highlight=False, markup=False)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def command() -> str:
    """What was typed, without the folder, which is this machine's own."""
    words = sys.argv.copy()
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return shlex.join(["python", *words])


def written(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write what the store holds as one record and as pages, whoever trained it; what the pages say."""
    write_results(path, path.with_suffix(".json"))
    stand = json.loads(path.with_suffix(".json").read_text("utf-8"))
    devices = sorted({cell["device"].replace("cpu", "CPU") for cell in stand["cells"] if "device" in cell})
    made = {
        "command": command(), "date": datetime.now(UTC).date().isoformat(), "device": " and ".join(devices),
        "torch": torch.__version__, "speeds": record["speeds"], "failed": record["failed"],
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(made | stand, indent=1) + "\n", encoding="utf-8")
    content = read_study(path.with_suffix(".json"))
    write_reports(content, path.with_suffix(""))
    return content


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("--seconds", type=float, default=200.0, help="From the script's begin to its end.")
    parser.add_argument("--slack", type=float, default=15.0, help="Seconds of these kept for writing the record.")
    parser.add_argument("--packed", type=int, default=4)
    parser.add_argument("--gain", type=float, default=1.2, help="How much faster trainings are side by side.")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--bases", help="Names of some of the study's bases, separated by commas.")
    parser.add_argument("--params", type=float, help="Parameters of every model.")
    parser.add_argument("--align", type=int, default=8, help="Widths of models of so many are multiples of this.")
    parser.add_argument("--trials", type=int, help="0: no trials of the learning rate, all families take --rate.")
    parser.add_argument("--rate", type=float, help="The bases' learning rate.")
    parser.add_argument("--precision", help="The bases' precision, such as float32.")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    """Measure, choose, train, write."""
    asked, console, began = arguments(), Console(width=200), time.monotonic()
    device = torch.device(asked.device)
    until = began + asked.seconds - asked.slack
    record = measured(chosen(asked, None), asked, device, console)
    left = until - time.monotonic()
    steps = asked.steps or fitting(chosen(asked, None), record["speeds"], left, asked.gain)
    console.print(f"{left:.0f} s are left: {steps} steps", highlight=False)
    study = without(chosen(asked, steps), {each["variant"] for each in record["failed"]})
    path = asked.out / f"{study.name}.sqlite"
    conduct(study, Wish(path, str(device), until - time.monotonic(), 1, asked.packed), console)
    content = written(path, record)
    console.print(content["verdict"]["text"], highlight=False, markup=False)
    for row in content["rows"]:
        console.print({name: row[name] for name in ("base", "variant", "mean", "interval", "val", "seconds", "missing",
                                                    "reasons", "differs")}, highlight=False, markup=False)  # fmt: skip
    console.print(f"{time.monotonic() - began:.1f} s", highlight=False)


if __name__ == "__main__":
    main()
