"""Tables of trained image models: joined records, losses that are called so, parts without a record."""

import json
from pathlib import Path
from typing import Any

import pytest

from selectra.bench import docs
from selectra.bench.vision_results import (
    accuracy_table,
    against_table,
    attention_words,
    joined,
    sources,
    stability_table,
    trainings_table,
    transfer_table,
    verdict,
)
from selectra.bench.vision_targets import vision_target_table
from selectra.errors import DataError

ROOT = Path(__file__).parents[2]
Record = dict[str, Any]
FACTS = {"versions": {"torch": "2.11"}, "hardware": {"gpus": ["A GPU"], "processor": "A CPU"}}


def cifar(accuracies: dict[str, list[float]], date: str = "2026-01-02T03:04:05", **more: Any) -> Record:
    costs = {"model": {}, "parameters": 4_950_000, "gflops": 0.5, "batch_size": 512}
    rates = {"train_ms": 10.0, "train_images_per_s": 51200.0, "inference_ms": 2.0, "inference_images_per_s": 256000.0,
             "peak_gib": 1.5}  # fmt: skip
    return {
        "what": "vision_cifar10", "command": "python results/vision_cifar10.py", "date": date, **FACTS, "changes": [],
        "models": [{"recipe": f"{name}_cifar10", **costs, **rates} for name in accuracies],
        "trainings": [{"recipe": f"{name}_cifar10", "seed": seed, "test": {"top1": value}, "steps": 100}
                      for name, values in accuracies.items() for seed, value in enumerate(values)],
        "not_begun": [], **more,
    }  # fmt: skip


WINS = {"vmamba": [0.931, 0.933, 0.932], "resnet18": [0.921, 0.922, 0.923], "mlp_mixer": [0.85]}


def test_accuracy_stands_with_interval_costs_and_seeds() -> None:
    words, _, *lines = accuracy_table(cifar({**WINS, "vim": []})).splitlines()
    assert words == "100 steps of 512 images; longer trainings may order models otherwise."
    assert lines[2] == (
        "| VMamba | 93.20 | 0.10 | 92.95 to 93.45 | 3 | 4,950,000 | 0.500 | 51,200 | 256,000 | 1.50 |"
    )  # fmt: skip
    assert lines[3].startswith("| ResNet-18 | 92.20 |")
    # One seed has no interval, and who is not trained yet stands last.
    assert "| MLP-Mixer | 85.00 | - | - | 1 |" in lines[4]
    assert lines[5].startswith("| Vim | not trained yet |")


def test_records_of_two_gpus_are_joined() -> None:
    one, two = cifar({"vmamba": WINS["vmamba"]}), cifar({"resnet18": WINS["resnet18"]}, "2026-01-02T09:00:00")
    assert accuracy_table(one, two) == accuracy_table(cifar({name: WINS[name] for name in ("vmamba", "resnet18")}))
    later = cifar({"vmamba": [0.95]}, "2026-01-03")
    _, trainings = joined([later, one])
    assert [row["test"]["top1"] for row in trainings["vmamba_cifar10"].values()] == [0.95, 0.933, 0.932]
    with pytest.raises(DataError, match="not made alike"):
        joined([one, cifar({"vim": [0.9]}, "2026-01-04", changes=["optim.lr=0.1"])])
    # Steps are told by the trainings themselves.
    joined([one, cifar({"vim": [0.9]}, "2026-01-04", changes=["train.steps=100"])])


def test_a_loss_is_called_one() -> None:
    text = against_table(cifar({**WINS, "vim": [0.90, 0.901, 0.899]}))
    ours, worse = text.splitlines()[2:]
    assert ours.startswith("| VMamba | wins +1.00 (")
    assert "higher +8.10 (1 seed, no interval)" in ours
    assert worse.startswith("| Vim | **loses** -2.20 (")
    said = verdict(cifar(WINS))
    assert "Highest: VMamba, 93.20 %" in said
    assert "VMamba against ResNet-18 (92.20 %): wins +1.00" in said
    slow = cifar(WINS)
    slow["models"][0] |= {"train_ms": 30.0, "peak_gib": 3.0}
    assert "points; **3.0 times as slow** in training, **2.0 times the memory**." in verdict(slow)
    assert "points; 1.00 times the images a second, 1.00 times the memory." in said
    assert "loses -1.00" in verdict(cifar({"vmamba": WINS["resnet18"], "resnet18": WINS["vmamba"]}))
    assert "level" in against_table(cifar({"vmamba": [0.93, 0.92, 0.91], "resnet18": [0.92, 0.93, 0.915]}))
    assert verdict(cifar({"vmamba": [0.9]})).startswith("No verdict yet")
    assert against_table(cifar({"vmamba": [0.9]})) == "Nothing to compare yet."


def transfer(**more: Any) -> Record:
    gain = {"model": "vmamba", "per_class": 10, "way": "frozen", "scratch": 0.5, "mean": 0.4, "difference": -0.1,
            "low": -0.2, "high": -0.05, "pairs": 3, "p": 0.01}  # fmt: skip
    backbone = {"model": "vmamba", "seed": 0, "way": "backbone", "per_class": None, "parameters": 1000,
                "test": {"top1": 0.8}}  # fmt: skip
    plan = {"name": "published", "steps": 1500, "batch": 512, "target_steps": 400, "target_batch": 64}
    return {"what": "vision_transfer", "command": "c", "date": "2026-01-02", **FACTS, "plan": plan,
            "trainings": [backbone], "gains": [gain, {**gain, "way": "tuned", "difference": 0.1, "low": 0.05,
                                                      "high": 0.2, "mean": 0.6}],
            "not_begun": [], **more}  # fmt: skip


def test_gains_of_transfer() -> None:
    text = transfer_table(transfer(not_begun=[{}, {}]))
    assert "| VMamba | 10 | frozen | 50.00 | 40.00 | -10.00 | -20.00 to -5.00 | **harms** |" in text
    assert "| VMamba | 10 | tuned | 50.00 | 60.00 | +10.00 | +5.00 to +20.00 | helps |" in text
    assert "2 trainings were not begun" in text
    assert "VMamba 80.00 % (1,000 parameters)" in text
    assert "No gain is known yet" in transfer_table(transfer(gains=[]))


def stability(**changed: Any) -> Record:
    row = {"model": "vim_tiny", "precision": "bf16", "parameters": 7, "steps": 500, "first loss": 2.3, "last loss": 0.1,
           "first step that is not finite": None, "skipped by the scaler": 0, "stable": True}  # fmt: skip
    half = {**row, "precision": "fp16", "skipped by the scaler": 3, **changed}
    broken = {"model": "vim2_base", "precision": "fp16", "stable": False, "problem": "OutOfMemoryError: no"}
    return {"what": "stability", "command": "c", "date": "2026-01-02", "environment": FACTS,
            "rows": [row, half, broken], "begun, of all": [3, 5]}  # fmt: skip


def test_stability_says_what_was_not() -> None:
    text = stability_table(stability())
    assert text.startswith("2 of 5 trainings of 500 steps are stable; 2 have no result.")
    assert "| vim_tiny | 7 | stable, loss 2.30 to 0.10 | stable, loss 2.30 to 0.10, 3 skipped |" in text
    assert "| vim2_base | - | not run | did not run: OutOfMemoryError: no |" in text
    text = stability_table(stability(**{"stable": False, "first step that is not finite": 12}))
    assert "**not stable**: not finite from step 12 on" in text


def timing(ms: float, peak: float = 2.0**20) -> Record:
    return {"wall_ms": {"median": ms}, "device_ms": {"median": ms}, "peak_bytes": peak}


def kernels(model: str, ours: float, theirs: float, date: str = "2026-01-02", batch: int = 128, **more: Any) -> Record:
    row = {"model": model, "peer": "peer", "batch": batch, "target": 2.0, "eager": {"ours": timing(ours),
           "theirs": timing(theirs)}, **more}  # fmt: skip
    return {"benchmark": "vision", "command": "c", "date": date, "device": "cuda", "environment": FACTS,
            "training": {"rows": [row]}}  # fmt: skip


def test_trainings_of_several_records_stand_in_one_table() -> None:
    whole = kernels("vim_tiny", 1.0, 2.5, compiled={"ours": timing(1.0), "theirs": timing(1.5)})
    records = [kernels("vmamba_tiny", 2.0, 3.0), whole, kernels("vim_tiny", 9.0, 9.0)]
    text = trainings_table(*records)
    assert text.count("vim_tiny | peer") == 2 and "| 2.50 |" in text and "| 1.50 |" in text
    assert "9.00" not in text
    assert (
        trainings_table({"date": "1", "training": {"rows": [{"model": "vim_tiny", "batch": 1}]}})
        == "Nothing is timed yet."
    )


def test_targets_are_met_or_not_or_have_no_record() -> None:
    growth = {"benchmark": "vision", "date": "2026-01-02", "device": "cuda:0",
              "growth": {"rows": [{"slopes": {"forward_ms": 0.8, "memory_bytes": 1.0}}]}}  # fmt: skip
    text = vision_target_table(cifar(WINS), kernels("vim_tiny", 1.0, 2.5), kernels("vmamba_tiny", 1.0, 1.5), growth)
    assert "within 1 point | VMamba 93.20 %, ResNet-18 92.20 %: +1.00 | yes |" in text
    assert "over 90 % | VMamba 93.20 % | yes |" in text
    others = "images of 224 px, against others' kernels"
    assert f"`vim_tiny`, 128 {others}, eager | 2 times | 2.50 | yes |" in text
    assert f"`vim_tiny`, 128 {others}, compiled | 2 times | no record yet | - |" in text
    assert f"`vmamba_tiny`, 128 {others}, eager | 2 times | 1.50 | **no** |" in text
    once = {side: {**timing(ms), "rounds": 1} for side, ms in (("ours", 1.0), ("theirs", 3.0))}
    many = {side: {**timing(ms), "rounds": 3} for side, ms in (("ours", 1.0), ("theirs", 2.2))}
    single, found = kernels("vim_tiny", 1.0, 2.5), {"compiled": once, "compiled, one CUDA graph": many}
    ways = vision_target_table({**single, "training": {"rows": [{**single["training"]["rows"][0], **found}]}})
    assert f"`vim_tiny`, 128 {others}, compiled | 2 times | 3.00 (one call) | not shown |" in ways
    assert f"`vim_tiny`, 128 {others}, compiled, one CUDA graph | 2 times | 2.20 | yes |" in ways
    assert "eager, one CUDA graph" not in ways
    # Each number of images is a line of its own, and a model without a record keeps its own.
    more = vision_target_table(kernels("vim_tiny", 1.0, 1.9), kernels("vim_tiny", 1.0, 2.6, batch=256))
    assert f"`vim_tiny`, 128 {others}, eager | 2 times | 1.90 | **no** |" in more
    assert f"`vim_tiny`, 256 {others}, eager | 2 times | 2.60 | yes |" in more
    assert f"`vmamba_tiny`, 64 {others}, eager | 2 times | no record yet | - |" in more
    assert "1 of 2 slopes inside; 0.80 to 1.00 | **no** |" in text
    assert "all stable | no record yet | - |" in text
    assert "2 of 3 that ran; 2 of 5 not run | **no** |" in vision_target_table(stability())
    part = stability()
    part["rows"].pop()
    assert "2 of 2 that ran; 3 of 5 not run | not all run |" in vision_target_table({**part, "begun, of all": [2, 5]})
    assert "2 of 2 that ran; 0 of 2 not run | yes |" in vision_target_table({**part, "begun, of all": [2, 2]})
    far = {"vmamba": [0.89, 0.89, 0.89], "resnet18": WINS["resnet18"]}
    assert vision_target_table(cifar(far)).count("**no**") == 2
    assert "vmamba_ucmerced" not in vision_target_table(cifar(WINS))


def test_the_claim_stands_beside_the_measurement() -> None:
    found = {"vim_tiny": timing(2.0, 50), "deit_tiny, flash": timing(1.0, 40), "deit_tiny, plain": timing(5.0, 500)}
    row = {"pixels": 1248, "batch": 4, "eager": {"inference": found}}
    claim = {"pixels": 1248, "times as fast": 2.8, "less memory": 0.868, "source": "a paper"}
    text = attention_words({"attention": {"claim": claim, "rows": [{**row, "pixels": 224}, row]}})
    assert "2.8 times as fast, 86.8% less memory" in text
    assert "Vim-T is 0.50 times as fast as (**slower than**) deit_tiny, flash, with 25.0% more peak memory" in text
    assert "Vim-T is 2.50 times as fast as deit_tiny, plain, with 90.0% less" in text
    assert text.count("inference, eager") == 2
    assert "Not measured" in attention_words({"attention": {"claim": claim, "rows": []}})


def test_the_page_is_filled_from_all_records_that_fit(tmp_path: Path) -> None:
    (tmp_path / "vision_cifar10_a.json").write_text(json.dumps(cifar({"vmamba": WINS["vmamba"]})))
    (tmp_path / "vision_cifar10_b.json").write_text(json.dumps(cifar({"resnet18": WINS["resnet18"]})))
    text = "<!-- table vision_verdict from vision_cifar10_*.json -->\n<!-- end -->\n"
    assert "VMamba against ResNet-18" in docs.filled(text, tmp_path)
    absent = "<!-- table vision_accuracy from vision_ucmerced_*.json -->\n<!-- end -->\n"
    assert docs.NO_RECORD in docs.filled(absent, tmp_path)
    assert sources(cifar({"vim": [0.9]})).endswith("vision_cifar10.py`, 2026-01-02, A GPU, PyTorch 2.11")


def test_the_page_names_every_part() -> None:
    text = (ROOT / "docs" / "results" / "vision.md").read_text(encoding="utf-8")
    for kind in ("targets", "accuracy", "against", "verdict", "transfer", "trainings", "claim", "attention", "growth",
                 "einfft", "stability"):  # fmt: skip
        assert f"<!-- table vision_{kind} from" in text, kind
