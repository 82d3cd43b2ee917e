"""Small image files in the layouts that are read."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "eel")


def pixels(seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    """Without loss, so that what is read can be compared."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def photo(array: np.ndarray, orientation: int) -> bytes:
    """A picture of which a camera says how it was held."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(array).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def deep(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """A picture with 16 bits a channel."""
    return encoded(np.arange(size[0] * size[1], dtype=np.uint16).reshape(size) * 500, kind)


def names(part: str = "", each: int = 10, first: int = 0) -> dict[str, bytes]:
    """Paths inside a folder, and what lies there: `each` images of each class."""
    prefix = f"{part}/" if part else ""
    numbered = [(name, i) for name in CLASSES for i in range(first, first + each)]
    return {
        f"{prefix}{name}/{i:03}.png": encoded(pixels(first * 1000 + 10 * CLASSES.index(name) + i))
        for name, i in numbered
    }


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
