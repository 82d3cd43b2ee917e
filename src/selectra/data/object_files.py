"""Where images and their objects come from: COCO's JSON and Pascal VOC's XML, in folders and zip files.

Everything annotated is read and checked at once, before a picture is decoded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from selectra.data.coco_files import read_coco
from selectra.data.image_files import Arrays, Mixed, places
from selectra.data.image_listing import Source
from selectra.data.mask_files import found_root, hidden
from selectra.data.object_truth import Entry, Mark, Problems
from selectra.data.voc_files import read_voc
from selectra.errors import DataError

Layout = Literal["auto", "coco", "voc"]
Place = Path | tuple[Path, str]
# Folders in SELECTRA_DATA.
PUBLIC = {
    "bccd": ("bccd", "BCCD's 364 blood smears with 4,888 boxes: bccd_voc.zip"),
    "coco_mini": ("coco-mini", "80 images of COCO 2017: coco_mini.zip"),
}
HOW = {
    "coco": "annotations/instances_PART.json and the images anywhere, or PART/_annotations.coco.json beside them",
    "voc": "Annotations/NAME.xml and JPEGImages/NAME.jpg, parts in ImageSets/Main/PART.txt",
}
NO_INSTANCES = re.compile(r"(^|/)(panoptic|captions|person_keypoints|stuff|image_info)_[^/]*$")


@dataclass(frozen=True)
class ObjectListing:
    """Images and their objects by number.

    Args:
        where: What was listed, for messages.
        classes: Names.
        entries: Of every image.
        images: Reads them.
        digest: Changes when a file is added, renamed or replaced.
        alone: Images without annotations in a file of their own, which are not used.
    """

    where: str
    classes: tuple[str, ...]
    entries: Sequence[Entry]
    images: Source
    digest: str
    alone: int


def list_objects(
    path: str, layout: Layout, classes: Sequence[str], difficult: bool, problems: Problems
) -> ObjectListing:
    """List the images of a public set by name, of a folder, or of a zip file.

    Args:
        path: "bccd" or "coco_mini" in SELECTRA_DATA, a folder, or a zip file.
        layout: How files lie; "auto" finds out.
        classes: Names of the classes; annotations of others are unknown. By default all that the files name.
        difficult: Whether objects that Pascal VOC marks as difficult count as others do.
        problems: What to do with annotations that cannot be used.

    Raises:
        DataError: There is no such thing, or it holds no annotated images.
    """
    root = found_root(path, PUBLIC, "annotated images")
    found = {str(inside): (place, mark) for inside, place, mark in places(root) if not hidden(inside)}
    if not found:
        raise DataError(f"'{path}' holds no files.")
    kind = _detect(found) if layout == "auto" else layout
    every, at = Mixed([place for place, _ in found.values()]), {name: i for i, name in enumerate(found)}

    def read(name: str) -> bytes:
        return every.read(at[name])

    if kind == "coco":
        names = _coco_names(list(found))
        named, entries, alone = read_coco(names, list(found), read, classes, problems)
    else:
        named, entries, alone = read_voc(list(found), read, classes, difficult, problems)
    if not entries:
        raise DataError(
            f"'{path}' holds no annotated images in the layout '{kind}': {HOW[kind]}. The other layout is "
            f"'{'voc' if kind == 'coco' else 'coco'}': {HOW['voc' if kind == 'coco' else 'coco']}."
        )
    # What is annotated is a part of the set's mark, and so are the files.
    marks = "\n".join(f"{name} {found[name][1]}" for name in sorted(found))
    return ObjectListing(
        path, tuple(named), entries, Mixed([found[entry.file][0] for entry in entries]),
        hashlib.sha256(marks.encode()).hexdigest()[:16], alone,
    )  # fmt: skip


def _detect(files: Mapping[str, Any]) -> str:
    return "voc" if any(re.search(r"(^|/)Annotations/.*\.xml$", name) for name in files) else "coco"


def _coco_names(files: Sequence[str]) -> list[str]:
    """The files of instances: by their usual names, or every JSON file that is not known to be of another kind."""
    usual = [name for name in files if re.search(r"(^|/)(instances_[^/]*|_annotations\.coco)\.json$", name)]
    every = [name for name in files if PurePosixPath(name).suffix == ".json" and not NO_INSTANCES.search(name)]
    return sorted(usual or every)


def shapes() -> ObjectListing:
    """160 drawn images of 48 x 64 pixels with two shapes each: disc, ring, square or cross, with boxes and masks."""
    import numpy as np  # noqa: PLC0415

    from selectra.data.image_examples import shape_masks  # noqa: PLC0415

    images, masks, (_, *classes) = shape_masks()
    entries = []
    for i, mask in enumerate(masks):
        marks = []
        for first in (0, 32):
            half = np.zeros_like(mask)
            half[:, first : first + 32] = mask[:, first : first + 32]
            rows, columns = np.nonzero(half)
            left, top = int(columns.min()), int(rows.min())
            box = (left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top)
            marks.append(Mark(box, int(half.max()) - 1, float(len(rows)), shape=half > 0))
        entries.append(Entry(f"image {i}", f"'image {i}'", mask.shape, None, tuple(marks)))
    digest = hashlib.sha256(images.tobytes() + masks.tobytes()).hexdigest()[:16]
    return ObjectListing("shapes", tuple(classes), entries, Arrays(images), digest, 0)
