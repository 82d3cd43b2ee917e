"""Where images and their masks come from: CamVid, ADE20K, Cityscapes, LoveDA, Potsdam, Vaihingen, lists and folders.

Each becomes a `MaskListing`: what pairs there are, of which official part, and what their masks mean, without a picture
being decoded. Only images with a mask are listed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from selectra.data import mask_coding as coding
from selectra.data.image_files import PARTS, SUFFIXES, Mixed, places
from selectra.data.image_listing import Source
from selectra.data.mask_coding import Coding
from selectra.data.public import FOLDER_VARIABLE, folders
from selectra.errors import ConfigError, DataError
from selectra.spec import nearest

Layout = Literal["auto", "lists", "ade20k", "cityscapes", "loveda", "potsdam", "vaihingen", "folders"]
Place = Path | tuple[Path, str]
# Folders in SELECTRA_DATA.
PUBLIC = {"camvid": ("camvid", "CamVid's 701 frames in 11 classes: camvid.zip")}
IMAGES = ("images", "image", "img_dir", "imgs", "img", "jpegimages")
MASKS = ("masks", "mask", "ann_dir", "annotations", "labels", "label", "annots", "segmentationclass")
CLASSES = "classes.txt"
# Tiles that the ISPRS benchmark's users train on; the others are the test.
VAIHINGEN = {1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37}
POTSDAM_TEST = {"2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15",
                "7_13"}  # fmt: skip


class Pair(NamedTuple):
    """An image and its mask, by their paths inside."""

    image: str
    mask: str
    part: str | None


@dataclass(frozen=True)
class MaskListing:
    """Images and masks by number.

    Args:
        where: What was listed, for messages.
        coding: What the masks mean; None where nobody says, so that they have to be read.
        names: A name for every image, for messages.
        mask_names: For every mask.
        parts: "train", "val" or "test" for every pair; None where nobody has split them.
        images: Reads images.
        masks: Reads masks.
        digest: Changes when a file is added, renamed or replaced.
        alone: Images that have no mask.
    """

    where: str
    coding: Coding | None
    names: Sequence[str]
    mask_names: Sequence[str]
    parts: np.ndarray[Any, Any] | None
    images: Source
    masks: Source
    digest: str
    alone: int


Files = Mapping[str, tuple[Place, str]]
Found = tuple[list[Pair], Coding | None]


def list_masks(
    path: str,
    layout: Layout = "auto",
    classes: Sequence[str] = (),
    first: int = 0,
    ignored: Sequence[int] = (255,),
    labels: Sequence[int] = (),
) -> MaskListing:
    """List the pairs of a public set by name, of a folder, or of a zip file.

    Args:
        path: "camvid" in SELECTRA_DATA, a folder, or a zip file.
        layout: How files lie; "auto" finds out.
        classes: Names of the classes, where neither the layout nor classes.txt says them.
        first: Number of the first of these.
        ignored: Numbers that do not count beside these.
        labels: Numbers of the classes, where they do not follow each other.

    Raises:
        DataError: There is no such thing, or it holds no images with masks.
        ConfigError: The set has classes or labels of its own; there are not as many labels as classes.
    """
    root = found_root(path, PUBLIC, "masks")
    found = {str(inside): (place, mark) for inside, place, mark in places(root) if not hidden(inside)}
    files, prefix = _below(found)
    kind = _detect(files) if layout == "auto" else layout
    pairs, masks_mean = LAYOUTS[kind](files)
    if not pairs:
        raise DataError(
            f"'{path}' holds no images with masks in the layout '{kind}': {HOW[kind]}. "
            f"Layouts are {', '.join(get_args(Layout)[1:])}."
        )
    named = _named(files, classes, masks_mean, first, ignored, labels)
    lost = next((name for pair in pairs for name in pair[:2] if name not in files), None)
    if lost is not None:
        raise DataError(f"a list in '{path}' names '{lost}', which is not there.")
    marks = "\n".join(f"{pair.image} {files[pair.image][1]} {files[pair.mask][1]}" for pair in pairs)
    paired = {pair.image for pair in pairs}
    alone = sum(_is_image(name) and name not in paired and _looks_like(name, IMAGES) for name in files)
    split = all(pair.part is not None for pair in pairs)
    return MaskListing(
        path, named, [prefix + pair.image for pair in pairs], [prefix + pair.mask for pair in pairs],
        np.array([pair.part for pair in pairs]) if split else None,
        Mixed([files[pair.image][0] for pair in pairs]), Mixed([files[pair.mask][0] for pair in pairs]),
        hashlib.sha256(marks.encode()).hexdigest()[:16], alone,
    )  # fmt: skip


def found_root(path: str, public: Mapping[str, tuple[str, str]], kind: str) -> Path:
    """The folder or zip file that a path or the name of a public set stands for.

    Args:
        path: As the user has it.
        public: Folders in SELECTRA_DATA and what lies in them, by name.
        kind: What is looked for, in words.

    Raises:
        DataError: There is no such thing.
    """
    if path in public:
        folder, what = public[path]
        for place in folders():
            if (place / folder).is_dir():
                return place / folder
        looked = " and ".join(repr(str(place)) for place in folders()) or "no folder"
        raise DataError(
            f"{path} ({what}) is not on this machine; looked for '{folder}' in {looked}. "
            f"Name the folder that holds it in {FOLDER_VARIABLE}."
        )
    root = Path(path).expanduser()
    if root.is_dir() or (root.is_file() and root.suffix == ".zip"):
        return root
    raise DataError(f"there are no {kind} at '{path}': it is no folder, no zip file and none of {list(public)}."
                    f"{nearest(path, public)}")  # fmt: skip


def hidden(inside: PurePosixPath) -> bool:
    """Whether a file is none of the set's own."""
    return any(part.startswith((".", "__MACOSX")) for part in inside.parts)


def _below(files: Files) -> tuple[Files, str]:
    """The files without a folder that all of them share, and that folder."""
    tops = {name.partition("/")[0] for name in files if "/" in name}
    loose = any("/" not in name for name in files)
    top = next(iter(tops), "").lower()
    if loose or len(tops) != 1 or top in (*PARTS, *IMAGES, *MASKS, "leftimg8bit"):
        return files, ""
    shared = f"{next(iter(tops))}/"
    inner, prefix = _below({name.removeprefix(shared): value for name, value in files.items()})
    return inner, shared + prefix


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _looks_like(name: str, words: Sequence[str]) -> bool:
    return any(part.lower() in words for part in PurePosixPath(name).parts[:-1])


def _detect(files: Files) -> str:
    marks = (
        ("cityscapes", r"leftImg8bit/[^/]+/[^/]+/.*_leftImg8bit\.\w+$"),
        ("loveda", r"\w+/(Urban|Rural)/(images_png|masks_png)/"),
        ("ade20k", r"annotations/(training|validation)/"),
        ("potsdam", r"(^|/)top_potsdam_\d+_\d+"),
        ("vaihingen", r"(^|/)top_mosaic_09cm_area\d+"),
        ("lists", r"^(train|training)\.txt$"),
    )
    for kind, pattern in marks:
        if any(re.search(pattern, name) for name in files):
            return kind
    return "folders"


def _named(
    files: Files,
    classes: Sequence[str],
    found: Coding | None,
    first: int,
    ignored: Sequence[int],
    labels: Sequence[int],
) -> Coding | None:
    """What masks mean: as the layout says, as classes.txt or the run names the classes; None where nobody does."""
    if found is not None:
        if (classes and tuple(classes) != found.classes) or labels:
            given = f"labels={tuple(labels)}" if labels else f"classes={tuple(classes)}"
            raise ConfigError(
                f"{given}: the set has its own, {found.classes}; leave data.{given.partition('=')[0]} out."
            )
        return found
    names = classes or (_text(files, CLASSES) if CLASSES in files else [f"class {label}" for label in labels])
    if labels and (len(labels) != len(names) or len(set(labels)) < len(labels)):
        raise ConfigError(f"labels={tuple(labels)}: needs one for each of the {len(names)} classes {tuple(names)}")
    return coding.by_numbers(names, first=first, ignored=ignored, labels=labels) if names else None


def _text(files: Files, name: str) -> list[str]:
    place = files[name][0]
    content = Mixed([place]).read(0)
    assert isinstance(content, bytes)
    try:
        return [line.strip() for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"'{name}' is no text: {error}") from error


def _lists(files: Files) -> Found:
    pairs = []
    for stem, part in PARTS.items():
        if f"{stem}.txt" not in files:
            continue
        for line in _text(files, f"{stem}.txt"):
            words = line.split()
            if len(words) != 2:
                raise DataError(f"'{stem}.txt' has the line '{line}'; it must be an image's and a mask's path.")
            # SegNet's lists begin at the root of its own disk.
            image, mask = (re.sub(r"^/?(SegNet/)?(CamVid/)?", "", word) for word in words)
            pairs.append(Pair(image, mask, part))
    camvid = any("annot/" in pair.mask for pair in pairs)
    return pairs, coding.CAMVID if camvid and CLASSES not in files else None


def _ade20k(files: Files) -> Found:
    pairs = []
    for name in files:
        found = re.fullmatch(r"images/(training|validation)/(.+)\.jpg", name)
        mask = "" if found is None else f"annotations/{found[1]}/{found[2]}.png"
        if found and mask in files:
            pairs.append(Pair(name, mask, "train" if found[1] == "training" else "test"))
    meaning = coding.ADE20K
    if "objectInfo150.txt" in files:
        names = [line.split("\t")[-1].split(",")[0].strip() for line in _text(files, "objectInfo150.txt")[1:]]
        if len(set(names)) == len(names) == len(meaning.classes):
            meaning = coding.by_numbers(names, meaning.colours, first=1, ignored=(0,))
    return pairs, meaning


def _cityscapes(files: Files) -> Found:
    pairs = []
    for kind, meaning in (("labelTrainIds", coding.CITYSCAPES_TRAIN), ("labelIds", coding.CITYSCAPES)):
        for name in files:
            found = re.fullmatch(r"leftImg8bit/(train|val)/([^/]+)/(.+)_leftImg8bit(\.\w+)", name)
            mask = "" if found is None else f"gtFine/{found[1]}/{found[2]}/{found[3]}_gtFine_{kind}.png"
            if found and mask in files:
                pairs.append(Pair(name, mask, "train" if found[1] == "train" else "test"))
        if pairs:
            return pairs, meaning
    return [], None


def _loveda(files: Files) -> Found:
    pairs = []
    for name in files:
        found = re.fullmatch(r"(Train|Val)/(Urban|Rural)/images_png/(.+)\.png", name)
        mask = "" if found is None else f"{found[1]}/{found[2]}/masks_png/{found[3]}.png"
        if found and mask in files:
            pairs.append(Pair(name, mask, "train" if found[1] == "Train" else "test"))
    return pairs, coding.LOVEDA


def _potsdam(files: Files) -> Found:
    """The benchmark's folders, colours or infrared; labels with boundaries."""
    images, masks = {}, {}
    for name in files:
        found = re.search(r"top_potsdam_(\d+_\d+)_(label_noBoundary|label|RGBIR|IRRG|RGB)\.tiff?$", name)
        if found and found[2] in ("RGB", "IRRG"):
            # In colours where there are both.
            images[found[1]] = name if found[2] == "RGB" else images.get(found[1], name)
        elif found and found[2] == "label":
            masks[found[1]] = name
    tiles = sorted(images.keys() & masks.keys())
    return [Pair(images[t], masks[t], "test" if t in POTSDAM_TEST else "train") for t in tiles], coding.ISPRS


def _vaihingen(files: Files) -> Found:
    images, masks = {}, {}
    for name in files:
        found = re.search(r"(?:^|/)(top|gts[^/]*|ISPRS[^/]*)/top_mosaic_09cm_area(\d+)\.tiff?$", name)
        if found:
            (images if found[1] == "top" else masks)[int(found[2])] = name
    areas = sorted(images.keys() & masks.keys())
    return [Pair(images[a], masks[a], "train" if a in VAIHINGEN else "test") for a in areas], coding.ISPRS


def _folders(files: Files) -> Found:
    """A folder of images and one of masks, which have the images' names; folders of parts in them or around them."""
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    parts: dict[str, str | None] = {}
    for name in filter(_is_image, files):
        path = PurePosixPath(name)
        words = [part for part in path.parts[:-1] if part.lower() not in (*IMAGES, *MASKS)]
        side = 0 if _looks_like(name, IMAGES) else 1 if _looks_like(name, MASKS) else None
        if side is None:
            continue
        key = "/".join([*words, re.sub(r"(_mask|_label|_gt|_labels)$", "", path.stem)])
        sides[side][key] = name
        parts[key] = next((PARTS[word.lower()] for word in words if word.lower() in PARTS), None)
    keys = sorted(sides[0].keys() & sides[1].keys())
    return [Pair(sides[0][key], sides[1][key], parts[key]) for key in keys], None


LAYOUTS: dict[str, Callable[[Files], Found]] = {
    "lists": _lists, "ade20k": _ade20k, "cityscapes": _cityscapes, "loveda": _loveda, "potsdam": _potsdam,
    "vaihingen": _vaihingen, "folders": _folders,
}  # fmt: skip
HOW = {
    "lists": "train.txt, val.txt and test.txt with the paths of an image and a mask in every line",
    "ade20k": "images/training/NAME.jpg and annotations/training/NAME.png, and the same in validation",
    "cityscapes": "leftImg8bit/train/CITY/NAME_leftImg8bit.png and gtFine/train/CITY/NAME_gtFine_labelIds.png",
    "loveda": "Train/Urban/images_png/NAME.png and Train/Urban/masks_png/NAME.png, also Rural and Val",
    "potsdam": "2_Ortho_RGB/top_potsdam_2_10_RGB.tif and 5_Labels_all/top_potsdam_2_10_label.tif",
    "vaihingen": "top/top_mosaic_09cm_area1.tif and gts_for_participants/top_mosaic_09cm_area1.tif",
    "folders": "images/NAME.jpg and masks/NAME.png, or train/ and val/ in or around these",
}
