"""Weights that are gathered in bfloat16: losses, and in which type gradients are summed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, distributed, nn

from selectra.errors import ConfigError
from selectra.spec import Spec
from selectra.train.job import train_job
from selectra.train.parallel import World
from selectra.train.sharding import require_gather, shard, whole
from tests.ops.split import together
from tests.train import texts
from tests.train.processes import spawned

dist = pytest.mark.dist
FILE = Spec("text_file", path="missing.txt", seq_len=16)
# Half a unit in bfloat16's last place, relative.
ROUNDING = 2.0**-9


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


@dist
def test_losses_are_those_of_a_gather_in_float32_within_rounding(tmp_path: Path) -> None:
    found = {}
    for gather in ("float32", "bfloat16"):
        run = texts.run_of(kind="fsdp2", gather=gather, precision="bfloat16")
        assert spawned(2, texts.train, tmp_path / gather, run) == [None, None]
        found[gather] = losses(tmp_path / gather)
    assert len(found["bfloat16"]) == texts.STEPS and found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=2 * ROUNDING)
    assert found["bfloat16"][-1] < found["bfloat16"][0]


def _summed(gather: Any) -> tuple[Tensor, torch.dtype, Tensor]:
    """The gradient of one weight, which is 1 in the first process and 2^-9 in the second; the weight as it is seen."""
    rank, seen = distributed.get_rank(), []

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((2,), 1 + 2.0**-12))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight.detach().clone())
            return (self.weight * x).sum()

    model = Weight()
    shard(model, World(rank, 2, torch.device("cpu"), True), gather)
    model(torch.tensor(2.0**-9 if rank else 1.0)).backward()
    assert model.weight.grad is not None
    return whole(model.weight.grad), seen[0].dtype, whole(model.weight.detach())


@dist
@pytest.mark.parametrize(("gather", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_gradients_are_summed_in_float32(gather: str, dtype: torch.dtype) -> None:
    """The mean over two processes would lose the second's share in bfloat16."""
    for gradient, seen, weight in together(2, _summed, gather):
        assert seen == dtype
        assert gradient.dtype == torch.float32 and gradient.tolist() == [(1 + 2.0**-9) / 2] * 2
        # What the optimizer changes is not rounded.
        assert weight.dtype == torch.float32 and weight.tolist() == [1 + 2.0**-12] * 2


@pytest.mark.parametrize(
    ("kind", "precision", "said"),
    [
        ("ddp", "bfloat16", "parallel.gather=bfloat16 goes with parallel.kind=fsdp2; it is 'ddp'"),
        ("auto", "bfloat16", "it is 'auto'"),
        ("fsdp2", "float32", "parallel.gather=bfloat16 goes with train.precision=bfloat16; it is 'float32'"),
    ],
)
def test_where_it_does_not_go_it_is_refused(kind: str, precision: str, said: str, tmp_path: Path) -> None:
    text = texts.data()
    run = texts.run_of(kind=kind, gather="bfloat16", precision=precision)
    model: Any = texts.models.build(run.model, text.facts)
    with pytest.raises(ConfigError, match=said):
        texts.fit(model, texts.Language(), text.windows("train"), None, run, tmp_path, progress=False)


def test_batch_norms_are_refused() -> None:
    run = texts.run_of(kind="fsdp2", gather="bfloat16", precision="bfloat16")
    require_gather(run, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="Sequential has batch norms, which are of float32"):
        require_gather(run, nn.Sequential(nn.BatchNorm1d(2)))


def test_the_command_line_refuses_before_it_reads_data() -> None:
    with pytest.raises(ConfigError, match="goes with parallel"):
        train_job(texts.run_of(gather="bfloat16").model_copy(update={"data": FILE}), Path("nowhere"), Console())
