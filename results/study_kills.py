"""Kill a study with SIGKILL at 20 random moments, and compare its tables with those of an undisturbed one.

python results/study_kills.py FILE.json [SEED]

A small study on noisy sines, trials of optuna with pruning included. Each run is a forked process that is killed after
a random time: one in five before it takes a cell, the others within the time of two cells after that. After each
kill, what was finished must still be there, and at most one cell may have been in flight.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from selectra.compare.conduct import Wish, conduct
from selectra.compare.results import results
from selectra.compare.store import Store
from selectra.compare.study import Study, Tuning, Variant
from selectra.spec import Optim, Run, Spec, Train
from selectra.train.record import environment

KILLS = 20
KEPT = ("val", "test", "score", "history", "pruned", "best_step", "steps", "data_order")


def write_series(path: Path) -> None:
    """Three noisy sines, hourly."""
    steps, noise = np.arange(400), np.random.default_rng(0).normal(size=(400, 3))
    values = np.stack([np.sin(steps / 3), np.cos(steps / 5), np.sin(steps / 7 + 1)], 1) + 0.1 * noise
    frame = pd.DataFrame(values, columns=list("abc"))
    frame.insert(0, "date", pd.date_range("2024-01-01", periods=400, freq="h"))
    frame.to_csv(path, index=False)


def make_study(series: Path) -> Study:
    """Three models, eight trials of each that learns, twelve seeds."""
    base = Run(
        name="waves", model=Spec("naive"), data=Spec("series_file", path=str(series), seq_len=12, horizon=4),
        task=Spec("forecasting"), optim=Optim(lr=1e-2),
        train=Train(steps=12, batch_size=32, eval_every=3, device="cpu"),
    )  # fmt: skip
    variants = (
        Variant(name="tsm2", model=Spec("tsm2_smoke", patch_len=4, stride=2), kind="mamba"),
        Variant(name="dlinear", model=Spec("dlinear", kernel=5), kind="linear"),
        Variant(name="linear", model=Spec("linear"), kind="linear"),
    )
    return Study(
        name="kills", question="Is it the same after 20 kills?", bases=(base,), variants=variants, subject="mamba",
        seeds=12, declared={"optim.lr": "tuned alike"}, tuning=Tuning(ranges={"optim.lr": (1e-3, 1e-1)}, trials=8),
    )  # fmt: skip


def begin(study: Study, path: Path, log: Path, limit: float | None = None) -> int:
    """Do the study in a process of its own, which notes every cell that it takes; the process' number."""
    number = os.fork()
    if number:
        return number
    torch.set_num_threads(1)
    take = Store.take

    def noted(self: Store, *words: Any, **more: Any) -> Any:
        cell = take(self, *words, **more)
        if cell is not None:
            with log.open("a") as file:
                file.write(cell.key + "\n")
        return cell

    Store.take = noted
    conduct(study, Wish(path, device="cpu", time_limit=limit), Console(quiet=True))
    os._exit(0)


def lines(log: Path) -> int:
    """Cells that were taken so far."""
    return len(log.read_text().split()) if log.exists() else 0


def finished(path: Path) -> dict[str, Any]:
    """What every finished cell came to, without its times."""
    if not path.exists():
        return {}
    store = Store(path)
    cells = store.cells()
    store.close()
    return {cell.key: {name: record[name] for name in KEPT if name in record}
            for cell, state, record in cells if state == "done" and record}  # fmt: skip


def tables(path: Path) -> Any:
    """The study's tables and its verdict, without times and costs."""
    store = Store(path)
    content = results(store)
    store.close()
    rows = [{name: row[name] for name in ("base", "variant", "values", "mean", "spread", "interval", "val", "trials",
                                          "pruned", "missing")} for row in content["rows"]]  # fmt: skip
    return {"rows": rows, "overall": content["overall"], "by_base": content["by_base"], "verdict": content["verdict"]}


def main() -> None:
    """Do the trial and write its record."""
    out, seed = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 0
    draw, console = random.Random(seed), Console()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_series(folder / "series.csv")
        study = make_study(folder / "series.csv")
        os.waitpid(begin(study, folder / "killed.sqlite", folder / "killed.log", 0.0), 0)
        torch.set_num_threads(1)
        began = time.monotonic()
        # Here: what is loaded at first use then need not be loaded after every kill.
        conduct(study, Wish(folder / "whole.sqlite", device="cpu"), Console(quiet=True))
        whole, truth = time.monotonic() - began, tables(folder / "whole.sqlite")
        killed, log, moments, kept = folder / "killed.sqlite", folder / "killed.log", [], {}
        while len(moments) < KILLS:
            number, before, started = begin(study, killed, log), lines(log), time.monotonic()
            early = draw.random() < 0.2
            while not early and lines(log) == before:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 1 if early else 2 * whole / len(finished(folder / "whole.sqlite"))))
            moment = time.monotonic() - started
            os.kill(number, signal.SIGKILL)
            _, status = os.waitpid(number, 0)
            now = finished(killed)
            assert os.WIFSIGNALED(status), "it ended before it could be killed"
            assert {key: now[key] for key in kept} == kept, "a finished cell was lost or changed"
            kept = now
            moments.append({"after_seconds": round(moment, 3), "finished": len(now)})
            console.print(moments[-1])
        os.waitpid(begin(study, killed, log), 0)
        taken = Counter(log.read_text().split())
        repeated = sum(count - 1 for count in taken.values())
        record = {
            "command": "python results/study_kills.py FILE",
        "date": datetime.now(UTC).date().isoformat(),
        "what": "a study killed with SIGKILL at random moments, against an undisturbed one", "seed": seed,
            "kills": moments, "undisturbed_seconds": round(whole, 1), "cells": len(finished(killed)),
            "cells_begun_again": repeated, "equal_tables": tables(killed) == truth,
            "equal_records": finished(killed) == finished(folder / "whole.sqlite"), "tables": truth,
            "environment": environment(),
        }  # fmt: skip
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print({name: record[name] for name in ("cells", "cells_begun_again", "equal_tables", "equal_records")})
    if not (record["equal_tables"] and record["equal_records"] and repeated <= KILLS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
