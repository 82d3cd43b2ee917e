"""Kill a training with SIGKILL at random moments, go on, and compare: `python results/kill_resume.py --out results`.

A small TSM2 with dropout on noisy sines, 12 steps, a checkpoint after every second one, the last two kept. In each
trial the training is a forked process that is killed after a random time, one in three of them a second time while it
goes on, and then goes on to its end. After each kill every checkpoint that has its name must be whole, and none that
was there may be gone but for the rule of keeping two; at the end losses, learning rates, validation metrics and the
exported weights must be those of the undisturbed training, bit for bit.
"""

import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console

import selectra.models  # noqa: F401
from selectra.data.series import SeriesFile
from selectra.registry import models
from selectra.spec import Optim, Run, Spec, Train
from selectra.tasks import Forecasting
from selectra.train import checkpoint
from selectra.train.loop import fit
from selectra.train.parallel import World
from selectra.train.record import environment
from selectra.train.snapshots import Snapshot

KEPT = ("event", "step", "loss", "norm", "lr", "mse", "mae", "best")
console = Console(width=150)


def make_run(series: Path) -> Run:
    """The training."""
    return Run(
        name="kills", model=Spec("tsm2_smoke", patch_len=4, stride=2, dropout=0.2),
        data=Spec("series_file", path=str(series), seq_len=12, horizon=4), task=Spec("forecasting"),
        optim=Optim(lr=1e-2, warmup_steps=3),
        train=Train(steps=12, batch_size=16, eval_every=4, save_every=2, ema=0.8, device="cpu"),
    )  # fmt: skip


def begin(run: Run, data: SeriesFile, out: Path) -> int:
    """Train in a process of its own; the process' number."""
    number = os.fork()
    if number:
        return number
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = models.build(run.model, data.facts)
    fit(model, Forecasting(), data.windows("train"), data.windows("val"), run, out, progress=False)
    os._exit(0)


def ended(number: int) -> bool:
    """Whether a training went to its end."""
    _, status = os.waitpid(number, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def result(out: Path) -> dict[str, Any]:
    """What a training came to, without times."""
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    kept = [
        {name: line[name] for name in KEPT if name in line} for line in lines if line["event"] in ("step", "metrics")
    ]
    return {"lines": kept, "weights": hashlib.sha256((out / checkpoint.WEIGHTS).read_bytes()).hexdigest()}


def trial(run: Run, data: SeriesFile, out: Path, whole: float, draw: random.Random) -> list[dict[str, Any]]:
    """Kill once or twice, and go on to the end; what was there after each kill."""
    found: list[dict[str, Any]] = []
    for _ in range(2 if draw.random() < 1 / 3 else 1):
        before, moment = checkpoint.steps(out), draw.uniform(0, whole)
        number = begin(run, data, out)
        time.sleep(moment)
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
        now = checkpoint.steps(out)
        for step in now:
            Snapshot(checkpoint.folder(out, step), World())
        assert not before or (now and now[-1] >= before[-1]), "a whole checkpoint was lost"
        left = len(list((out / checkpoint.CHECKPOINTS).glob(".step-*")))
        found.append({"after_seconds": round(moment, 3), "killed": os.WIFSIGNALED(status), "checkpoints": now,
                      "half_written": left})  # fmt: skip
    assert ended(begin(run, data, out)), "the training did not go on"
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder of the record.")],
    trials: Annotated[int, typer.Option(help="How many.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    seconds: Annotated[float, typer.Option(help="No new trial after this time.")] = 3600.0,
) -> None:
    """Do the trials and write their record after each."""
    date, began = datetime.datetime.now(datetime.UTC).date().isoformat(), time.monotonic()
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as text:
        steps, noise = np.arange(400), np.random.default_rng(0).normal(size=(400, 3))
        values = np.stack([np.sin(steps / 3), np.cos(steps / 5), np.sin(steps / 7 + 1)], 1) + 0.1 * noise
        frame = pd.DataFrame(values, columns=list("abc"))
        frame.insert(0, "date", pd.date_range("2024-01-01", periods=400, freq="h"))
        frame.to_csv(Path(text, "series.csv"), index=False)
        run = make_run(Path(text, "series.csv"))
        data = SeriesFile(**run.data.args)
        times = []
        for name in ("whole", "again"):
            start = time.monotonic()
            assert ended(begin(run, data, Path(text, name)))
            times.append(time.monotonic() - start)
        truth = result(Path(text, "whole"))
        assert truth == result(Path(text, "again")), "the undisturbed training does not repeat itself"
        record: dict[str, Any] = {
            "command": f"python results/kill_resume.py --trials {trials} --seed {seed} --out {out.name}", "date": date,
            **environment(), "undisturbed seconds": times, "trials": 0, "equal": 0, "kills": 0, "different": [],
            "moments": [],
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"kill_resume_cpu_{date}.json"
        while record["trials"] < trials and time.monotonic() - began < seconds:
            folder = Path(text, "trial")
            kills = trial(run, data, folder, max(times), draw)
            same = result(folder) == truth
            record["trials"] += 1
            record["equal"] += same
            record["kills"] += sum(kill["killed"] for kill in kills)
            record["moments"].append(kills)
            if not same:
                record["different"].append(record["trials"])
            path.write_text(json.dumps(record) + "\n")
            shutil.rmtree(folder)
            if record["trials"] % 20 == 0:
                console.print({key: record[key] for key in ("trials", "equal", "kills")})
    console.print({key: record[key] for key in ("trials", "equal", "kills", "different")}, f"written to {path}")
    if record["equal"] < record["trials"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
