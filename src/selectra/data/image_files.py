"""Where images come from: folders, zip files, parquet tables, arrays, torchvision's sets, and public sets by name.

Each becomes a `Listing`: what there is, of which class and official part, without a picture being decoded.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selectra.data.image_examples import digits, shapes
from selectra.data.image_listing import Listing
from selectra.data.image_torchvision import TORCHVISION, torchvision_set
from selectra.data.public import FOLDER_VARIABLE, folders
from selectra.errors import DataError
from selectra.spec import nearest

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy"))
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Folders in SELECTRA_DATA, and what must lie in them.
PUBLIC = {
    "cifar10_jpeg": ("cifar10-jpeg", "all of CIFAR-10 as JPEG: train.zip and test.zip"),
    "fashion_mnist": ("fashion-mnist", "Fashion-MNIST in IDX files"),
    "ucmerced": ("ucmerced128", "UC Merced land use at 128 x 128 pixels: ucmerced_128.zip"),
}
EXAMPLES = {"shapes": shapes, "digits": digits}


class Files:
    """Files on disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def read(self, i: int) -> bytes:
        return self.paths[i].read_bytes()


class Zipped:
    """Members of zip files; every process opens its own."""

    def __init__(self, members: Sequence[tuple[Path, str]]) -> None:
        self.members = members
        self.opened: dict[tuple[int, Path], zipfile.ZipFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "opened": {}}

    def read(self, i: int) -> bytes:
        path, member = self.members[i]
        key = (os.getpid(), path)
        if key not in self.opened:
            self.opened[key] = zipfile.ZipFile(path)
        return self.opened[key].read(member)


class Mixed:
    """Files on disk and members of zip files beside each other; the place of an image is a path or a member."""

    def __init__(self, places: Sequence[Path | tuple[Path, str]]) -> None:
        self.files = Files([place for place in places if isinstance(place, Path)])
        self.zipped = Zipped([place for place in places if not isinstance(place, Path)])
        kinds = np.array([isinstance(place, Path) for place in places])
        # The number of each image among those of its kind.
        self.at = np.where(kinds, np.cumsum(kinds), np.cumsum(~kinds)) - 1
        self.kinds = kinds

    def read(self, i: int) -> bytes:
        source = self.files if self.kinds[i] else self.zipped
        return source.read(int(self.at[i]))


class Table:
    """A column of encoded images, as Hugging Face writes them: bytes, or a struct with a field "bytes"."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def read(self, i: int) -> bytes:
        value = self.column[i].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value if isinstance(value, bytes) else b""


class Arrays:
    """Pixels in memory, `(n, h, w)` or `(n, h, w, c)`."""

    def __init__(self, pixels: np.ndarray[Any, Any]) -> None:
        self.pixels = pixels

    def read(self, i: int) -> np.ndarray[Any, Any]:
        return self.pixels[i]


def list_images(path: str, download: bool = False) -> Listing:
    """List what `path` means: a public or an example set, a set of torchvision's, a folder, a zip or parquet file.

    Raises:
        DataError: There is no such thing, or it holds no images in folders of classes.
    """
    if path in EXAMPLES:
        return _arrays(path, *EXAMPLES[path]())
    if path in PUBLIC:
        return _public(path)
    if path.startswith(TORCHVISION):
        return torchvision_set(path.removeprefix(TORCHVISION), download)
    found = Path(path).expanduser()
    if found.is_dir() or (found.is_file() and found.suffix == ".zip"):
        if found.is_dir() and any(found.rglob("*.parquet")):
            return _parquet(found)
        return list_folder(found)
    if found.is_file() and found.suffix == ".parquet":
        return _parquet(found)
    known = [*EXAMPLES, *PUBLIC]
    raise DataError(
        f"there are no images at '{path}': it is no folder, zip or parquet file, none of {known}, "
        f"and no '{TORCHVISION}NAME'.{nearest(path, known)}"
    )


def _public(name: str) -> Listing:
    folder, what = PUBLIC[name]
    for place in folders():
        if (place / folder).is_dir():
            return _fashion_mnist(place / folder) if name == "fashion_mnist" else list_folder(place / folder)
    looked = " and ".join(repr(str(place)) for place in folders()) or "no folder"
    raise DataError(
        f"{name} ({what}) is not on this machine; looked for '{folder}' in {looked}. "
        f"Name the folder that holds it in {FOLDER_VARIABLE}."
    )


def places(root: Path) -> list[tuple[PurePosixPath, Path | tuple[Path, str], str]]:
    """Every file below a folder or in a zip file, zip files opened: its path inside, its place, and a mark."""
    if root.is_file():
        try:
            with zipfile.ZipFile(root) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
        except zipfile.BadZipFile as error:
            raise DataError(f"'{root}' is no whole zip file: {error}") from error
        return [(PurePosixPath(m.filename), (root, m.filename), f"{m.file_size} {m.CRC:x}") for m in members]
    found: list[tuple[PurePosixPath, Path | tuple[Path, str], str]] = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix == ".zip":
            inside = PurePosixPath(path.relative_to(root).parent.as_posix())
            found += [(inside / name, place, mark) for name, place, mark in places(path)]
        elif path.is_file():
            found.append((PurePosixPath(path.relative_to(root).as_posix()), path, str(path.stat().st_size)))
    return found


def list_folder(root: Path, suffixes: Collection[str] = SUFFIXES, what: str = "image", example: str = "jpg") -> Listing:
    """Folders of classes, in folders of parts where there are such, plain or zipped."""
    hidden = [p for p in places(root) if not any(part.startswith((".", "__MACOSX")) for part in p[0].parts)]
    images = sorted((p for p in hidden if p[0].suffix.lower() in suffixes), key=lambda p: p[0].parts)
    shared = _shared([p[0].parts for p in images])
    parts = [p[0].parts[shared:] for p in images]
    split = bool(parts) and all(names[0].lower() in PARTS for names in parts)
    at = 1 if split else 0
    if not images or any(len(names) < at + 2 for names in parts):
        loose = next((str(images[i][0]) for i, names in enumerate(parts) if len(names) < at + 2), None)
        found = f"no {what}s" if loose is None else f"a file outside of a class's folder, '{loose}'"
        raise DataError(
            f"'{root}' has {found}; it must hold CLASS/NAME.{example}, or train/CLASS/NAME.{example} and test/..., "
            f"in folders or zip files. Names of {what}s end in {', '.join(sorted(suffixes))}."
        )
    classes = tuple(sorted({names[at] for names in parts}))
    numbers = {name: i for i, name in enumerate(classes)}
    digest = hashlib.sha256("\n".join(f"{name} {mark}" for name, _, mark in images).encode())
    return Listing(
        str(root), classes, [str(name) for name, _, _ in images],
        np.array([numbers[names[at]] for names in parts]),
        np.array([PARTS[names[0].lower()] for names in parts]) if split else None,
        Mixed([place for _, place, _ in images]), digest.hexdigest()[:16], len(hidden) - len(images),
    )  # fmt: skip


def _shared(paths: list[tuple[str, ...]]) -> int:
    """How many folders all paths, which are sorted, share above those of parts and classes."""
    shared = 0
    deepest = min(map(len, paths), default=0) - 2
    # The first and the last of sorted paths share what all of them do.
    while shared < deepest and paths[0][shared] == paths[-1][shared] and paths[0][shared].lower() not in PARTS:
        shared += 1
    return shared


def _parquet(path: Path) -> Listing:
    """Tables with the columns image and label; the files of a folder are parts by train, val or test in their names."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    tables, parts = [], []
    for file in files:
        try:
            table = pq.read_table(file, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"'{file}' is no whole parquet file: {str(error).partition(chr(10))[0]}") from error
        image = next((name for name in ("image", "img", "bytes") if name in table.column_names), None)
        label = next((name for name in ("label", "labels", "class", "fine_label") if name in table.column_names), None)
        if image is None or label is None:
            raise DataError(f"'{file}' has the columns {table.column_names}; it needs 'image' and 'label'.")
        tables.append((table.column(image), table.column(label), table.schema))
        stem = file.stem.lower().replace("_", "-").split("-")
        parts.append(next((PARTS[word] for word in stem if word in PARTS), None))
    labels = [label.to_pylist() for _, label, _ in tables]
    flat = [each for part in labels for each in part]
    classes, numbers = _label_names(flat, tables[0][2], str(path))
    known = all(part is not None for part in parts)
    names = [f"{file.name} row {row}" for file, part in zip(files, labels, strict=True) for row in range(len(part))]
    digest = hashlib.sha256("\n".join(f"{file.name} {file.stat().st_size}" for file in files).encode())
    digest.update(np.asarray([numbers[each] for each in flat]).tobytes())
    column = pa.chunked_array([chunk for image, _, _ in tables for chunk in image.chunks])
    return Listing(
        str(path), classes, names, np.array([numbers[each] for each in flat], np.int64),
        np.repeat(np.array(parts, str), [len(part) for part in labels]) if known else None,
        Table(column), digest.hexdigest()[:16],
    )  # fmt: skip


def _label_names(labels: list[Any], schema: pa.Schema, where: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of classes, those that Hugging Face keeps in the schema where there are such, and their numbers."""
    if any(label is None for label in labels) or not labels:
        raise DataError(f"a row of the table '{where}' has no label, or it has no rows")
    if isinstance(labels[0], (list, dict)):
        raise DataError(f"the labels of '{where}' are such as {labels[0]}; each must be one number or name of a class")
    values = sorted(set(labels))
    if isinstance(values[0], int):
        import json  # noqa: PLC0415

        kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = next((f["names"] for f in kept.values() if isinstance(f, dict) and "names" in f), None)
        names = names or [str(i) for i in range(values[-1] + 1)]
        if not 0 <= values[0] <= values[-1] < len(names):
            raise DataError(
                f"labels of '{where}' are {values[0]} to {values[-1]}, and there are {len(names)} names of classes"
            )
        return tuple(names), {i: i for i in range(len(names))}
    return tuple(map(str, values)), {value: i for i, value in enumerate(values)}


def _fashion_mnist(folder: Path) -> Listing:
    """IDX files; of the training set all 60,000 images where they lie there, or the first 10,000."""
    pixels, labels, parts = [], [], []
    for part, stems in (("train", ("train", "train-10k")), ("test", ("t10k",))):
        stem = next((s for s in stems if _idx_path(folder, s, "images-idx3") is not None), None)
        if stem is None:
            raise DataError(f"'{folder}' has no {stems[0]}-images-idx3-ubyte.gz of Fashion-MNIST's {part} part.")
        images = _idx(folder, stem, "images-idx3")
        pixels.append(images)
        labels.append(_idx(folder, stem, "labels-idx1"))
        parts += [part] * len(images)
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return _arrays("fashion_mnist", np.concatenate(pixels), np.concatenate(labels), names, np.array(parts))


def _idx_path(folder: Path, stem: str, kind: str) -> Path | None:
    names = (f"{stem}-{kind}-ubyte.gz", f"{stem}-{kind}-ubyte")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx(folder: Path, stem: str, kind: str) -> np.ndarray[Any, Any]:
    """An array in MNIST's format: a header of big-endian sizes, then bytes."""
    path = _idx_path(folder, stem, kind)
    if path is None:
        raise DataError(f"'{folder}' has no {stem}-{kind}-ubyte.gz.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"'{path}' is damaged: {error}") from error
    n_axes = content[3] if len(content) > 4 else 0
    shape = np.frombuffer(content, ">i4", n_axes, 4) if len(content) >= 4 + 4 * n_axes else np.zeros(1)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes)
    if n_axes == 0 or values.size != int(np.prod(shape)):
        raise DataError(f"'{path}' is damaged: {values.size} values, and its header says {tuple(map(int, shape))}")
    return values.reshape(tuple(map(int, shape)))


def _arrays(
    where: str, pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], classes: Sequence[str],
    parts: np.ndarray[Any, Any] | None = None,
) -> Listing:  # fmt: skip
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + np.asarray(labels, np.int64).tobytes())
    names = [f"image {i}" for i in range(len(pixels))]
    return Listing(
        where, tuple(classes), names, np.asarray(labels, np.int64), parts, Arrays(pixels), digest.hexdigest()[:16]
    )
