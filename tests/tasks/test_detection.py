"""torchvision's losses, and COCO's numbers beside those of faster-coco-eval called directly."""

import copy
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faster_coco_eval
import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coding
from torch import Tensor, nn

# Importing the room fills the registry.
import selectra.models  # noqa: F401
from selectra.data import Objects
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Spec
from selectra.tasks import Detection

CLASSES = ("a", "b")


def truth(
    image: int,
    boxes: list[list[float]],
    labels: list[int],
    crowd: list[bool] | None = None,
    ignored: list[bool] | None = None,
) -> Any:
    box = np.array(boxes, np.float64).reshape(-1, 4)
    single = None if ignored is None else np.array(ignored, bool)
    flags = np.array(crowd or ignored or [False] * len(labels), bool)
    return SimpleNamespace(image=image, size=(100, 120), boxes=box, labels=np.array(labels, np.int64),
                           areas=box[:, 2] * box[:, 3], crowd=flags, masks=None, ignored=single)  # fmt: skip


def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    """Boxes as left, top, width and height."""
    box = torch.tensor(boxes).reshape(-1, 4)
    return {
        "boxes": torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(scores),
    }


def evaluator(classes: tuple[str, ...] = CLASSES) -> Any:
    return Detection().for_data(SimpleNamespace(classes=classes, masks=False)).evaluator()


def guesses(read: Any, draw: Any) -> dict[str, Tensor]:
    """Objects near the true ones, some twice, some of another class, some beside, with masks."""
    boxes, labels, scores, masks = [], [], [], []
    height, width = read.size
    for (left, top, wide, high), label, shape in zip(read.boxes, read.labels, read.masks, strict=True):
        for _ in range(int(draw.integers(0, 3))):
            shift = draw.normal(0, 0.12, 4) * (wide, high, wide, high)
            corners = np.array([left, top, left + wide, top + high]) + shift
            boxes.append([*np.minimum(corners[:2], corners[2:] - 1), *corners[2:]])
            labels.append(int(label) if draw.random() < 0.8 else int(draw.integers(80)))
            scores.append(round(float(draw.random()), 2))
            masks.append(np.roll(coding.decode(shape), tuple(draw.integers(-6, 7, 2)), (0, 1)))
    return {
        "boxes": torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(scores),
        "masks": torch.tensor(np.array(masks), dtype=torch.float32).reshape(-1, 1, height, width),
    }


@pytest.fixture(scope="module")
def on_coco() -> Any:
    """COCO-mini's validation images with guesses, evaluated by us, and the same as COCO's own words have it."""
    import os

    folder = os.environ.get("SELECTRA_DATA")
    if not folder or not (Path(folder) / "coco-mini").is_dir():
        pytest.skip("SELECTRA_DATA has no coco-mini")
    data, draw = Objects("coco_mini", masks=True), np.random.default_rng(0)
    with zipfile.ZipFile(Path(folder) / "coco-mini" / "coco_mini.zip") as archive:
        official = json.loads(archive.read("annotations/instances_val.json"))
    ids = {image["file_name"]: image["id"] for image in official["images"]}
    categories = [each["id"] for each in official["categories"]]
    ours, results = Detection().for_data(data).evaluator(), []
    for row in data.rows["test"]:
        _, read = data.read(int(row))
        guess, name = guesses(read, draw), data.listing.entries[int(row)].file.rpartition("/")[2]
        ours.add(read, guess)
        for box, label, score, shape in zip(
            *(guess[key] for key in ("boxes", "labels", "scores", "masks")), strict=True
        ):
            left, top, right, bottom = (float(value) for value in box)
            encoded = coding.encode(np.asfortranarray((shape[0].numpy() >= 0.5).astype(np.uint8)))
            results.append({"image_id": ids[name], "category_id": categories[int(label)], "score": float(score),
                            "bbox": [left, top, right - left, bottom - top], "segmentation": encoded})  # fmt: skip
    return ours, official, results


@pytest.mark.parametrize(("kind", "prefix"), [("bbox", ""), ("segm", "mask_")])
def test_numbers_are_faster_coco_evals_to_the_digit(on_coco, kind, prefix):
    ours, official, results = on_coco
    metrics = ours.compute()
    # As its documentation has it: the official file, the list of results.
    real = faster_coco_eval.COCO(copy.deepcopy(official))
    direct = faster_coco_eval.COCOeval_faster(real, real.loadRes(copy.deepcopy(results)), kind)
    direct.run()
    stats = direct.stats_as_dict
    assert 0.05 < stats["AP_all"] < 0.9
    assert {name: metrics[prefix + name] for name in ("map", "map50", "map75")} == {
        "map": stats["AP_all"], "map50": stats["AP_50"], "map75": stats["AP_75"]}  # fmt: skip
    assert ours.details()["coco"][kind] == {key: value if value != -1 else None for key, value in stats.items()}
    names = {each["id"]: each["name"] for each in official["categories"]}
    for number in (1, 3, 62):
        direct.params.catIds = [number]
        direct.run()
        assert metrics[f"{prefix}map50 {names[number]}"] == pytest.approx(direct.stats_as_dict["AP_50"], abs=1e-15)


def test_what_is_found_exactly_is_one_and_what_is_missed_counts():
    ours = evaluator()
    ours.add(truth(0, [[10, 10, 30, 40], [50, 20, 20, 20]], [0, 1]), found([[10, 10, 30, 40]], [0], [0.9]))
    metrics = ours.compute()
    assert metrics["map50 a"] == metrics["map50"] * 2 == pytest.approx(1.0) and metrics["map50 b"] == 0
    assert "mask_map" not in metrics


def test_crowds_are_no_error_and_no_gain():
    ours = evaluator()
    there = truth(0, [[10, 10, 30, 40], [50, 20, 40, 40]], [0, 0], [False, True])
    ours.add(there, found([[10, 10, 30, 40], [55, 25, 20, 20]], [0, 0], [0.5, 0.9]))
    assert ours.compute()["map50 a"] == pytest.approx(1.0)
    strict = evaluator()
    there.crowd[1] = False
    strict.add(there, found([[10, 10, 30, 40], [55, 25, 20, 20]], [0, 0], [0.5, 0.9]))
    assert strict.compute()["map50 a"] < 0.3


def test_an_ignored_object_excuses_one_that_finds_it_and_not_what_lies_inside():
    """Pascal VOC's rule for difficult objects (its development kit): each is found at an overlap of a half."""
    there = truth(0, [[10, 10, 30, 40], [60, 20, 20, 20]], [0, 0], ignored=[False, True])

    def value(*beside: list[float]) -> float:
        ours = evaluator()
        scores = [0.5, *(0.9 - 0.1 * i for i in range(len(beside)))]
        ours.add(there, found([[10, 10, 30, 40], *beside], [0] * len(scores), scores))
        return ours.compute()["map50 a"]

    assert value() == value([60, 20, 20, 11]) == pytest.approx(1.0)
    assert value([61, 21, 6, 6], [68, 21, 6, 6], [61, 30, 6, 6]) == pytest.approx(0.25)
    # Twice, one of them is wrong.
    assert value([60, 20, 20, 20], [60, 20, 20, 19]) == pytest.approx(0.5)
    alone = evaluator()
    alone.add(truth(0, [[60, 20, 20, 20]], [0], ignored=[True]), found([[60, 20, 20, 20]], [0], [0.9]))
    assert all(math.isnan(number) for number in alone.compute().values())


def test_processes_add_up_in_any_order():
    draw = np.random.default_rng(1)
    images = []
    for i in range(6):
        boxes = [[*draw.uniform(0, 60, 2), *draw.uniform(10, 40, 2)] for _ in range(4)]
        labels, scores = draw.integers(0, 2, 4).tolist(), draw.random(4).round(1).tolist()
        near = [[a + 2, b - 2, c, d] for a, b, c, d in boxes]
        images.append((truth(i, boxes, labels), found(near, labels[::-1], scores)))
    whole, first, second = evaluator(), evaluator(), evaluator()
    for i, image in enumerate(images):
        whole.add(*image)
        (second if i % 2 else first).add(*image)
    items: list[Any] = []
    second.reduce(lambda item: items.append(copy.deepcopy(item)) or [item])
    first.reduce(lambda item: [*items, item])
    assert first.compute() == whole.compute() and first.details() == whole.details()


def test_without_objects_nothing_is_a_number():
    ours = evaluator()
    ours.add(truth(0, [], []), found([], [], []))
    assert all(math.isnan(value) for value in ours.compute().values())
    with pytest.raises(ConfigError, match="no image that validates has an object"):
        Detection().score(ours.compute())
    nothing = evaluator()
    nothing.add(truth(0, [[1, 2, 30, 40]], [0]), found([], [], []))
    assert nothing.compute() == {"map": 0.0, "map50": 0.0, "map75": 0.0, "map50 a": 0.0}


@dataclass
class Batch:
    """Images and targets, without truths."""

    x: list[Any]
    targets: Sequence[dict[str, Tensor]]
    truths: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.x)


class Losses(nn.Module):
    """Gives fixed losses, of which the last is a mean over five masks."""

    def forward(self, images: Any, targets: Any, counted: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses = {"classification": 2.0, "bbox_regression": 1.0, "loss_mask": 4.0}
        return {name: torch.tensor(value) for name, value in losses.items()}, {"loss_mask": torch.tensor(5)}


def test_losses_count_by_images_and_weights():
    loss = Detection(box=0.5, mask=0.25).loss(Losses(), Batch([0, 0, 0], [{}, {}, {}]))
    assert float(loss.sum) == 3 * (2 + 0.5 + 1) and float(loss.count) == 3
    assert {name: float(value) for name, value in loss.parts.items()} == {
        "classification": 6.0, "bbox_regression": 1.5, "loss_mask": 3.0}  # fmt: skip


def shared(shares: Sequence[Any]) -> list[Any]:
    """What as many processes make of their shares of a batch."""
    said: list[Tensor] = []
    for share in shares:
        share.shared(lambda own: said.append(own) or own)
    return [share.shared(lambda _: torch.stack(said).sum(0)) for share in shares]


@pytest.mark.parametrize("detector", ["retinanet", "fcos", "faster_rcnn", "mask_rcnn"])
def test_shares_of_a_batch_give_its_loss_and_gradient(detector):
    """Images differ in size and in what is on them, one has nothing, and a process without a share counts for none."""
    data = Objects("shapes", masks=True, standard="half")
    windows = data.windows("train")
    model = models.build(Spec(f"{detector}_smoke"), data.facts).double().train()
    task = Detection(box=0.5, mask=2.0).for_data(data)
    whole: Any = windows[[0, 1, 2, 3]].to("cpu")
    sizes = ((48, 64), (32, 31), (20, 28), (32, 30))
    images = tuple(image[:, :height, :width] for image, (height, width) in zip(whole.images, sizes, strict=True))
    empty = {name: value if name == "key" else value[:0] for name, value in whole.targets[1].items()}
    whole = replace(whole, images=images, targets=(whole.targets[0], empty, *whole.targets[2:]))

    def loss(rows: slice) -> Any:
        part = replace(whole, images=whole.images[rows], targets=whole.targets[rows])
        part = part.agreed(lambda own: torch.maximum(own, torch.tensor([48, 64])))
        return task.loss(model, Batch([image.double() for image in part.x], part.targets))

    def gradient(losses: Sequence[Any]) -> Tensor:
        model.zero_grad()
        torch.stack([each.sum for each in losses]).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (one,) = shared([loss(slice(4))])
    parts = shared([loss(slice(1, 4)), loss(slice(1)), loss(slice(1)).nothing()])
    assert float(one.count) == sum(float(part.count) for part in parts) == 4
    for name, value in one.parts.items():
        assert float(value) == pytest.approx(sum(float(part.parts[name]) for part in parts), rel=1e-6), name
    assert one.sum.item() == pytest.approx(sum(float(value) for value in one.parts.values()), rel=1e-6)
    expected = gradient([one])
    # torchvision computes parts of the two-stage detectors in float32, whatever it is given.
    assert torch.allclose(gradient(parts), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_of_one_process_losses_are_torchvisions():
    data = Objects("shapes", masks=True)
    batch: Any = data.windows("train")[[0, 1]].to("cpu")
    model: Any = models.build(Spec("mask_rcnn_smoke"), data.facts).train()
    given = model(batch.x, batch.targets)
    loss = Detection().for_data(data).loss(model, batch)
    for found in (loss, *shared([loss])):
        assert {name: float(value) / 2 for name, value in found.parts.items()} == pytest.approx(
            {name: float(value) for name, value in given.items()}
        )


@pytest.mark.parametrize("arguments", [{"box": -1.0}, {"mask": -0.5}])
def test_what_cannot_be_is_named(arguments):
    with pytest.raises(ConfigError, match="weights are from 0 on"):
        Detection(**arguments)


def test_choosing_by_masks_needs_masks():
    with pytest.raises(ConfigError, match=r"the data gives no masks: data\.masks=true"):
        Detection(select="mask_map").for_data(Objects("shapes"))
    with pytest.raises(ConfigError, match="the model finds no masks"):
        Detection(select="mask_map").score({"map": 0.5})
    with pytest.raises(ConfigError, match="call for_data"):
        Detection().evaluator()
