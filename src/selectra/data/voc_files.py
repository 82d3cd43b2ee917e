"""Pascal VOC's XML: one file an image, parts in lists (host.robots.ox.ac.uk/pascal/VOC, development kit)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from xml.etree import ElementTree

from selectra.data.image_files import SUFFIXES
from selectra.data.object_truth import Entry, Mark, Problems, wrong_box

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
FOLDER, IMAGES, LISTS = "Annotations", "JPEGImages", "ImageSets/Main"
PARTS = ("train", "val", "test")


def read_voc(
    files: Sequence[str], read: Callable[[str], bytes], classes: Sequence[str], difficult: bool, problems: Problems
) -> tuple[list[str], list[Entry], int]:
    """Classes, images in the order of their names, and how many pictures have no annotations.

    Without `classes` they are VOC's twenty where all names are of these, else all names that occur, sorted.

    Args:
        files: All files.
        read: A file's content.
        classes: Names of the classes.
        difficult: Whether objects marked as difficult count as others do.
        problems: What to do with annotations that cannot be used.

    Raises:
        DataError: As `problems` says.
    """
    top = next(str(PurePosixPath(name).parent.parent) for name in files if f"/{name}".endswith(".xml")
               and PurePosixPath(name).parent.name == FOLDER)  # fmt: skip
    prefix = "" if top == "." else f"{top}/"
    notes = {PurePosixPath(name).stem: name for name in files if _inside(name, prefix + FOLDER, {".xml"})}
    pictures = {PurePosixPath(name).stem: name for name in files if _inside(name, prefix + IMAGES, SUFFIXES)}
    parts = _parts(prefix, files, read, notes, problems)
    trees = {}
    for stem in sorted(notes):
        if parts and stem not in parts:
            continue
        try:
            trees[stem] = ElementTree.fromstring(read(notes[stem]))
        except ElementTree.ParseError as error:
            problems.meet("faulty", f"'{notes[stem]}' is no whole XML file: {error}.")
    named = list(classes) or _names(trees.values())
    entries = []
    for stem, tree in trees.items():
        if stem not in pictures:
            problems.meet(
                "faulty", f"'{notes[stem]}' is of an image that is not there: no '{prefix}{IMAGES}/{stem}.*'."
            )
            continue
        size = _size(tree)
        marks = [_mark(thing, named, notes[stem], size, difficult, problems) for thing in tree.iter("object")]
        kept = tuple(mark for mark in marks if mark is not None)
        entries.append(Entry(pictures[stem], f"'{pictures[stem]}'", size, parts.get(stem), kept))
    return named, entries, len(pictures.keys() - trees.keys())


def _inside(name: str, folder: str, suffixes: frozenset[str] | set[str]) -> bool:
    path = PurePosixPath(name)
    return str(path.parent) == folder and path.suffix.lower() in suffixes


def _parts(
    prefix: str, files: Sequence[str], read: Callable[[str], bytes], notes: dict[str, str], problems: Problems
) -> dict[str, str]:
    """The part of every name in the lists; what only "trainval" lists is for training."""
    found: dict[str, str] = {}
    for part in ("trainval", *PARTS):
        name = f"{prefix}{LISTS}/{part}.txt"
        for line in read(name).decode(errors="replace").splitlines() if name in files else ():
            stem = line.strip()
            if stem and stem not in notes:
                problems.meet("faulty", f"'{name}' lists '{stem}', and there is no '{prefix}{FOLDER}/{stem}.xml'.")
            elif stem:
                found[stem] = "train" if part == "trainval" else part
    return found


def _names(trees: object) -> list[str]:
    found = {_text(thing, "name") for tree in list(trees) for thing in tree.iter("object")}  # pyright: ignore
    return list(VOC) if found <= set(VOC) else sorted(found)


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    height, width = (_text(tree, f"size/{side}") for side in ("height", "width"))
    # Some tools leave zeros.
    return (int(height), int(width)) if height.isdigit() and width.isdigit() and int(height) * int(width) else None


def _mark(
    thing: ElementTree.Element,
    classes: Sequence[str],
    note: str,
    size: tuple[int, int] | None,
    difficult: bool,
    problems: Problems,
) -> Mark | None:
    """An object; its corners count pixels from 1 on, and the last one is inside."""
    name = _text(thing, "name")
    if name not in classes:
        problems.meet("unknown", f"'{note}' has an object '{name}'; the classes are {list(classes)}.")
        return None
    try:
        left, top, right, bottom = (float(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        problems.meet("degenerate", f"a box of '{name}' in '{note}' lacks a side or has one that is no number.")
        return None
    # A box of one pixel is a slip of the hand, not an object.
    slip = right <= left or bottom <= top
    box = (left, top, right - left, bottom - top) if slip else (left - 1, top - 1, right - left + 1, bottom - top + 1)
    wrong = wrong_box(box, size)
    if wrong is not None:
        problems.meet("degenerate", f"a box of '{name}' in '{note}' {wrong}.")
        return None
    ignored = not difficult and _text(thing, "difficult") == "1"
    return Mark(box, classes.index(name), box[2] * box[3], ignored=ignored)
