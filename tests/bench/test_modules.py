"""Blocks and models: checked first, timed at equal parameters."""

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from selectra.bench import block, model, modules
from selectra.bench.block_table import block_table, model_table, norms_table, parts_table, ways_table
from selectra.errors import BackendError, ConfigError
from selectra.ops import selective_scan

CPU = torch.device("cpu")
STUDY = block.BlockStudy(32, 16, 1, (5, 8), torch.float32)


def quiet() -> Console:
    return Console(quiet=True)


def test_the_blocks_have_equal_parameters() -> None:
    for d_model in (64, 1024):
        with torch.device("meta"):
            mamba = block.MambaBlocks(d_model)
            n_parameters = sum(p.numel() for p in mamba.parameters())
            transformer = block.TransformerBlock(d_model, 16, n_parameters)
        ratio = sum(p.numel() for p in transformer.parameters()) / n_parameters
        assert ratio == pytest.approx(1, abs=0.02 if d_model == 64 else 0.001)


def test_both_blocks_are_causal() -> None:
    mamba = block.MambaBlocks(16)
    for module in (mamba, block.TransformerBlock(16, 8, sum(p.numel() for p in mamba.parameters()))):
        x = torch.randn(1, 6, 16)
        later = x.clone()
        later[:, 4:] += 1
        assert torch.allclose(module(x)[:, :4], module(later)[:, :4], atol=1e-6)
        assert not torch.allclose(module(x)[:, 4:], module(later)[:, 4:], atol=1e-3)


def test_bench_block_records_both_at_every_length() -> None:
    record = block.bench_block(CPU, 0.0, quiet(), lambda r: None, STUDY)
    assert [(row["L"], row["name"]) for row in record["rows"]] == [
        (length, name) for length in (5, 8) for name in ("mamba", "transformer")
    ]
    assert all(row["forward"]["median"] > 0 < row["training"]["median"] for row in record["rows"])
    assert record["rows"][0]["backends"].keys() == {"selective_scan", "causal_conv1d"}
    assert record["gate"]["mamba"] < modules.AT_MOST
    assert len({line.count("|") for line in block_table(record).splitlines()[:4]}) == 1


def test_the_table_of_blocks_has_the_transformers_time_over_ours() -> None:
    def row(name: str, seconds: float) -> dict[str, Any]:
        times = {"forward": {"median": seconds}, "training": {"median": 3 * seconds}}
        return {"L": 512, "name": name, "parameters": 2_000_000, "peak_bytes": {"training": 2**21}, **times}

    lines = block_table({"rows": [row("mamba", 0.001), row("transformer", 0.002)]}).splitlines()
    assert lines[2] == "| 512 | 1.00 | 2.00 | 2.00 | 3.00 | 6.00 | 2.00 | 2 | 2 |"
    assert lines[-1] == "Parameters, millions: 2.00 and 2.00."


def test_the_table_of_ways_has_what_was_measured() -> None:
    eager = {"forward": {"median": 0.001}, "training": {"median": 0.004}}
    ways = {"forward": {"compiled": {"median": 0.0007}, "graph": {"median": 0.0005}}, "training": {}}
    rows = [{"L": 512, "name": "mamba", **eager, "ways": ways}, {"L": 1024, "name": "mamba", **eager}]
    lines = ways_table({"rows": rows}).splitlines()
    assert lines[2:] == ["| 512 | mamba | 1.00 | 0.70 | 0.50 | 4.00 | - | - |"]
    assert "|" not in ways_table({"rows": rows[1:]})


def test_the_tables_of_parts_and_norms() -> None:
    def row(backward: str, norm: float) -> dict[str, Any]:
        found = {"ms": {"median": norm + 1}, "parts_ms": {"norm": norm, "scan": 1.0, "all": norm + 1}}
        return {"tag": "lm", "backward": backward, "forward": found, "training": found}

    lines = parts_table({"rows": [row("joined", 0.5), row("in place", 0.25)]}).splitlines()
    assert lines[0] == "| part | lm, joined | lm, in place |"
    assert lines[2] == "| norm | 0.500 / 0.500 | 0.250 / 0.250 |"
    assert lines[-1] == "| all, by events | 1.500 / 1.500 | 1.250 / 1.250 |"
    times = {"eager": {"median": 0.2}, "ours": {"median": 0.1}}
    size = {"rows": 16384, "width": 96, "kind": "layer", "stream": "float32"}
    norms = [{**size, "floor": {"forward": 0.05, "training": 0.08}, "forward": times, "training": times}]
    lines = norms_table({"norms": norms}).splitlines()
    assert lines[2] == "| 16,384 x 96 | layer | float32 | 0.200 / 0.200 | 0.100 / 0.100 | 0.050 / 0.080 |"


def test_a_wrong_block_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Any, x: Tensor) -> Tensor:
        # Right on the reference, which is what the float64 copy runs on.
        return x if selective_scan.asked == "reference" else 1.01 * x

    monkeypatch.setattr(block.MambaBlocks, "forward", off)
    with pytest.raises(BackendError, match=r"mamba is wrong, nothing is timed: the .* is off by"):
        block.bench_block(CPU, 0.0, quiet(), lambda r: None, STUDY)


def test_a_module_with_a_wrong_gradient_is_not_timed() -> None:
    class Wrong(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y if selective_scan.asked == "reference" else y.detach() + 1.1 * (y - y.detach())

    subject = modules.Subject(Wrong(3, 2), torch.randn(4, 3), modules.plain)
    with pytest.raises(BackendError, match="the gradient of"):
        modules.check("it", subject)
    assert modules.check("it", modules.Subject(nn.Linear(3, 2), torch.randn(4, 3), modules.plain)) < 1e-5


def test_bench_model_takes_registered_names() -> None:
    record = model.bench_model(CPU, 0.0, quiet(), lambda r: None, "tsm2_smoke,dlinear", batch=2)
    assert [row["name"] for row in record["rows"]] == ["tsm2_smoke", "dlinear_base"]
    assert record["rows"][0]["backends"].keys() >= {"selective_scan"}
    assert all(row["parameters"] > 0 and row["input"] == [2, 96, 7] for row in record["rows"])
    assert "| dlinear_base | 18,624 |" in model_table(record)


@pytest.mark.parametrize(
    ("names", "said"),
    [("tsm3", "there is no model 'tsm3'"), ("naive", "no weights to train by gradient"), (",", "no model is named")],
)
def test_a_model_that_cannot_be_timed_is_refused(names: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        model.bench_model(CPU, 0.0, quiet(), lambda r: None, names)


def test_generators_are_left_as_they_were() -> None:
    before = torch.random.get_rng_state()
    with modules.seeded(3, CPU):
        first = torch.randn(2)
    with modules.seeded(3, CPU):
        assert torch.equal(first, torch.randn(2))
    assert torch.equal(before, torch.random.get_rng_state())
