"""Detection and instance segmentation: torchvision's losses, and COCO's average precision by faster-coco-eval."""

import copy
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.registry import tasks
from selectra.tasks.segmentation import vision
from selectra.tasks.task import Loss, Means

# Scores of a mask's pixels from here on are inside of it.
INSIDE = 0.5
# What COCO's tools call the kinds of overlap, and what their metrics' names begin with here.
KINDS = {"bbox": "", "segm": "mask_"}
NAMES = {"AP_all": "map", "AP_50": "map50", "AP_75": "map75"}
# COCO's tools ignore an object whose area is beyond all of their ranges, which end at 1e10, and with it the one that
# finds it; of a crowd they ignore whatever is inside, however often and small.
BEYOND = 2e10


class Known(Protocol):
    """What is on an image; see `selectra.data.object_truth.Truth`."""

    @property
    def image(self) -> int: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def boxes(self) -> Any: ...
    @property
    def labels(self) -> Any: ...
    @property
    def areas(self) -> Any: ...
    @property
    def crowd(self) -> Any: ...
    @property
    def masks(self) -> Sequence[Any] | None: ...
    @property
    def ignored(self) -> Any: ...


class AnnotatedImages(Protocol):
    """What the task reads of a batch."""

    @property
    def x(self) -> list[Tensor]: ...
    @property
    def targets(self) -> Sequence[dict[str, Tensor]]: ...
    @property
    def truths(self) -> Sequence[Any]: ...
    def __len__(self) -> int: ...


def coco_annotations(truth: Known) -> list[dict[str, Any]]:
    """An image's objects in COCO's words; images and categories count from 1, and annotations are numbered later."""
    ignored = np.zeros(len(truth.labels), bool) if truth.ignored is None else truth.ignored
    return [
        {
            "image_id": truth.image + 1,
            "category_id": int(truth.labels[i]) + 1,
            "bbox": [float(value) for value in truth.boxes[i]],
            "area": BEYOND if ignored[i] else float(truth.areas[i]),
            "iscrowd": int(truth.crowd[i] and not ignored[i]),
            **({} if truth.masks is None else {"segmentation": truth.masks[i]}),
        }
        for i in range(len(truth.labels))
    ]


def coco_results(image: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """What was found on an image, in COCO's words: boxes as left, top, width and height; masks run-length encoded."""
    corners = found["boxes"].double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    scores, labels = found["scores"].double().tolist(), found["labels"].tolist()
    shapes: list[Any] = [None] * len(labels)
    if "masks" in found and labels:
        # One by one: an image's masks together would be copied once more.
        inside = (found["masks"][:, 0] >= INSIDE).to(torch.uint8).cpu().numpy()
        encode = vision("faster_coco_eval.core.mask").encode
        shapes = [encode(np.asfortranarray(mask)) for mask in inside]
    return [
        {
            "image_id": image + 1,
            "category_id": label + 1,
            "bbox": box,
            "score": score,
            **({} if shape is None else {"segmentation": shape}),
        }
        for box, score, label, shape in zip(boxes.tolist(), scores, labels, shapes, strict=True)
    ]


class ObjectEvaluator:
    """COCO's average precision of boxes, and of masks where there are such, over all images together.

    Args:
        classes: Names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.images: dict[int, dict[str, Any]] = {}
        self.annotations: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.masks = True
        self._stats: dict[str, Any] = {}

    @torch.no_grad()
    def update(self, model: nn.Module, batch: AnnotatedImages) -> None:
        """Find the objects of one batch."""
        for truth, found in zip(batch.truths, model(batch.x), strict=True):
            self.add(truth, found)

    def add(self, truth: Known, found: dict[str, Tensor]) -> None:
        """One image: what is there, and what was found."""
        self.images[truth.image] = {"id": truth.image + 1, "height": truth.size[0], "width": truth.size[1]}
        self.masks = self.masks and truth.masks is not None and "masks" in found
        self.annotations += coco_annotations(truth)
        self.results += coco_results(truth.image, found)

    def reduce(self, gather: Callable[[Any], list[Any]]) -> None:
        """Bring the images of all processes together."""
        every = gather((self.images, self.annotations, self.results, self.masks))
        self.images = {number: image for images, *_ in every for number, image in images.items()}
        self.annotations = [each for _, annotations, *_ in every for each in annotations]
        self.results = [each for _, _, results, _ in every for each in results]
        self.masks = all(masks for *_, masks in every)

    def compute(self) -> dict[str, float]:
        """Average precision over overlaps of 0.5 to 0.95 ("map"), at 0.5 and 0.75, and at 0.5 of each class.

        Those of masks are called "mask_map" and so on. Classes that occur nowhere are left out; without any object,
        nothing is a number.
        """
        found: dict[str, float] = {}
        for kind, prefix in KINDS.items():
            if kind == "bbox" or (self.masks and self.images):
                found |= {f"{prefix}{name}": value for name, value in self._of(kind).items()}
        return found

    def _of(self, kind: str) -> dict[str, float]:
        if not any(not each["iscrowd"] and each["area"] < BEYOND for each in self.annotations):
            return dict.fromkeys(NAMES.values(), float("nan"))
        measured = self.measured(kind)
        # COCO's tools say -1 where there is nothing to measure.
        stats = {name: None if value == -1 else float(value) for name, value in measured.stats_as_dict.items()}
        self._stats[kind] = stats
        at_half = np.asarray(measured.eval["precision"])[0, :, :, 0, -1].T
        each = {
            f"map50 {name}": float(column[column > -1].mean())
            for name, column in zip(self.classes, at_half, strict=True)
            if (column > -1).any()
        }
        whole = {ours: float("nan") if (value := stats[theirs]) is None else value for theirs, ours in NAMES.items()}
        return {**whole, **each}

    def measured(self, kind: str) -> Any:
        """faster-coco-eval's own object, evaluated.

        Args:
            kind: "bbox" or "segm".
        """
        module = vision("faster_coco_eval")
        # Its C++ keeps what it is given, and it writes into it.
        truth = module.COCO(self.dataset())
        found = truth.loadRes([dict(each) for each in sorted(self.results, key=lambda each: each["image_id"])])
        evaluation = module.COCOeval_faster(truth, found, kind, print_function=lambda *_: None)
        evaluation.run()
        return evaluation

    def dataset(self) -> dict[str, Any]:
        """What is there, as one of COCO's files has it."""
        return {
            "images": [self.images[number] for number in sorted(self.images)],
            "annotations": [
                {"id": i + 1, **each} for i, each in enumerate(sorted(self.annotations, key=lambda e: e["image_id"]))
            ],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)],
        }

    def details(self) -> dict[str, Any]:
        """All of COCO's numbers, by the kind of overlap, and how many objects there were."""
        counts = np.bincount([each["category_id"] - 1 for each in self.annotations], minlength=len(self.classes))
        return {"objects": dict(zip(self.classes, counts.tolist(), strict=True)), "coco": self._stats}


@tasks.register("detection", kind="detection")
class Detection:
    """Find objects: their boxes, classes and, with Mask R-CNN, masks.

    Args:
        box: Weight of the losses of boxes' sides.
        mask: Weight of the loss of masks.
        select: By which average precision on the validation images the weights are kept.
    """

    def __init__(
        self, *, box: float = 1.0, mask: float = 1.0, select: Literal["map", "map50", "mask_map", "mask_map50"] = "map"
    ) -> None:
        if box < 0 or mask < 0:
            raise ConfigError(f"box={box}, mask={mask}: weights are from 0 on")
        self.box, self.mask, self.select = box, mask, select
        self.classes: tuple[str, ...] | None = None

    def for_data(self, data: Any) -> Self:
        """The same task for the data's classes.

        Raises:
            ConfigError: Weights are to be kept by masks, and the data gives none.
        """
        if self.select.startswith("mask") and not data.masks:
            raise ConfigError(f"select={self.select}, and the data gives no masks: data.masks=true.")
        task = copy.copy(self)
        task.classes = tuple(data.classes)
        return task

    def loss(self, model: nn.Module, batch: AnnotatedImages) -> Loss:
        """torchvision's losses, each a mean over what it counts in the batch: images, positions or proposals.

        Batches that are accumulated count by their images.
        """
        found, counts = model(batch.x, batch.targets, counted=True)
        some = next(iter(found.values()))
        images = torch.tensor(float(len(batch)), device=some.device)
        return Means.of(
            {name: (self._weight(name) * value, counts.get(name, images)) for name, value in found.items()}, images
        )

    def _weight(self, name: str) -> float:
        if name == "loss_mask":
            return self.mask
        return self.box if name in ("bbox_regression", "loss_box_reg", "loss_rpn_box_reg") else 1.0

    def evaluator(self) -> ObjectEvaluator:
        """A fresh evaluator.

        Raises:
            ConfigError: The task does not know the data's classes.
        """
        if self.classes is None:
            raise ConfigError("detection is evaluated by class: call for_data(data) first.")
        return ObjectEvaluator(self.classes)

    def score(self, metrics: dict[str, float]) -> float:
        """The number that decides, lower is better.

        Raises:
            ConfigError: The model finds no masks, and weights are to be kept by them; or no image has an object.
        """
        if self.select not in metrics:
            raise ConfigError(f"select={self.select}: the model finds no masks; take select=map or mask_rcnn.")
        if isnan(metrics[self.select]):
            raise ConfigError("no image that validates has an object that counts; take more images with data.val.")
        return 1 - metrics[self.select]
