"""What a study says while it runs, and what `--quick` and `--steps` make of one."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.compare.conduct import Progress, Wish, conduct, open_study
from selectra.compare.prepare import seconds_by_steps
from selectra.compare.questions import Asked, find_study
from selectra.compare.store import Store
from selectra.compare.usual_models import QUICK_IMAGE_MODELS
from tests.compare.images_small import make_study as make_image_study
from tests.compare.small import write_series
from tests.compare.studies import make_study

FOUND: dict[str, Any] = {"by_gradient": True, "cost": {"device": "cpu", "step_ms": 100.0, "batch": 32, "threads": 1}}


def changed(**cost: object) -> dict[str, Any]:
    return FOUND | {"cost": {**FOUND["cost"], **cost}}


def test_a_trial_is_told_by_the_metric_and_not_by_what_it_lacks(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path, text = tmp_path / "s.sqlite", io.StringIO()
    conduct(make_image_study(), Wish(path, device="cpu"), Console(file=text, width=300))
    store = Store(path)
    found = {
        (cell.label["variant"], cell.trial + 1): record["val"]["top1"]
        for cell, _, record in store.cells()
        if cell.trial is not None and record is not None
    }
    store.close()
    told = re.findall(r": shapes, (\w+), trial (\d) of 2: validation top1 ([\d.]+)", text.getvalue())
    assert {(name, int(number)): float(value) for name, number, value in told} == pytest.approx(found, abs=1e-4)
    assert len(told) == 4
    assert re.search(r": shapes, vmamba, seed 2: top1 [\d.]+", text.getvalue())


def test_the_time_that_a_study_takes_is_told_before_its_first_training(tmp_path: Path) -> None:
    text, wish = io.StringIO(), Wish(tmp_path / "s.sqlite", device="cpu")
    store = Store(wish.store)
    study = open_study(store, make_study(write_series(tmp_path)), torch.device("cpu"), Console(quiet=True))
    progress = Progress(store, study, wish, Console(file=text, width=300))
    costs = [each["cost"] for each in progress.known.values() if each["by_gradient"]]
    # Of each of two models two trials and three seeds of six steps; what is solved beside them takes no time.
    assert progress.left() == (11, pytest.approx(sum(5 * 6 * cost["step_ms"] / 1e3 for cost in costs)))
    progress.first_word()
    store.close()
    assert re.search(r"0 cells are done, 11 are left, about \d+ s, in ", text.getvalue())


def test_seconds_by_steps() -> None:
    base = make_study(Path("absent.csv"), steps=50).bases[0]
    assert seconds_by_steps(base, FOUND, 1) == pytest.approx(5.0)
    longer = base.model_copy(update={"train": base.train.model_copy(update={"batch_size": 64})})
    assert seconds_by_steps(longer, FOUND, 1) == pytest.approx(10.0)
    # What was measured on all cores has one of them where each has a process.
    assert seconds_by_steps(base, changed(threads=4), 1024) == pytest.approx(20.0)
    assert seconds_by_steps(base, changed(device="NVIDIA H100"), 1) is None
    assert seconds_by_steps(base, FOUND | {"by_gradient": False}, 1) is None
    passes = base.train.model_copy(update={"steps": None, "epochs": 3.0})
    assert seconds_by_steps(base.model_copy(update={"train": passes}), FOUND, 1) is None


def test_a_quick_look_at_images_has_small_models_alike_in_size() -> None:
    from selectra.compare.measure import count_parameters

    study, usual = (find_study("vision", Asked(quick=quick)) for quick in (True, False))
    study.check()
    assert [each.name for each in study.variants] == [each.name for each in usual.variants] == list(QUICK_IMAGE_MODELS)
    assert {each.kind for each in study.variants} == {"mamba", "convolution", "attention"}
    train = study.bases[0].train
    assert (train.steps, train.batch_size, train.eval_every) == (200, 32, 50)
    facts = {"n_classes": 10, "in_channels": 3, "img_size": (32, 32)}
    counts = [count_parameters(each.model, facts) for each in study.variants]
    assert max(counts) < 300_000 and max(counts) < 1.1 * min(counts)


def test_fewer_steps_are_not_all_of_them_warm_up() -> None:
    def paced(kind: str, **asked: Any) -> tuple[int, int, int | None]:
        base = find_study(kind, Asked(**asked)).bases[0]
        assert base.train.steps is not None
        return base.train.steps, base.optim.warmup_steps, base.train.eval_every

    assert paced("vision") == (2000, 100, 250)
    # A hundred steps were a hundred steps of warm-up.
    assert paced("vision", steps=100) == (100, 5, 12)
    assert paced("forecasting", quick=True, steps=20) == (20, 2, 2)
    # More steps, or other batches, leave it as it is.
    assert paced("vision", steps=4000) == (4000, 100, 250)
    assert paced("vision", batch_size=8) == (2000, 100, 250)


def test_what_the_data_are_is_told_before_the_first_model(tmp_path: Path) -> None:
    path, text = write_series(tmp_path), io.StringIO()
    lines = path.read_text().splitlines()
    # Two hours that the table leaves out, and a value that it has not.
    lines[40] = lines[40].rsplit(",", 1)[0] + ","
    path.write_text("\n".join([*lines[:100], *lines[102:]]) + "\n")
    store = Store(tmp_path / "s.sqlite")
    open_study(store, make_study(path), torch.device("cpu"), Console(file=text, width=300))
    store.close()
    told = text.getvalue().partition("1 of 3")[0]
    assert (
        "1 gap, 2 rows inserted as unobserved; the longest is 2 rows from" in told
        and "% of values missing: masked, not filled" in told
    )
