"""Studies of detectors, of segmenters and of models for clips go through the plain loop, from costs to the page."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selectra.compare.conduct import Wish, conduct, prepared_models
from selectra.compare.results import results
from selectra.compare.store import Store
from selectra.compare.study import Study, Variant
from selectra.spec import Optim, Run, Spec, Train

SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (1, 1), "d_state": 2, "patch_size": 4}
VMAMBA, VIM = Spec("vmamba_smoke", **SHAPE), Spec("vim_smoke", patch_size=8)
FEW = {"val": 0.03, "test": 0.03}
# Task, data, the metric that decides, and two models.
KINDS: dict[str, tuple[Spec, Spec, str, tuple[Spec, Spec]]] = {
    "detection": (
        Spec("detection", select="map50"), Spec("objects", flip=0.5, **FEW), "map50",
        (Spec("retinanet_smoke", backbone=VMAMBA), Spec("retinanet_smoke", backbone=VIM)),
    ),
    "segmentation": (
        Spec("segmentation", select="loss"), Spec("masks", crop=32, flip=0.5, **FEW), "miou",
        (Spec("segformer_smoke", backbone=VMAMBA), Spec("upernet_smoke", backbone=Spec("convnext_smoke"))),
    ),
    "video": (
        Spec("clip_classification"), Spec("moving_shapes", train=12, val=6, test=12, n_frames=4), "top1",
        (Spec("videomamba_clip_smoke"), Spec("videomamba_clip_smoke", depth=1)),
    ),
}  # fmt: skip


def make_study(kind: str) -> Study:
    task, data, metric, models = KINDS[kind]
    base = Run(
        name="shapes", model=models[0], data=data, task=task, optim=Optim(lr=1e-3),
        train=Train(steps=2, batch_size=3, eval_every=1, device="cpu"),
    )  # fmt: skip
    variants = tuple(Variant(name=name, model=model) for name, model in zip(("ours", "other"), models, strict=True))
    return Study(
        name=kind, question="Which is better?", bases=(base,), variants=variants, subject="ours", metric=metric,
        higher_is_better=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_of_this_kind_is_done_and_judged(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    path, study = tmp_path / "study.sqlite", make_study(kind)
    counts = conduct(study, Wish(path, device="cpu"), Console(quiet=True))
    assert counts == {"open": 0, "taken": 0, "done": 6, "failed": 0}
    store = Store(path)
    for found in prepared_models(store).values():
        cost = found["cost"]
        assert min(cost["parameters"], cost["flops"], cost["forward_ms"], cost["step_ms"], cost["activations_mb"]) > 0
    for _, _, record in store.cells():
        assert record is not None and record["steps"] == 2 and len(record["history"]) == 2
        assert 0 <= record["test"][study.metric] <= 1 and record["backends"] is not None
    content = results(store)
    store.close()
    assert [(row["variant"], row["missing"]) for row in content["rows"]] == [("ours", []), ("other", [])]
    assert content["metric"] == study.metric and content["verdict"]["text"]
