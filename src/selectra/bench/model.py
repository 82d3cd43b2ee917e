"""`selectra bench model`: registered models, forward and training step, parameters and peak memory."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn

import selectra.models  # noqa: F401
from selectra.bench.block_table import model_table
from selectra.bench.modules import Subject, check, measure, plain, seeded
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.record import environment

SEED = 0
BATCH, SMALL_BATCH = 32, 2
TEST_SIZE = "smoke"
# What models of a kind are built with, and the shape of one input beside the batch.
FACTS: dict[str, dict[str, Any]] = {"series": {"seq_len": 96, "horizon": 96, "n_series": 7, "season": 24}}
INPUTS: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    "series": lambda facts: (facts["seq_len"], facts["n_series"])
}


def bench_model(
    device: torch.device,
    seconds: float,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    names: str | None = None,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Check, then time forward and training step of models; returns the record.

    Args:
        names: Registered names, separated by commas; without, every model that has weights to train and can be built
            from example facts.

    Raises:
        BackendError: A model is wrong; nothing is timed then.
        ConfigError: A name is unknown, or its model cannot be timed.
    """
    chosen = _all_names() if names is None else [_known(name.strip()) for name in names.split(",") if name.strip()]
    if not chosen:
        raise ConfigError(f"no model is named; there are {models.names()}.")
    gate = {name: check(name, _subject(name, SMALL_BATCH, device, evaluating=True)) for name in chosen}
    record: dict[str, Any] = {
        "benchmark": "model",
        "what": f"float32, batch {batch}, eager, wall clock",
        "environment": environment(),
        "device": str(device),
        "seeds": {"weights and inputs": SEED},
        "seconds for each measurement": seconds,
        "facts": {kind: FACTS[kind] for kind in {models.entry(name).kind for name in chosen}},
        "batch": batch,
        "gate": gate,
        "rows": [],
    }
    for name in chosen:
        record["rows"] += measure({name: _subject(name, batch, device)}, seconds, device)
        save(record)
    console.print(model_table(record), highlight=False, soft_wrap=True)
    return record


def _all_names() -> list[str]:
    names = [n for n in models.names() if models.entry(n).kind in FACTS and models.entry(n).size != TEST_SIZE]
    return [name for name in names if _trainable(_build(name))]


def _known(name: str) -> str:
    found = models.entry(name)
    if found.kind not in FACTS:
        raise ConfigError(f"'{name}' is a model of kind '{found.kind}'; models that can be timed are of {list(FACTS)}.")
    if not _trainable(_build(found.name)):
        raise ConfigError(f"'{name}' has no weights to train by gradient; there are {_all_names()}.")
    return found.name


def _build(name: str) -> nn.Module:
    module = models.build(Spec(name), FACTS[models.entry(name).kind])
    assert isinstance(module, nn.Module)
    return module


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _subject(name: str, batch: int, device: torch.device, evaluating: bool = False) -> Subject:
    kind = models.entry(name).kind
    with seeded(SEED, device):
        module = _build(name).to(device)
        x = torch.randn(batch, *INPUTS[kind](FACTS[kind]), device=device)
    # Dropout would make two runs differ.
    return Subject(module.eval() if evaluating else module, x, plain)
