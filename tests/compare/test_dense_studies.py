"""`selectra compare detection` and `selectra compare segmentation` on a user's own folder, here of drawn shapes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from selectra.cli import main
from selectra.compare.dense import BACKBONES, QUICK_BACKBONES
from selectra.compare.match import match
from selectra.compare.measure import count_parameters
from selectra.compare.prepare import prepare
from selectra.compare.questions import Asked, find_study
from selectra.compare.store import Store
from selectra.compare.study import Budget
from selectra.data.masks import Masks
from selectra.data.objects import Objects
from selectra.errors import ConfigError
from selectra.spec import Spec
from selectra.train import job

pytest.importorskip("torchvision")
COUNT = 24
FEW = ["--models", "vmamba_smoke,convnext_smoke,vit_smoke", "--steps", "2", "--batch-size", "3", "--trials", "0"]
HERE = ["--device", "cpu", "--workers", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    found = capsys.readouterr()
    return ended.value.code, found.out + found.err


def saved(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def write_coco(root: Path) -> Path:
    """Drawn shapes as a user exports them: one file of annotations beside the images."""
    data, images, things = Objects("shapes"), [], []
    for i in range(COUNT):
        picture, truth = data.read(i)
        saved(root / "images" / f"{i}.png", picture.permute(1, 2, 0).numpy())
        images.append({"id": i, "file_name": f"{i}.png", "height": picture.shape[1], "width": picture.shape[2]})
        for box, label in zip(truth.boxes.tolist(), truth.labels.tolist(), strict=True):
            things.append({"id": len(things) + 1, "image_id": i, "category_id": label + 1, "bbox": box, "iscrowd": 0,
                           "area": box[2] * box[3]})  # fmt: skip
    kinds = [{"id": k + 1, "name": name} for k, name in enumerate(data.classes)]
    (root / "annotations").mkdir()
    content = {"images": images, "annotations": things, "categories": kinds}
    (root / "annotations" / "instances_all.json").write_text(json.dumps(content))
    return root


def write_voc(root: Path) -> Path:
    """The same as Pascal VOC's XML."""
    data = Objects("shapes")
    (root / "Annotations").mkdir(parents=True)
    for i in range(COUNT):
        picture, truth = data.read(i)
        saved(root / "JPEGImages" / f"{i}.png", picture.permute(1, 2, 0).numpy())
        things = "".join(
            f"<object><name>{data.classes[label]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for (x, y, w, h), label in zip(truth.boxes.tolist(), truth.labels.tolist(), strict=True)
        )
        size = f"<size><width>{picture.shape[2]}</width><height>{picture.shape[1]}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{i}.png</filename>{size}{things}</annotation>"
        (root / "Annotations" / f"{i}.xml").write_text(text)
    return root


def write_masks(root: Path) -> Path:
    """Drawn shapes with masks, in folders."""
    data = Masks("shapes")
    for i in range(COUNT):
        picture, mask = data.read(i)
        saved(root / "images" / f"{i}.png", picture.permute(1, 2, 0).numpy())
        saved(root / "masks" / f"{i}.png", mask.numpy().astype(np.uint8))
    (root / "classes.txt").write_text("\n".join(data.classes) + "\n")
    return root


@pytest.mark.parametrize(
    ("kind", "write", "metric"),
    [("detection", write_coco, "map50"), ("detection", write_voc, "map50"), ("segmentation", write_masks, "miou")],
)
def test_own_folder_in_one_command(
    kind: str, write: Any, metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Data is kept by its name within a process, so that each case has its own.
    mine = write.__name__.removeprefix("write_")
    write(tmp_path / mine)
    words = ["compare", kind, mine, "--quick", *FEW, "--img-size", "64", *HERE]
    code, text = said(capsys, *words)
    assert code == 0, text
    question = {"detection": "find objects in", "segmentation": "segment"}[kind]
    assert f"Should I use Mamba to {question} {mine}?" in text and "9 cells done, 0 failed, 0 left" in text
    for suffix in (".sqlite", ".html", ".md", ".csv", ".json"):
        assert (tmp_path / f"{kind}_{mine}{suffix}").stat().st_size > 500
    content = json.loads((tmp_path / f"{kind}_{mine}.json").read_text())
    assert content["metric"] == metric and content["higher_is_better"]
    assert [row["variant"] for row in content["rows"]] == ["vmamba_smoke", "convnext_smoke", "vit_smoke"]
    assert "Where Mamba wins" in (tmp_path / f"{kind}_{mine}.html").read_text()
    store = Store(tmp_path / f"{kind}_{mine}.sqlite")
    records = [record for _, _, record in store.cells()]
    store.close()
    assert all(record is not None and 0 <= record["test"][metric] <= 1 for record in records)
    # Again: nothing to do but the page; another question needs another store.
    code, text = said(capsys, *words)
    assert code == 0 and "9 cells are done, 0 are left" in text
    code, text = said(capsys, *words[:-5], "48", *HERE)
    assert code == 2 and "holds another study" in text


def test_a_budget_turns_the_backbones() -> None:
    facts = {"n_classes": 4, "in_channels": 3, "img_size": (48, 64)}
    amount = count_parameters(Spec("retinanet_base", d_pyramid=64, backbone=Spec("vit_smoke", d_model=64)), facts)
    asked = Asked(models=("vmamba_smoke", "vit_smoke"), quick=True, budget=Budget(quantity="params", amount=amount))
    prepared = prepare(find_study("detection", asked), torch.device("cpu"), Console(quiet=True))
    for found in prepared["models"]:
        assert abs(found["cost"]["parameters"] / amount - 1) <= 0.02
        assert found["matched"].startswith("backbone.")
    for name, turned in (("vmamba_smoke", "dims"), ("vit_smoke", "d_model")):
        above = Spec("retinanet_base", d_pyramid=64, backbone=Spec(name))
        found = match(above, facts, params=amount)
        assert abs(count_parameters(found.spec, facts) / amount - 1) <= 0.02
        assert found.over == f"backbone.{turned}" and found.spec.args["d_pyramid"] == 64
        assert found.spec.args["backbone"].name == name
    deep = match(Spec("upernet_base", d_decoder=8, backbone=Spec("vit_smoke", depth=3)),
                 {"n_classes": 5, "in_channels": 3, "img_size": 48}, over="depth",
                 params=count_parameters(Spec("upernet_base", d_decoder=8, backbone=Spec("vit_smoke", depth=5)),
                                         {"n_classes": 5, "in_channels": 3, "img_size": 48}))  # fmt: skip
    assert (deep.over, deep.value) == ("backbone.depth", 5)
    with pytest.raises(ConfigError, match=r"no retinanet_base\.backbone\.dims brings retinanet_base within 2 %"):
        match(Spec("retinanet_base", backbone=Spec("vmamba_smoke")), facts, params=1000)


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_the_usual_backbones_are_of_three_kinds_and_alike_in_size(kind: str) -> None:
    for quick, known in ((True, QUICK_BACKBONES), (False, BACKBONES)):
        study = find_study(kind, Asked(quick=quick))
        study.check()
        assert [each.name for each in study.variants] == list(known)
        assert {each.kind for each in study.variants} == {"mamba", "convolution", "attention"}
        assert (study.seeds, study.higher_is_better, study.bases[0].data.args.get("path")) == (3, True, None)
        heads = {each.model.replace(backbone=Spec("vmamba_smoke")) for each in study.variants}
        assert len(heads) == 1
        facts = {"n_classes": 4, "in_channels": 3, "img_size": 320}
        counts = [count_parameters(each, facts) for each in known.values()]
        assert max(counts) < 1.5 * min(counts)
        for variant in study.variants:
            job.check(job.typed(study.run(study.bases[0], variant, 0)))


def test_sizes_reach_training_and_evaluation() -> None:
    study = find_study("detection", Asked(file="mine", img_size=96))
    assert study.bases[0].data.args["crop"] == 96
    assert {(each.model.args["short_side"], each.model.args["long_side"]) for each in study.variants} == {(96, 96)}
    assert find_study("detection", Asked(file="mine")).bases[0].data.args["crop"] == 320
    assert find_study("segmentation", Asked(file="mine", quick=True)).bases[0].data.args["crop"] == 128
    assert "crop" not in find_study("segmentation", Asked()).bases[0].data.args


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["detection", "absent"], "absent"),
        (["segmentation", "absent"], "absent"),
        (["detection", "--models", "tsm2,vmamba"], "'tsm2' is a model of kind 'series'; `compare detection` sets"),
        (["segmentation", "--models", "upernet"], "'upernet' is a model of kind 'segmentation'"),
        (["detection", "--models", "convnext,swin"], "is a Mamba model; name one, such as vmamba"),
        (["detection", "--models", "vmambo"], "there is no model 'vmambo'"),
        (["detection", "--horizon", "9"], "--horizon is for `compare forecasting`; images have --img-size"),
        (["segmentation", "--lookback", "9"], "--lookback is for `compare forecasting`"),
        (["detection", "--seeds", "2"], "too few for a verdict"),
    ],
)
def test_bad_input_is_refused_in_words(words: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "compare", *words, "--device", "cpu")
    assert code == 2 and found in text, text
