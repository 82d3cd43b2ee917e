"""The load-balancing loss of experts, when several processes share a batch: that of the whole batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from selectra.data.text import TextBatch
from selectra.registry import models
from selectra.spec import Spec
from selectra.tasks import Language
from selectra.train.optim import scale_gradients
from selectra.train.parallel import World, wrap
from selectra.train.sharding import shard, whole
from tests.ops.split import together
from tests.train import texts
from tests.train.processes import spawned

pytestmark = pytest.mark.dist
PARTS = ("loss", "balance", "busiest", "idlest", "nats")
# Of the batch's six rows, those of the second of two processes; without any it is handed the first, which counts not.
SHARES = {"unequal": slice(2, None), "none": slice(6, None)}


def step(world: World, rows: slice) -> dict[str, Tensor]:
    """What the loop makes of one batch: its loss and named parts, and every gradient, in float64."""
    torch.manual_seed(0)
    model: Any = models.build(Spec("jamba_smoke"), {"vocab_size": 40}).double()
    ids = torch.randint(40, (6, 13))
    # Targets that do not count, more of them in the first rows.
    targets = ids[:, 1:].masked_fill(torch.rand(6, 12) < torch.linspace(0.9, 0, 6)[:, None], -100)
    counts = len(ids[rows]) > 0
    share = rows if counts else slice(0, 1)
    if world.sharded:
        shard(model, world)
    wrapped = wrap(model, world)
    # A weight that shows.
    loss = Language(balance=5.0).loss(wrapped, TextBatch(ids[share, :-1], targets[share]))
    loss = (loss if counts else loss.nothing()).shared(world.sum)
    loss.sum.backward()
    found = {name: world.sum(each.detach().double()) for name, each in {"loss": loss.sum, **loss.parts}.items()}
    count = world.sum(loss.count)
    scale_gradients(model, world.size / float(count))
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: each / count for name, each in found.items()}, **grads}


def _one_of_two(kind: str, share: str) -> dict[str, Tensor]:
    rank, second = distributed.get_rank(), SHARES[share]
    return step(World(rank, 2, torch.device("cpu"), kind == "fsdp2"), second if rank else slice(0, second.start))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_balance_and_the_gradients_of_one(kind: str, share: str) -> None:
    alone = step(World(), slice(None))
    assert alone["balance"] > 2
    for found in together(2, _one_of_two, kind, share):
        assert found.keys() == alone.keys()
        for name, wanted in alone.items():
            error = (found[name] - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-6, f"{name}: {error:.1e}"


def numbers(out: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    return {name: [step[name] for step in steps] for name in (*PARTS, "norm")}


def test_a_training_records_the_balance_of_whole_batches(tmp_path: Path) -> None:
    """Of every second batch, of one piece, the second process has none."""
    run = texts.run_of("jamba_smoke", batch_size=89, steps=4)
    texts.train(tmp_path / "one", run)
    assert spawned(2, texts.train, tmp_path / "two", run) == [None, None]
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    for name, values in one.items():
        # Rounding grows from step to step, most of all in gradients; shares' own balance is per cents away.
        assert two[name] == pytest.approx(values, rel=1e-3 if name == "norm" else 1e-5), name
