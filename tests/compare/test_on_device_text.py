"""The training of a language model that stays on the device comes to what the loop comes to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.compare.cells import Cell
from selectra.compare.conduct import Wish, conduct
from selectra.compare.on_device_text import TextOnDevice
from selectra.compare.results import results
from selectra.compare.store import Store
from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.compare.worker import PARTS, build
from selectra.data.held_text import held_split, hold
from selectra.errors import ConfigError
from selectra.spec import Optim, Run, Spec, Train
from selectra.train.evaluation import evaluate
from selectra.train.loop import fit
from selectra.train.parallel import World

CPU = torch.device("cpu")
TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(1, 30) for j in range(1, 12))
MODELS = ("gpt_smoke", "mamba_lm_smoke", "jamba_smoke", "rwkv_smoke", "retnet_smoke", "hyena_smoke")


def write(folder: Path) -> str:
    path = folder / "tables.txt"
    path.write_text(TEXT)
    return str(path)


def make_run(model: Spec, data: Spec, **train: Any) -> Run:
    usual = {"steps": 10, "batch_size": 12, "eval_every": 4, "device": "cpu", "seed": 3}
    return Run(
        model=model, data=data, task=Spec("language"), optim=Optim(lr=3e-3, warmup_steps=2),
        train=Train(**{**usual, **train}), name=model.name,
    )  # fmt: skip


def on_device(run: Run, device: torch.device = CPU) -> tuple[Any, TextOnDevice]:
    built = build(Cell(run, 0, {}))
    splits = {part: held_split(built.data, part) for part in PARTS}
    graphed = device.type == "cuda"
    stream, pool = (torch.cuda.Stream(device), torch.cuda.graph_pool_handle()) if graphed else (None, None)
    held = hold(built.data, device)
    training = TextOnDevice(built.model.to(device), built.task, held, splits, run, stream, pool)
    training.prepare()
    while training.advance():
        pass
    training.finish()
    return built, training


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_loop(name: str, tmp_path: Path) -> None:
    # 96 training pieces: two passes of eight batches, and the last evaluation pieces are shorter.
    data = Spec("text_file", path=write(tmp_path), tokenizer="characters", seq_len=40, shares=(0.55, 0.25, 0.2))
    run = make_run(Spec(name), data)
    built, world = build(Cell(run, 0, {})), World(device=CPU)
    n = len(built.parts["train"])
    run = run.model_copy(
        update={"train": run.train.model_copy(update={"batch_size": n // 8 if n % 8 == 0 else n // 7})}
    )
    assert n % run.train.batch_size == 0 and len(built.parts["val"].ids) % 40
    fitted = fit(
        built.model, built.task, built.parts["train"], built.parts["val"], run, progress=False, world=world
    )  # fmt: skip
    test = evaluate(built.model, built.task, built.parts["test"], 5, world)
    _, training = on_device(run)
    outcome = training.outcome()
    assert outcome.best_step == fitted.best_step and outcome.steps == 10 and len(outcome.history) == 3
    # A choice between experts of nearly equal weight may fall otherwise by rounding, and turn a token or two of 1,448.
    rel = 3e-3 if name == "jamba_smoke" else 2e-5
    assert outcome.val == pytest.approx(fitted.best, rel=rel)
    assert outcome.test == pytest.approx(test, rel=rel)
    # The best weights came last: the text is far from learned.
    assert outcome.more["last"]["test"] == pytest.approx(outcome.test)
    both = sum(outcome.more["last"][part]["loss"] * targets(built, part) for part in ("val", "test"))
    assert outcome.more["held_out"]["best"]["loss"] == pytest.approx(
        both / sum(targets(built, p) for p in ("val", "test"))
    )


def targets(built: Any, part: str) -> int:
    return len(built.parts[part].ids) - 1


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    data = Spec("text_file", path=write(tmp_path), seq_len=32)
    run = make_run(Spec("gpt_smoke"), data, steps=6, eval_every=2)
    # So large a rate that the model gets worse from the first evaluation on, several times, whatever rounding does.
    run = run.model_copy(update={"optim": Optim(lr=10.0, schedule="constant", warmup_steps=4)})
    built, training = on_device(run)
    outcome = training.outcome()
    assert outcome.best_step < 6
    assert outcome.val["loss"] == pytest.approx(min(each["loss"] for each in outcome.history))
    assert outcome.more["last"]["val"]["loss"] == pytest.approx(outcome.history[-1]["loss"])
    found = evaluate(built.model, built.task, built.parts["val"], 3, World(device=CPU))
    assert found["loss"] == pytest.approx(outcome.val["loss"])


@pytest.mark.parametrize(
    "data",
    [Spec("copying", length=5, examples=60, held_out=20), Spec("recall", pairs=3, keys=8, examples=60, held_out=20)],
    ids=lambda spec: spec.name,
)
def test_generated_examples_are_held_as_they_are_read(data: Spec) -> None:
    built = build(Cell(make_run(Spec("mamba_lm_smoke"), data), 0, {}))
    held = hold(built.data, CPU)
    for part in PARTS:
        split, windows = held_split(built.data, part), built.parts[part]
        batch, wanted = held.batch(split.first + torch.arange(7), torch.tensor(split.end)), windows[list(range(7))]
        assert torch.equal(batch.tokens, wanted.tokens) and torch.equal(batch.targets, wanted.targets)
        behind = held.batch(torch.tensor([split.end - 1, split.end]), torch.tensor(split.end))
        assert (behind.targets[0] != -100).any() and (behind.targets[1] == -100).all()
    _, training = on_device(make_run(Spec("mamba_lm_smoke"), data))
    found = evaluate(training.model, built.task, built.parts["test"], 3, World(device=CPU))
    assert training.outcome().test == pytest.approx(found, rel=1e-5)


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    path = write(tmp_path)
    for data, train, words in (
        ({}, {"steps": None, "epochs": 1}, "train.steps"),
        ({}, {"accumulate": 2}, "train.accumulate"),
        ({"packed": True}, {}, "packed"),
        ({"shares": (1.0, 0.0, 0.0)}, {}, "no validation part"),
    ):
        with pytest.raises(ConfigError, match=words):
            on_device(make_run(Spec("gpt_smoke"), Spec("text_file", path=path, seq_len=32, **data), **train))


def test_a_study_of_language_models(tmp_path: Path) -> None:
    """Matched, tried, trained and told, by the loop on a CPU."""
    data = Spec("text_file", path=write(tmp_path), tokenizer="characters", seq_len=24)
    base = make_run(Spec("gpt_smoke"), data, steps=4, eval_every=2).model_copy(update={"name": "tables"})
    study = Study(
        name="small", question="Which reads best?", bases=(base,), subject="mamba", metric="loss",
        variants=(Variant(name="gpt", model=Spec("gpt", d_model=16, depth=1, n_heads=2, d_ff=40)),
                  Variant(name="mamba", model=Spec("mamba_lm", d_model=16, depth=1), kind="mamba")),
        declared={"optim.lr": "each gets the best of the same trials"},
        tuning=Tuning(values={"optim.lr": (0.01, 0.003)}),
        budget=Budget(quantity="params", amount=10_500, align=8),
    )  # fmt: skip
    path = tmp_path / "study.sqlite"
    counts = conduct(study, Wish(path, device="cpu"), Console(quiet=True))
    assert counts["done"] == 2 * (2 + 3) and not counts["failed"]
    store = Store(path)
    content = results(store)
    store.close()
    sizes = [row["cost"]["parameters"] for row in content["rows"]]
    assert all(abs(size / 10_500 - 1) <= 0.02 for size in sizes)
    assert all(row["spec"]["args"]["d_model"] % 8 == 0 for row in content["rows"])
    assert content["verdict"]["answer"] in ("Yes", "No", "Not shown") and content["metric"] == "loss"
    assert all({"loss", "accuracy"} <= cell["test"].keys() for cell in content["cells"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_train_as_a_cpu_does(name: str, precision: str, tmp_path: Path) -> None:
    if name == "jamba_smoke" and precision == "float32":
        pytest.skip("experts in float32 ask the host for the longest group, which no graph can hold")
    data = Spec("text_file", path=write(tmp_path), tokenizer="characters", seq_len=40, shares=(0.55, 0.25, 0.2))
    _, wanted = on_device(make_run(Spec(name), data))
    run = make_run(Spec(name), data, precision=precision)
    _, found = on_device(run, torch.device("cuda"))
    rel = 1e-3 if precision == "float32" else 2e-2
    assert found.outcome().val["loss"] == pytest.approx(wanted.outcome().val["loss"], rel=rel)
    assert found.losses.cpu().tolist() == pytest.approx(wanted.losses.tolist(), rel=rel)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_study_packs_language_models_on_a_gpu(tmp_path: Path) -> None:
    data = Spec("text_file", path=write(tmp_path), tokenizer="characters", seq_len=24)
    base = make_run(Spec("gpt_smoke"), data, eval_every=2, device="auto").model_copy(update={"name": "tables"})
    study = Study(
        name="small", question="Which reads best?", bases=(base,), subject="mamba", metric="loss",
        variants=(Variant(name="gpt", model=Spec("gpt_smoke", dropout=0.1)),
                  Variant(name="mamba", model=Spec("mamba_lm_smoke", dropout=0.1), kind="mamba")),
        declared={"optim.lr": "each gets the best of the same trials"},
        tuning=Tuning(values={"optim.lr": (0.01, 0.003)}),
    )  # fmt: skip
    path = tmp_path / "study.sqlite"
    counts = conduct(study, Wish(path, device="cuda", packed=3), Console(quiet=True))
    assert counts["done"] == 2 * (2 + 3) and not counts["failed"]
    store = Store(path)
    content = results(store)
    store.close()
    assert all(cell["packed"] == 3 and {"val", "test"} == cell["last"].keys() for cell in content["cells"])
    assert content["verdict"]["answer"] in ("Yes", "No", "Not shown")
