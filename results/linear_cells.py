"""The closed-form linear model and the naive ones on the public sets, every test window, beside the known figures.

    python results/linear_cells.py results/linear-cells-2026-11-22.jsonl

appends the cells that the file does not hold yet (all of them take a quarter of an hour on one idle core), and prints
the table. The sets are found as `selectra forecast` finds them. The known figures were computed independently of this
package, with the same files: MSE and MAE of standardised values, three digits.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from selectra.data.series import SeriesFile
from selectra.errors import DataError
from selectra.forecaster.scoring import build_model, build_task, in_batches, score
from selectra.spec import Run, Spec

HORIZONS = (96, 192, 336, 720)
# By model, look-back and set: (MSE, MAE) of each horizon.
KNOWN = {
    ("naive", 96): {
        "ETTh1": "1.294/.713 1.325/.733 1.330/.746 1.335/.755",
        "ETTh2": ".432/.422 .534/.473 .597/.511 .594/.519",
        "ETTm1": "1.214/.665 1.261/.690 1.287/.707 1.322/.729",
        "ETTm2": ".266/.328 .340/.371 .412/.410 .522/.466",
        "Exchange": ".081/.196 .167/.289 .306/.398 .810/.676",
        "Weather": ".259/.254 .309/.292 .376/.338 .465/.394",
    },
    ("seasonal_naive", 96): {
        "ETTh1": ".512/.433 .581/.469 .650/.501 .655/.514",
        "ETTh2": ".391/.380 .482/.429 .532/.466 .525/.474",
        "ETTm1": ".423/.387 .463/.406 .496/.426 .574/.464",
        "ETTm2": ".263/.301 .321/.337 .376/.370 .471/.422",
        "Exchange": ".086/.205 .173/.295 .312/.403 .819/.681",
    },
    ("linear", 96): {
        "ETTh1": ".383/.392 .434/.421 .476/.443 .470/.462",
        "ETTh2": ".289/.338 .374/.390 .413/.425 .419/.442",
        "ETTm1": ".351/.371 .389/.390 .422/.412 .483/.446",
        "ETTm2": ".182/.265 .246/.304 .307/.342 .407/.398",
        "Exchange": ".083/.199 .175/.295 .330/.414 .919/.725",
        "Weather": ".196/.235 .241/.271 .293/.308 .366/.355",
    },
    ("linear", 336): {
        "ETTh1": ".370/.392 .403/.411 .428/.426 .434/.450",
        "ETTh2": ".273/.335 .334/.376 .359/.400 .393/.435",
        "ETTm1": ".305/.348 .340/.369 .376/.389 .431/.420",
        "ETTm2": ".171/.261 .229/.302 .286/.340 .381/.396",
        "Exchange": ".086/.202 .180/.299 .339/.420 .985/.745",
        "Weather": ".175/.224 .219/.261 .266/.296 .335/.345",
    },
    ("linear", 512): {
        "ETTh1": ".367/.391 .401/.412 .427/.428 .440/.455",
        "ETTh2": ".269/.335 .329/.375 .356/.401 .390/.437",
        "ETTm1": ".310/.353 .342/.372 .372/.389 .427/.419",
        "ETTm2": ".172/.263 .231/.304 .288/.343 .377/.398",
        "Exchange": ".086/.203 .182/.300 .352/.425 1.059/.769",
        "Weather": ".171/.223 .215/.261 .261/.296 .327/.343",
    },
}
Cell = tuple[str, int, str, int]


def known() -> dict[Cell, tuple[float, float]]:
    """(MSE, MAE) by model, look-back, set and horizon."""
    cells = {}
    for (model, lookback), sets in KNOWN.items():
        for name, row in sets.items():
            for horizon, cell in zip(HORIZONS, row.split(), strict=True):
                mse, mae = map(float, cell.split("/"))
                cells[model, lookback, name, horizon] = (mse, mae)
    return cells


def measure(model: str, lookback: int, name: str, horizon: int, batch_size: int = 256) -> dict[str, float]:
    """Metrics of one cell, and the number of its windows."""
    data = SeriesFile(name, seq_len=lookback, horizon=horizon)
    built = build_model(Spec(model), data, seed=0)
    solve = getattr(built, "solve", None)
    if solve is not None:
        solve(in_batches(data.windows("train"), batch_size))
    task = build_task(Run(model=Spec(model), data=Spec("series_file"), task=Spec("forecasting")), data)
    return {**score(built, task, data, batch_size).metrics, "windows": len(data.windows("test"))}


def read(path: Path) -> dict[Cell, dict[str, Any]]:
    """The cells that a record holds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(each["model"], each["lookback"], each["data"], each["horizon"]): each for each in lines}


def main(path: Path) -> None:
    """Measure what is missing, and print everything."""
    torch.set_num_threads(1)
    there, write = read(path), sys.stdout.write
    for cell, (mse, mae) in known().items():
        if cell not in there:
            try:
                metrics = measure(*cell)
            except DataError as error:
                write(f"{cell}: {error}\n")
                continue
            there[cell] = dict(zip(("model", "lookback", "data", "horizon"), cell, strict=True)) | metrics
            with path.open("a") as file:
                file.write(json.dumps(there[cell]) + "\n")
        found = there[cell]
        worst = max(abs(found["mse"] - mse), abs(found["mae"] - mae))
        mark = "" if worst <= 0.002 else "  <- deviates"
        write(f"{cell!s:42} {found['mse']:.4f} {mse:.3f}   {found['mae']:.4f} {mae:.3f}   {worst:.4f}{mark}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
