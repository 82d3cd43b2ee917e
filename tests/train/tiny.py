"""A training that takes a second, importable by tests and runnable as a process of its own."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectra.data.windows import Windows
from selectra.spec import Optim, Parallel, Run, Spec, Train
from selectra.tasks import Forecasting
from selectra.train.loop import Fitted, fit
from selectra.train.parallel import joined

SEQ_LEN, HORIZON, N_SERIES = 12, 4, 2


class TinyModel(nn.Module):
    """A linear forecaster with dropout, so that the random state matters."""

    def __init__(self, dropout: float = 0.1, pause: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SEQ_LEN)
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(SEQ_LEN, HORIZON)
        self.pause = pause

    def forward(self, x: Tensor, *, observed: Tensor | None = None, **_: Any) -> Tensor:
        time.sleep(self.pause)
        return self.proj(self.dropout(self.norm(x.transpose(1, 2)))).transpose(1, 2)


class TinySolved(nn.Module):
    """Forecasts the mean of the training targets, found without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.seen = 0

    def solve(self, batches: Any) -> None:
        total, count = 0.0, 0
        for batch in batches:
            total, count, self.seen = total + batch.y.sum().item(), count + batch.y.numel(), self.seen + len(batch)
        self.mean.data.fill_(total / count)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.mean.expand(len(x), HORIZON, x.shape[2])


class TinyNaive(nn.Module):
    """Repeats the last value."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x[:, -1:].expand(-1, HORIZON, -1)


def windows(count: int, first: int = 0) -> Windows:
    """Windows on two noisy sines with gaps."""
    rows = np.arange(first, first + count + SEQ_LEN + HORIZON)
    noise = np.random.RandomState(0).randn(4000, N_SERIES)[rows]
    values = np.stack([np.sin(rows / 3), np.cos(rows / 5)], 1) + 0.1 * noise
    observed = np.random.RandomState(1).rand(4000, N_SERIES)[rows] > 0.1
    arrays = np.where(observed, values, 0.0).astype(np.float32), observed
    return Windows(*arrays, first=0, count=count, seq_len=SEQ_LEN, horizon=HORIZON)


def make_run(**train: Any) -> Run:
    """A run of twelve steps, three passes, with an evaluation after every fourth."""
    settings: dict[str, Any] = {"steps": 12, "batch_size": 16, "eval_every": 4, "device": "cpu", **train}
    spec = Spec("tiny")
    optim = Optim(lr=1e-2, warmup_steps=3)
    return Run(model=spec, data=spec, task=spec, optim=optim, train=Train(**settings), name="tiny")


def train(out: Path | None, *, dropout: float = 0.1, pause: float = 0.0, **settings: Any) -> tuple[TinyModel, Fitted]:
    """Train the tiny model on 64 windows, in one thread: the order of sums shows in the last digits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TinyModel(dropout, pause)
    with joined(Parallel(timeout=60), "cpu") as world:
        run = make_run(**settings)
        fitted = fit(model, Forecasting(), windows(64), windows(30, 64), run, out, progress=False, world=world)
    return model, fitted


if __name__ == "__main__":
    # The folder, seconds of pause in a forward pass, the dropout rate.
    train(Path(sys.argv[1]), pause=float(sys.argv[2]), dropout=float(sys.argv[3]))
