"""COCO's JSON: images, categories and annotations of instances (cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeGuard

from selectra.data.image_files import PARTS, SUFFIXES
from selectra.data.object_truth import Entry, Mark, Problems, is_finite, wrong_box
from selectra.errors import DataError
from selectra.spec import nearest

# Whole numbers by COCO's form; some tools write text.
Id = int | str
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
    """Names of the classes by category id, the same in all files; or those that are asked for, in their order.

    Categories of one name are one class: some tools write the name of the whole project as a category of its own.
    """
    by_id: dict[Id, str] = {}
    for name, content in contents.items():
        for category in content["categories"]:
            if not isinstance(category, dict) or not _is_id(category.get("id")) or not category.get("name"):
                raise DataError(f"'{name}' has the category {_cut(category)}; a category has an id (a number) and "
                                "a name. Correct it.")  # fmt: skip
            known = by_id.setdefault(category["id"], str(category["name"]))
            if known != str(category["name"]):
                raise DataError(
                    f"'{name}' calls category {category['id']} '{category['name']}', and elsewhere the set calls it "
                    f"'{known}'; bring them to one list."
                )
    every = list(dict.fromkeys(by_id[number] for number in sorted(by_id, key=_order)))
    if contents and not every:
        raise DataError(f"{', '.join(map(repr, contents))}: the list 'categories' is empty, so there are no classes.")
    absent = [name for name in wanted if name not in every]
    if absent:
        raise DataError(f"data.classes names '{absent[0]}', which no category has; there are {every}."
                        f"{nearest(absent[0], every)}")  # fmt: skip
    return list(wanted) or every


def _entries(
    name: str, content: dict[str, Any], by_name: dict[str, list[str]], classes: Sequence[str], problems: Problems
) -> list[Entry]:
    categories: dict[Id, str] = {each["id"]: str(each["name"]) for each in content["categories"]}
    # Categories that the user left out by naming others are no error.
    left_out = {number for number, word in categories.items() if word not in classes}
    images = _images(name, content["images"], problems)
    by_image: dict[Id, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict):
            problems.meet("faulty", f"'{name}' has the annotation {_cut(annotation)}, which is no record of fields.")
            continue
        number, of, category = (annotation.get(key) for key in ("id", "image_id", "category_id"))
        if not _is_id(of) or of not in images:
            problems.meet(
                "faulty", f"annotation {number} in '{name}' is of image id {_cut(of)}, which the file does not list."
            )
        elif not _is_id(category) or category not in categories:
            problems.meet(
                "unknown",
                f"annotation {number} of image id {of} in '{name}' has category id {_cut(category)}, "
                f"which the file does not name; its categories are {_shown(categories)}.",
            )
        elif category not in left_out:
            by_image[of].append(annotation)
    numbers, part, entries = {word: i for i, word in enumerate(classes)}, part_of(name), []
    for of in sorted(images, key=_order):
        file = _file(images[of], by_name, name, part)
        if file is None:
            problems.meet("faulty", f"image id {of} in '{name}' is the file '{images[of].get('file_name')}', which is "
                                    "not there.")  # fmt: skip
            continue
        height, width = images[of].get("height"), images[of].get("width")
        known = None if height is None or width is None else (int(height), int(width))
        said = f"image id {of} in '{name}' ('{file}')"
        read = [_mark(each, numbers[categories[each["category_id"]]], known, said, problems) for each in by_image[of]]
        marks = tuple(mark for mark in read if mark is not None)
        entries.append(Entry(file, f"'{file}' (image id {of} in '{name}')", known, part, marks))
    return entries


def _images(name: str, listed: Sequence[Any], problems: Problems) -> dict[Id, dict[str, Any]]:
    """Images by id, those whose fields are of the right types."""
    found: dict[Id, dict[str, Any]] = {}
    for image in listed:
        if not isinstance(image, dict) or not _is_id(image.get("id")):
            problems.meet("faulty", f"'{name}' lists the image {_cut(image)}; an image has an id, a whole number.")
            continue
        first = found.setdefault(image["id"], image)
        if first is not image:
            raise DataError(
                f"'{name}' gives the id {image['id']!r} to two images, '{first.get('file_name')}' and "
                f"'{image.get('file_name')}', so that nothing says whose their annotations are: number images anew, as "
                "when several sets are joined."
            )
    for of, image in list(found.items()):
        sides = {side: image.get(side) for side in ("height", "width")}
        wrong = next((side for side, value in sides.items() if not (value is None or _is_length(value))), None)
        if wrong is not None:
            problems.meet("faulty", f"image id {of} in '{name}' has {wrong} {_cut(sides[wrong])}, no whole number "
                                    "of pixels.")  # fmt: skip
            del found[of]
    return found


def _mark(
    annotation: dict[str, Any], label: int, size: tuple[int, int] | None, of: str, problems: Problems
) -> Mark | None:
    """An annotation of a known class; None, and a problem met, where its fields cannot be used."""
    box, said = annotation.get("bbox"), f"annotation {annotation.get('id')}"
    wrong = "is not there" if not isinstance(box, list) else wrong_box(box, size)
    if wrong is not None:
        problems.meet("degenerate", f"the box of {said} of {of} {wrong}.")
        return None
    left, top, width, height = box  # pyright: ignore[reportGeneralTypeIssues]
    area, crowd = annotation.get("area"), annotation.get("iscrowd", 0)
    area = width * height if area is None else area
    if not is_finite(area) or area < 0:
        problems.meet("faulty", f"{said} of {of} has area {_cut(area)}, not pixels in a number from 0 on.")
        return None
    if crowd not in (0, 1):
        problems.meet("faulty", f"{said} of {of} has iscrowd {_cut(crowd)}, not 0 or 1.")
        return None
    shape = annotation.get("segmentation") or None
    return Mark((left, top, width, height), label, float(area), crowd=bool(crowd), shape=shape, said=said)


def _is_id(value: Any) -> TypeGuard[Id]:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _order(value: Id) -> tuple[bool, Id]:
    """Sorts ids, numbers before text."""
    return isinstance(value, str), value


def _is_length(value: Any) -> bool:
    return is_finite(value) and value > 0 and value == int(value)


def _cut(value: Any) -> str:
    """A value as messages show it."""
    return repr(value)[:60]


def _shown(categories: dict[Id, str]) -> str:
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
