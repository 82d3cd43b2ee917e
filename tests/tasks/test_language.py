"""The task of the next token: exact sums, the routers' part, and a training from recipe to generated text."""

import json
import math
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

import selectra.models
import selectra.recipes  # noqa: F401
from selectra.data.text import IGNORED, TextBatch
from selectra.errors import ConfigError, DataError
from selectra.language.command import GenerateJob, generate_command
from selectra.layers.moe import balance
from selectra.registry import models, recipes
from selectra.spec import Spec, override
from selectra.tasks.language import Language
from selectra.train.job import train_job


def batch_of(batch: int = 3, length: int = 9) -> TextBatch:
    targets = torch.randint(7, (batch, length))
    targets[0, 3:] = IGNORED
    return TextBatch(torch.randint(7, (batch, length)), targets)


def test_the_loss_is_the_sum_over_targets():
    model, batch = models.build(Spec("gpt_smoke"), {"vocab_size": 7}), batch_of()
    loss = Language().loss(model, batch)
    kept = batch.targets != IGNORED
    wanted = -model(batch.tokens).log_softmax(-1)[kept].gather(1, batch.targets[kept][:, None]).sum()
    assert torch.allclose(loss.sum, wanted) and int(loss.count) == int(kept.sum()) == 21 and not loss.parts
    evaluator = Language().evaluator()
    for part in (slice(0, 1), slice(1, 3)):
        evaluator.update(model, TextBatch(batch.tokens[part], batch.targets[part]))
    metrics = evaluator.compute()
    assert metrics["loss"] == pytest.approx(wanted.item() / 21, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    evaluator.reduce(lambda sums: [sums, sums])
    assert evaluator.compute() == pytest.approx(metrics)


def test_experts_are_kept_in_balance_and_their_use_is_told():
    model, batch = models.build(Spec("jamba_smoke"), {"vocab_size": 7}), batch_of()
    plain, loss = Language(balance=0.0).loss(model, batch), Language(balance=0.5).loss(model, batch)
    found = balance(model(batch.tokens, routers=True).router_logits, 2)
    assert torch.allclose(loss.sum - plain.sum, 0.5 * found.loss * 21, rtol=1e-4)
    per_target = {name: value.item() / 21 for name, value in loss.parts.items()}
    assert per_target["balance"] == pytest.approx(found.loss.item())
    assert per_target["busiest"] == pytest.approx(4 * found.use.max().item())
    assert 0 <= per_target["idlest"] <= 1 <= per_target["busiest"]
    assert per_target["nats"] == pytest.approx(F.cross_entropy(
        model(batch.tokens).flatten(0, 1), batch.targets.flatten()).item())  # fmt: skip
    with pytest.raises(ConfigError, match="balance=-1"):
        Language(balance=-1)


def test_a_recipe_trains_and_its_model_writes(data_folder, tmp_path):
    run = recipes.build(Spec("shakespeare"))
    changes = ["model=jamba_smoke", "data.seq_len=16", "train.steps=3", "train.batch_size=2", "train.threads=1"]
    run = override(run, changes)
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 20)
    run = run.model_copy(
        update={"data": Spec("text_file", path=str(tmp_path / "a.txt"), seq_len=16, tokenizer="characters")}
    )
    fitted = train_job(run, tmp_path / "out", Console(quiet=True))
    assert fitted.steps == 3 and math.isfinite(fitted.best["loss"])
    steps = [json.loads(line) for line in (tmp_path / "out" / "record.jsonl").read_text().splitlines()]
    assert all({"nats", "balance", "busiest", "idlest"} <= e.keys() for e in steps if e["event"] == "step")
    job = GenerateJob(tmp_path / "out" / "pretrained", ("to be",), max_new_tokens=9)
    (text,) = generate_command(job, Console(quiet=True))
    assert len(text) == 9 and set(text) <= set((tmp_path / "a.txt").read_text())
    # What cannot be is said before anything is shown.
    cases: Any = (({"graphed": True}, "a CUDA graph needs it on a GPU"), ({"prompts": ("",)}, "is empty"))
    for changes, message in cases:
        console = Console(record=True, quiet=False, file=StringIO())
        with pytest.raises((ConfigError, DataError), match=message):
            generate_command(replace(job, **changes), console)
        assert console.export_text() == ""


def test_a_model_that_has_no_layout_is_trained_all_the_same(data_folder, tmp_path):
    """And it is said before the training, not in place of its result."""
    run = override(recipes.build(Spec("shakespeare_small")), [
        "model=mamba_lm_smoke", "model.norm=layer", "data.seq_len=16", "train.steps=2", "train.batch_size=2",
        "train.eval_every=2", "train.threads=1", "train.device=cpu",
    ])  # fmt: skip
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 20)
    run = run.model_copy(update={"data": Spec("text_file", path=str(tmp_path / "a.txt"), seq_len=16)})
    console = Console(record=True, file=StringIO(), width=200)
    assert train_job(run, tmp_path / "out", console).steps == 2
    assert "no folder 'pretrained' for `selectra generate`: Hugging Face's Mamba has RMS" in console.export_text()
    assert not (tmp_path / "out" / "pretrained").exists()
