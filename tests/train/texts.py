"""Small trainings of language models, in one process and in several."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from selectra import models as _models  # noqa: F401
from selectra.data.text import TokenData
from selectra.language.tokens import Bytes
from selectra.registry import models
from selectra.spec import Optim, Parallel, Run, Spec, Train
from selectra.tasks import Language
from selectra.train.loop import fit
from selectra.train.parallel import joined

SEQ_LEN, STEPS = 17, 6


def data() -> TokenData:
    """Tokens of which the next one is often the same."""
    ids = np.random.RandomState(0).randint(0, 7, 900).repeat(2).astype(np.int32)
    return TokenData(ids, np.array([0]), Bytes(), SEQ_LEN, (0.8, 0.2, 0.0), packed=False)


def run_of(name: str = "mamba_lm_smoke", kind: Any = "auto", gather: Any = "float32", **train: Any) -> Run:
    """Six steps of nine pieces."""
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 9, "eval_every": STEPS, "device": "cpu", **train}
    return Run(
        model=Spec(name), data=Spec("text"), task=Spec("language"), optim=Optim(lr=1e-2), train=Train(**settings),
        parallel=Parallel(kind=kind, gather=gather, timeout=60), name="texts",
    )  # fmt: skip


def train(out: Path, run: Run) -> None:
    """Train in this process, one of several or alone."""
    torch.set_num_threads(1)
    text = data()
    with joined(run.parallel, "cpu") as world:
        torch.manual_seed(0)
        model: Any = models.build(run.model, text.facts)
        fit(model, Language(), text.windows("train"), text.windows("val"), run, out, progress=False, world=world)
