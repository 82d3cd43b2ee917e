"""TimeMachine's official code against ours: the same training of both, and what each forecasts on every test window.

    python results/timemachine_official.py --timemachine TimeMachine --out results

TimeMachine is a checkout of Atik-Ahamed/TimeMachine; its model class is imported as it is, under `selectra.compat`,
whose kernels give what mamba_ssm's give (output and gradients of this class within 1.5e-7: `compat_gpu_*.json`).

Both sides start from the official class's initial weights of a seed and see the same windows in the same order, with
the sizes, batch, optimizer and learning rates of the official scripts: Adam at 0.001 without decay or clipping, times
0.9 after every epoch from the fourth on. The weights of the best epoch on validation are kept. What is not theirs: the
test part is counted whole, where their loader drops the last windows (both are given), a pass's last batch is not
dropped in training, and there are fewer epochs than their 100: the record says in which one each side was best.
"""

import gc
import json
import re
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from selectra.compare.cells import Cell
from selectra.compare.on_device import OnDevice, Resident
from selectra.compare.worker import Built, build
from selectra.compat.packages import MODULES
from selectra.compat.stand_in import StandIn
from selectra.models.timemachine import SIZES
from selectra.spec import Optim, Run, Spec, Train
from selectra.train.record import environment

THEIRS, OURS = "official", "selectra"
LOOKBACK, BATCH, RATE = 96, 512, 1e-3
FILES = {"etth1": "ETTh1.csv.gz", "etth2": "ETTh2.csv.gz"}
console = Console(width=140)


@dataclass(frozen=True)
class Case:
    """One training of each side."""

    data: str
    horizon: int
    seed: int


class Theirs(nn.Module):
    """The official class with the arguments of a series model here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, **_nothing: Any) -> Tensor:
        """The forecast."""
        return self.model(x)


def main(
    timemachine: Annotated[Path, typer.Option(help="A checkout of Atik-Ahamed/TimeMachine.")],
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("results"),
    data: Annotated[Path, typer.Option(help="Folder of ETTh1.csv.gz and ETTh2.csv.gz.")] = Path("data/ett-small"),
    epochs: Annotated[int, typer.Option(help="Passes over the training windows.")] = 20,
    sets: Annotated[str, typer.Option(help="Data sets.")] = "etth1,etth2",
    horizons: Annotated[str, typer.Option(help="In this order.")] = "96,336,192,720",
    seeds: Annotated[str, typer.Option(help="In this order; 2024 is the official one.")] = "2024",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    time_limit: Annotated[float, typer.Option(help="Seconds after which no training is begun.")] = 1e9,
    batch_size: Annotated[int, typer.Option(help="Windows in a step; 512 is the official one.")] = BATCH,
) -> None:
    """Train both sides of every case, print their errors, and write the record after each.

    Cases that the record holds already are not done again.
    """
    official = official_class(timemachine)
    where, began = torch.device(device), time.monotonic()
    name = torch.cuda.get_device_name() if where.type == "cuda" else "cpu"
    options = f"--sets {sets} --horizons {horizons} --epochs {epochs} --seeds {seeds} --batch-size {batch_size}"
    record: dict[str, Any] = {
        "command": f"python results/timemachine_official.py --timemachine TimeMachine {options} --device {device}",
        "device": name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **environment(),
        "training": {
            "batch_size": batch_size, "epochs": epochs, "optimizer": "Adam", "learning_rates": rates_of(epochs)
        },
        "cases": [],
    }  # fmt: skip
    path = out / f"timemachine_official_{re.sub(r'[^a-z0-9]+', '_', name.lower())}_{record['date']}.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["training"] != record["training"]:
            raise typer.BadParameter(f"{path} holds another training; take it away")
        record["cases"] = before["cases"]
    done = {Case(row["data"], row["horizon"], row["seed"]) for row in record["cases"]}
    cases = [
        Case(each, int(horizon), int(seed))
        for seed in seeds.split(",")
        for horizon in horizons.split(",")
        for each in sets.split(",")
    ]
    for case in cases:
        if case in done:
            continue
        if time.monotonic() - began > time_limit:
            console.print(f"{case}: not begun, the time is over")
            continue
        record["cases"].append(compare(case, official, data, epochs, batch_size, where))
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(line_of(record["cases"][-1]))


def official_class(folder: Path) -> Any:
    """The official `Model`, over the stand-ins of mamba_ssm."""
    finder = StandIn(MODULES)
    sys.path.insert(0, str(folder / "TimeMachine_supervised"))
    finder.enter()
    try:
        return __import__("models.TimeMachine", fromlist=["Model"]).Model
    finally:
        finder.leave()


def rates_of(epochs: int) -> list[float]:
    """The official learning rate of each epoch, as `adjust_learning_rate` sets it after the one before ("type3")."""
    return [RATE * (1.0 if after < 3 else 0.9 ** (after - 3)) for after in range(epochs)]


def run_of(case: Case, data: Path, epochs: int, batch_size: int) -> Run:
    """Our size of the case, to be trained as the official script does."""
    return Run(
        model=Spec(f"timemachine_{case.data}_{case.horizon}"),
        data=Spec(
            "series_file", path=str((data / FILES[case.data]).resolve()), seq_len=LOOKBACK, horizon=case.horizon,
            split="ett",
        ),
        task=Spec("forecasting", loss="mse"),
        optim=Optim(lr=RATE, weight_decay=0.0, schedule="constant", clip=None),
        train=Train(epochs=epochs, batch_size=batch_size, seed=case.seed),
    )  # fmt: skip


def both_sides(case: Case, official: Any, built: Built) -> dict[str, nn.Module]:
    """The two models with the same weights."""
    size = SIZES[f"{case.data}_{case.horizon}"]
    config = SimpleNamespace(
        seq_len=LOOKBACK, pred_len=case.horizon, enc_in=len(built.data.names), n1=size["n1"], n2=size["n2"],
        dropout=size["dropout"], revin=1, ch_ind=1, residual=1, d_state=256, dconv=2, e_fact=1,
    )  # fmt: skip
    torch.manual_seed(case.seed)
    theirs = official(config)
    state = {key.replace("revin_layer.affine_", "revin."): value for key, value in theirs.state_dict().items()}
    built.model.load_state_dict(state)
    return {THEIRS: Theirs(theirs), OURS: built.model}


def compare(
    case: Case, official: Any, data: Path, epochs: int, batch_size: int, device: torch.device
) -> dict[str, Any]:  # fmt: skip
    """Train both and measure both."""
    run = run_of(case, data, epochs, batch_size)
    built = build(Cell(run, 0, {}))
    per_epoch = ceil(len(built.parts["train"]) / batch_size)
    run = run.model_copy(update={"train": run.train.model_copy(update={"eval_every": per_epoch})})
    resident = Resident.of(built.parts["train"], device)
    size = SIZES[f"{case.data}_{case.horizon}"]
    row: dict[str, Any] = {"data": case.data, "horizon": case.horizon, "seed": case.seed}
    row["scales"] = [size["n1"], size["n2"]]
    for side, model in both_sides(case, official, built).items():
        row[side] = trained(model.to(device), built, run, resident)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    row["difference, per cent"] = 100 * (row[OURS]["test"]["mse"] / row[THEIRS]["test"]["mse"] - 1)
    return row


def trained(model: nn.Module, built: Built, run: Run, resident: Resident) -> dict[str, Any]:
    """Train one side; its errors on validation and test."""
    device, began = resident.values.device, time.monotonic()
    training = OnDevice(model, built.task, built.parts, run, resident)
    rates = torch.tensor(rates_of(training.steps // training.eval_every), device=device)
    training.rate_table = rates.repeat_interleave(training.eval_every)
    assert len(training.rate_table) == training.steps
    training.prepare()
    # Steps after the first draw dropout from the usual generator: the same numbers for both sides.
    torch.manual_seed(run.train.seed)
    while training.advance():
        pass
    training.finish()
    outcome = training.outcome()
    kept = len(built.parts["test"]) // run.train.batch_size * run.train.batch_size
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "val": outcome.val,
        "test": outcome.test,
        f"test mse of the {kept} windows that the official loader keeps": mse_of(model, training, kept),
        "best epoch": outcome.best_step // training.eval_every,
        "val mse by epoch": [each["mse"] for each in outcome.history],
        "seconds": round(time.monotonic() - began, 2),
    }


@torch.no_grad()
def mse_of(model: nn.Module, training: OnDevice, count: int, piece: int = 128) -> float:
    """The mean squared error on the first test windows."""
    windows, total = training.parts["test"], 0.0
    model.eval()
    for start in range(0, count, piece):
        starts = torch.arange(start, min(count, start + piece), device=training.device) + windows.first
        batch = training.resident.batch(starts, starts >= 0, training.in_window, training.seq_len)
        assert batch.y is not None
        total += (model(batch.x) - batch.y).double().square().sum().item()
    return total / (count * windows.horizon * windows.values.shape[1])


def line_of(row: dict[str, Any]) -> str:
    """For the terminal."""
    sides = ", ".join(
        f"{side} {row[side]['test']['mse']:.4f} (epoch {row[side]['best epoch']}, {row[side]['seconds']:.0f} s)"
        for side in (THEIRS, OURS)
    )
    case = f"{row['data']} {row['horizon']} seed {row['seed']}"
    return f"{case}: {sides}, difference {row['difference, per cent']:+.2f} %"


if __name__ == "__main__":
    typer.run(main)
