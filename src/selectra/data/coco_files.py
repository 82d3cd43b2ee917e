"""COCO's JSON: images, categories and annotations of instances (cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from selectra.data.image_files import PARTS, SUFFIXES
from selectra.data.object_truth import Entry, Mark, Problems, wrong_box
from selectra.errors import DataError
from selectra.spec import nearest

SECTIONS = ("images", "annotations", "categories")


def read_coco(
    names: Sequence[str],
    files: Sequence[str],
    read: Callable[[str], bytes],
    classes: Sequence[str],
    problems: Problems,
) -> tuple[list[str], list[Entry], int]:
    """Classes, images in the order of the files and of their ids, and how many pictures no file lists.

    Args:
        names: The JSON files.
        files: All files.
        read: A file's content.
        classes: Names of the classes that count; all by default.
        problems: What to do with annotations that cannot be used.

    Raises:
        DataError: A file is damaged or of another form, or as `problems` says.
    """
    pictures = [name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES]
    by_name: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        by_name[PurePosixPath(picture).name].append(picture)
    contents = {name: _sections(name, read(name)) for name in names}
    named = _classes(contents, classes)
    entries: dict[str, Entry] = {}
    for name, content in contents.items():
        for entry in _entries(name, content, by_name, named, problems):
            first = entries.setdefault(entry.file, entry)
            # One image in two parts would be trained on and tested with; listed twice, each has half of its objects.
            if first is not entry:
                problems.meet("faulty", f"{entry.said} is listed already, as {first.said}.")
    return named, list(entries.values()), len(set(pictures) - entries.keys())


def _sections(name: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"'{name}' is no whole JSON file: {error}. It may be cut off; fetch it again.") from error
    absent = [key for key in SECTIONS if not isinstance(found, dict) or not isinstance(found.get(key), list)]
    if absent:
        raise DataError(
            f"'{name}' has no list {' and no list '.join(map(repr, absent))}; COCO's annotations of instances have "
            f"{', '.join(SECTIONS)}."
        )
    return found


def _classes(contents: dict[str, dict[str, Any]], wanted: Sequence[str]) -> list[str]:
    """Names of the classes by category id, the same in all files; or those that are asked for, in their order."""
    by_id: dict[int, str] = {}
    for name, content in contents.items():
        for category in content["categories"]:
            known = by_id.setdefault(category["id"], str(category["name"]))
            if known != str(category["name"]):
                raise DataError(
                    f"'{name}' calls category {category['id']} '{category['name']}', and another file of the set "
                    f"'{known}'; bring them to one list."
                )
    every = [by_id[number] for number in sorted(by_id)]
    absent = [name for name in wanted if name not in every]
    if absent:
        raise DataError(f"data.classes names '{absent[0]}', which no category has; there are {every}."
                        f"{nearest(absent[0], every)}")  # fmt: skip
    return list(wanted) or every


def _entries(
    name: str, content: dict[str, Any], by_name: dict[str, list[str]], classes: Sequence[str], problems: Problems
) -> list[Entry]:
    categories = {each["id"]: str(each["name"]) for each in content["categories"]}
    # Categories that the user left out by naming others are no error.
    left_out = {number for number, word in categories.items() if word not in classes}
    images = _images(name, content["images"])
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        number, of = annotation.get("id"), annotation.get("image_id")
        if of not in images:
            problems.meet(
                "faulty", f"annotation {number} in '{name}' is of image id {of}, which the file does not list."
            )
        elif annotation.get("category_id") not in categories:
            problems.meet(
                "unknown",
                f"annotation {number} of image id {of} in '{name}' has category id {annotation.get('category_id')}, "
                f"which the file does not name; its categories are {_shown(categories)}.",
            )
        elif annotation["category_id"] not in left_out:
            by_image[of].append(annotation)
    numbers, part, entries = {word: i for i, word in enumerate(classes)}, part_of(name), []
    for of in sorted(images):
        file = _file(images[of], by_name, name, part)
        if file is None:
            problems.meet("faulty", f"image id {of} in '{name}' is the file '{images[of].get('file_name')}', which is "
                                    "not there.")  # fmt: skip
            continue
        size = (images[of].get("height"), images[of].get("width"))
        known = (int(size[0]), int(size[1])) if None not in size else None
        said = f"image id {of} in '{name}' ('{file}')"
        marks = [
            Mark(box, numbers[categories[each["category_id"]]], float(each.get("area", box[2] * box[3])),
                 crowd=bool(each.get("iscrowd", 0)), shape=each.get("segmentation") or None,
                 said=f"annotation {each.get('id')}")
            for each in by_image[of]
            if (box := _box(each, known, said, problems)) is not None
        ]  # fmt: skip
        entries.append(Entry(file, f"'{file}' (image id {of} in '{name}')", known, part, tuple(marks)))
    return entries


def _images(name: str, listed: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Images by id."""
    found: dict[Any, dict[str, Any]] = {}
    for image in listed:
        first = found.setdefault(image["id"], image)
        if first is not image:
            raise DataError(
                f"'{name}' gives the id {image['id']!r} to two images, '{first.get('file_name')}' and "
                f"'{image.get('file_name')}', so that nothing says whose their annotations are: number images anew, as "
                "when several sets are joined."
            )
    return found


def _box(
    annotation: dict[str, Any], size: tuple[int, int] | None, of: str, problems: Problems
) -> tuple[float, float, float, float] | None:
    box = annotation.get("bbox")
    wrong = "is not there" if not isinstance(box, list) else wrong_box(box, size)
    if wrong is None:
        left, top, width, height = box  # pyright: ignore[reportGeneralTypeIssues]
        return left, top, width, height
    problems.meet("degenerate", f"the box of annotation {annotation.get('id')} of {of} {wrong}.")
    return None


def _shown(categories: dict[int, str]) -> str:
    first = [f"{number} {word}" for number, word in list(categories.items())[:6]]
    return ", ".join(first) + (f" and {len(categories) - 6} more" if len(categories) > 6 else "")


def _file(image: dict[str, Any], by_name: dict[str, list[str]], name: str, part: str | None) -> str | None:
    """Where an image lies: what ends like its file name, beside the annotations or in the part's folder first."""
    wanted = str(image.get("file_name", ""))
    ends = [path for path in by_name.get(PurePosixPath(wanted).name, ()) if f"/{path}".endswith(f"/{wanted}")]
    beside = str(PurePosixPath(name).parent / wanted)
    if beside in ends:
        return beside
    own = [path for path in ends if part is not None and part_of(path) == part]
    return next(iter(own or ends), None)


def part_of(name: str) -> str | None:
    """The part that a path's words name, such as "train" in instances_train2017.json; the last word counts first."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((PARTS[word] for word in reversed(words) if word in PARTS), None)
