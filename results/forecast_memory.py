"""Memory and seconds of fit and predict on many series.

    OMP_NUM_THREADS=2 python results/forecast_memory.py --model tsm2 --series 1000 --rows 1000

One long frame of text, stamps and floats, as a user has it; peaks are of the whole process, the frame and the libraries
included, from the kernel's own count (Linux). Each line of the record is one run of this script.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from selectra import Forecaster
from selectra.train.record import environment

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def frame_of(series: int, rows: int) -> pd.DataFrame:
    """Seasonal series of many scales with noise."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 2, series))[:, None]
    y = scale * (np.sin(np.arange(rows) * 2 * np.pi / 24) + rng.normal(0, 0.3, (series, rows)).astype(np.float32))
    return pd.DataFrame(
        {
            "unique_id": np.repeat([f"series {i}" for i in range(series)], rows),
            "ds": np.tile(pd.date_range("2024-01-01", periods=rows, freq="h"), series),
            "y": y.ravel(),
        }
    )


def megabytes(what: str) -> int:
    """VmRSS, or VmHWM, the peak since it was last set back."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) // 1000


def measured(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds and the peak of the process during the call."""
    PEAK.write_text("5")
    began = time.monotonic()
    result = call()
    return {"seconds": round(time.monotonic() - began, 1), "peak MB": megabytes("VmHWM")}, result


def main(
    model: Annotated[str, typer.Option(help="A registered name.")] = "tsm2",
    series: Annotated[int, typer.Option(help="Series of the frame.")] = 1000,
    rows: Annotated[int, typer.Option(help="Rows of each.")] = 1000,
    h: Annotated[int, typer.Option("--horizon", help="Rows to forecast.")] = 24,
    steps: Annotated[int, typer.Option(help="Most training steps.")] = 100,
    level: Annotated[bool, typer.Option(help="Calibrate intervals of 80 and 95 %.")] = True,
    out: Annotated[Path | None, typer.Option(help="File that gets a line.")] = None,
) -> None:
    """Fit, predict from what fit kept, predict from a whole frame; print, and add a line to the record."""
    frame = frame_of(series, rows)
    start = megabytes("VmRSS")
    forecaster = Forecaster(model=model, h=h, level=[80, 95] if level else None, train_args={"max_steps": steps})
    fit, _ = measured(lambda: forecaster.fit(frame))
    predict, found = measured(forecaster.predict)
    again, same = measured(lambda: forecaster.predict(frame))
    assert len(found) == series * h and np.isfinite(found[model]).all() and np.allclose(found[model], same[model])
    line = {
        "command": f"python results/forecast_memory.py --model {model} --series {series} --rows {rows} "
        f"--horizon {h} --steps {steps} {'' if level else '--no-level'}".strip(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "process with the frame, MB": start,
        "fit": fit,
        "predict": predict,
        "predict from the frame": again,
        "threads": torch.get_num_threads(),
        **environment(),
    }
    typer.echo(json.dumps({key: line[key] for key in list(line)[:6]}))
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    typer.run(main)
