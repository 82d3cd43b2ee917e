"""What a training step costs alone on the GPU: time and peak memory against the look-back."""

from typing import Any

import torch

from selectra.compare.forecasting import Budget, cell
from selectra.compare.on_device import OnDevice, Resident
from selectra.compare.worker import build
from selectra.errors import ConfigError

LOOKBACKS = (96, 192, 336, 512, 720)
MEASURED = ("timemachine", "tsm2", "simba_series", "s_mamba", "patchtst", "itransformer", "gru", "dlinear")
STEPS = 60


def measure_costs(device: torch.device, budget: Budget, data: str = "etth1", horizon: int = 96) -> list[dict[str, Any]]:
    """Peak memory of a training step (beside data, weights and optimizer as well as with them), and its time.

    The time is that of the CUDA graph of the whole step, nothing else running; the memory that of an eager step.
    """
    rows = []
    for family in MEASURED:
        for lookback in LOOKBACKS:
            short = Budget(STEPS, budget.batch_size, 1)
            try:
                rows.append({**_measure(device, short, data, horizon, family, lookback)})
            except (ConfigError, torch.OutOfMemoryError) as error:
                rows.append({"model": family, "lookback": lookback, "reason": str(error)})
    return rows


def _measure(
    device: torch.device, budget: Budget, data: str, horizon: int, family: str, lookback: int
) -> dict[str, Any]:  # fmt: skip
    one = cell(data, horizon, family, lookback=lookback, budget=budget, place=0)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    built = build(one)
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        resident = Resident.of(built.parts["train"], device)
        training = OnDevice(
            built.model.to(device), built.task, built.parts, one.run, resident, stream, pool
        )  # fmt: skip
        training.model.train()
        training._step()
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        training._step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        training.number.zero_()
        training.prepare()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        training.step_again()
        began.record()
        for _ in range(STEPS - 10):
            training.step_again()
        ended.record()
        torch.cuda.synchronize(device)
    return {
        "model": family, "size": one.run.model.name, "data": data, "lookback": lookback, "horizon": horizon,
        "batch_size": budget.batch_size, "step_ms": began.elapsed_time(ended) / (STEPS - 10),
        "peak_mb": (peak - before) / 2**20, "activations_mb": (peak - held) / 2**20,
        "parameters": sum(parameter.numel() for parameter in built.model.parameters()),
    }  # fmt: skip
