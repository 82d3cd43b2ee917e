"""The images of a part on which a trained detector finds each class best and worst."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from selectra.classifier.cases import EACH, MANY, best_and_worst
from selectra.report.object_cases import Boxes, ObjectCase, ObjectCases
from selectra.tasks.detection import ObjectEvaluator, coco_results
from selectra.tasks.segmentation import vision
from selectra.train.checkpoint import WEIGHTS, load_weights
from selectra.train.job import build
from selectra.train.parallel import pick_device
from selectra.train.precision import autocast
from selectra.train.record import read_run

# What is there, what was found, and the masks of either, run-length encoded.
Side = tuple[Boxes, Boxes, list[Any] | None, Sequence[Any] | None]
# Least score of what is drawn.
SHOWN = 0.5


def object_cases_of(out: Path, part: str, metrics: dict[str, float], device: torch.device | None = None) -> ObjectCases:
    """Look at every image of a part, and keep the best and worst of each class by its average precision in it.

    Of a model and a set with masks it is that of masks. An image without the class in which it is found counts as 0:
    all that is found there is wrong, which the average precision over all images suffers from, too.

    Args:
        out: Folder of a training of detection.
        part: "train", "val" or "test".
        metrics: Of this part, as `evaluate_job` gives them.
        device: Where the model runs; by default as in training.

    Raises:
        DataError: There are no weights.
    """
    run = read_run(out)
    built = build(run)
    load_weights(out / WEIGHTS, built.model)
    device = pick_device(run.train.device) if device is None else device
    model, data = built.model.to(device).eval(), built.data
    windows, classes = data.windows(part), tuple(data.classes)
    # As evaluation sees images.
    windows.transform = None
    prefix = "mask_" if "mask_map50" in metrics else ""
    table, sides = np.full((len(windows), len(classes)), np.nan), []
    for i in range(len(windows)):
        batch, evaluator = windows[[i]].to(device), cast(ObjectEvaluator, built.task.evaluator())
        with torch.inference_mode(), autocast(device, run.train.precision):
            (found,) = model(batch.x)
        evaluator.add(batch.truths[0], found)
        here = evaluator.compute()
        table[i] = [here.get(f"{prefix}map50 {name}", np.nan) for name in classes]
        sides.append((_true(batch.truths[0]), *_found(found), batch.truths[0].masks))
        absent = [k for k in range(len(classes)) if np.isnan(table[i, k]) and (sides[i][1].labels == k).any()]
        table[i, absent] = 0.0
    each = EACH if len(classes) <= MANY else 1

    def shown(number: int, rows: Sequence[int]) -> tuple[ObjectCase, ...]:
        return tuple(_case(data, int(windows.rows[i]), sides[i], float(table[i, number])) for i in rows)

    chosen = [best_and_worst(table[:, number], each) for number in range(len(classes))]
    colours = tuple((red, green, blue) for red, green, blue in data.describe()["colours"])
    return ObjectCases(
        run.name, run.model.name, data.listing.where, part, len(windows), metrics[f"{prefix}map50"], classes, colours,
        tuple(metrics.get(f"{prefix}map50 {name}", float("nan")) for name in classes),
        tuple((shown(k, best), shown(k, worst)) for k, (best, worst) in enumerate(chosen)), SHOWN, bool(prefix),
    )  # fmt: skip


def _case(data: Any, row: int, side: Side, value: float) -> ObjectCase:
    image, _ = data.read(row)
    true, found, shapes, own = side
    masked = replace(true, masks=_decoded(own, image)), replace(found, masks=_decoded(shapes, image))
    pair = (true, found) if shapes is None or own is None else masked
    return ObjectCase(data.listing.entries[row].file, image.permute(1, 2, 0).numpy(), *pair, value)


def _true(truth: Any) -> Boxes:
    corners = np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]], 1)
    return Boxes(corners, truth.labels, np.ones(len(truth.labels)), ~truth.crowd)


def _found(found: dict[str, torch.Tensor]) -> tuple[Boxes, list[Any] | None]:
    """What is drawn, and its masks run-length encoded, since those of all images wait for the last one."""
    order = found["scores"].argsort(descending=True)
    order = order[found["scores"][order] >= SHOWN]
    shown = {name: value[order] for name, value in found.items()}
    boxes, labels, scores = (shown[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
    shapes = [each["segmentation"] for each in coco_results(0, shown)] if "masks" in found else None
    return Boxes(boxes, labels, scores, np.ones(len(labels), bool)), shapes


def _decoded(shapes: Sequence[Any] | None, image: torch.Tensor) -> np.ndarray[Any, Any]:
    """Masks (n, h, w) of an image (c, h, w)."""
    decode = vision("faster_coco_eval.core.mask").decode
    masks = [decode(shape).astype(bool) for shape in shapes or ()]
    return np.stack(masks) if masks else np.zeros((0, *image.shape[1:]), bool)
