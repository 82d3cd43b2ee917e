"""What a mask's pixels mean: numbers or colours as classes, and what counts as none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selectra.data.mask_views import IGNORED
from selectra.errors import DataError

MOST_SHOWN = 6
Colour = tuple[int, int, int]
Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Coding:
    """Classes by the numbers or the colours of masks.

    Args:
        classes: Names.
        colours: One for each, for pictures.
        numbers: Class of every number that may stand in a mask; `IGNORED` for those that do not count.
        by_colour: Masks are pictures in the classes' colours; then `numbers` is by red * 65536 + green * 256 + blue.
    """

    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    numbers: Mapping[int, int] = field(hash=False)
    by_colour: bool = False

    def read(self, mask: Pixels, name: str, unknown_counts: bool) -> Pixels:
        """Classes as bytes, `IGNORED` where nothing counts.

        Args:
            mask: (h, w) of numbers, or (h, w, 3) of colours.
            name: Of the file, for messages.
            unknown_counts: Whether a label that is not known is an error; else it does not count.

        Raises:
            DataError: It is of the other kind, or has labels that are not known.
        """
        if (mask.ndim == 3) != self.by_colour:
            wanted, got = ("a picture in colours", "numbers") if self.by_colour else ("numbers", "colours")
            raise DataError(f"the mask '{name}' has {got} of shape {mask.shape}; its layout needs {wanted}.")
        codes = mask.astype(np.int64)
        if (codes != mask).any():
            raise DataError(
                f"the mask '{name}' has fractions, such as {mask[codes != mask][0]}; labels are whole numbers."
            )
        if self.by_colour:
            codes = (codes[..., 0] << 16) | (codes[..., 1] << 8) | codes[..., 2]
        found, places = np.unique(codes, return_inverse=True)
        missing = [int(code) for code in found if int(code) not in self.numbers]
        if missing and unknown_counts:
            raise DataError(self._unknown(codes, missing, name))
        table = np.array([self.numbers.get(int(code), IGNORED) for code in found], np.uint8)
        return table[places].reshape(codes.shape)

    def _unknown(self, codes: Pixels, missing: Sequence[int], name: str) -> str:
        shown = ", ".join(
            f"{self._shown(code)} ({int((codes == code).sum()):,} pixels)" for code in missing[:MOST_SHOWN]
        )
        more = f" and {len(missing) - MOST_SHOWN} more" if len(missing) > MOST_SHOWN else ""
        allowed = sorted(self.numbers)
        known = ", ".join(map(self._shown, allowed[:MOST_SHOWN]))
        if len(allowed) > MOST_SHOWN:
            known += f" ... {self._shown(allowed[-1])}"
        return (
            f"the mask '{name}' has unknown labels: {shown}{more}; known are {known} "
            f"({len(self.classes)} classes). Correct it or name its classes; with data.unknown=ignore such pixels do "
            "not count."
        )

    def _shown(self, code: int) -> str:
        return f"({code >> 16}, {code >> 8 & 255}, {code & 255})" if self.by_colour else str(code)


def require_once(what: str, names: Sequence[str]) -> None:
    """Refuse names that stand in a list twice: metrics are by name.

    Raises:
        DataError: One does.
    """
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(f"{what} name '{twice}' twice; give each class a name of its own.")


def by_numbers(
    classes: Sequence[str],
    colours: Sequence[Colour] | None = None,
    first: int = 0,
    ignored: Sequence[int] = (IGNORED,),
    labels: Sequence[int] = (),
) -> Coding:
    """Classes that are numbered from `first` on, or by `labels`, of which none is ignored.

    Raises:
        DataError: There are more classes than a byte has numbers, besides that of what does not count.
    """
    if len(classes) > IGNORED:
        raise DataError(f"there are {len(classes):,} classes; masks of at most {IGNORED} are supported.")
    require_once("classes", classes)
    own = labels or range(first, first + len(classes))
    numbers = dict.fromkeys(ignored, IGNORED) | {label: i for i, label in enumerate(own)}
    return Coding(tuple(classes), tuple(colours or distinct_colours(len(classes))), numbers)


def by_colours(classes: Sequence[str], colours: Sequence[Colour], ignored: Sequence[Colour] = ()) -> Coding:
    """Classes that are painted in their colours."""
    numbers = {_code(colour): IGNORED for colour in ignored} | {_code(c): i for i, c in enumerate(colours)}
    return Coding(tuple(classes), tuple(colours), numbers, by_colour=True)


def _code(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def distinct_colours(count: int) -> tuple[Colour, ...]:
    """Colours that are told apart: hues by the golden angle, at three lightnesses by turns."""
    colours = []
    for i in range(count):
        hue, light = (0.08 + i * 0.618034) % 1 * 6, (0.95, 0.65, 0.8)[i % 3]
        ramp = [min(max(abs((hue + shift) % 6 - 3) - 1, 0), 1) for shift in (0, 4, 2)]
        colours.append(tuple(round(255 * light * (0.15 + 0.85 * each)) for each in ramp))
    return tuple(colours)


CAMVID = by_numbers(
    ("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"),
    ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
     (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
    ignored=(11, 255),
)  # fmt: skip
LOVEDA = by_numbers(
    ("background", "building", "road", "water", "barren", "forest", "agriculture"),
    ((255, 255, 255), (255, 0, 0), (255, 255, 0), (0, 0, 255), (159, 129, 183), (0, 255, 0), (255, 195, 128)),
    first=1,
    ignored=(0, 255),
)
ISPRS = by_colours(
    ("impervious surface", "building", "low vegetation", "tree", "car", "clutter"),
    ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)),
    # The border of masks without boundaries.
    ignored=((0, 0, 0),),
)
_CITYSCAPES = (
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)), ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)), ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
)  # fmt: skip
# labelIds have 34 numbers, of which 19 count; labelTrainIds have those 19 from 0 on.
CITYSCAPES = Coding(
    tuple(name for name, _, _ in _CITYSCAPES),
    tuple(colour for _, _, colour in _CITYSCAPES),
    dict.fromkeys((*range(34), 255), IGNORED) | {number: i for i, (_, number, _) in enumerate(_CITYSCAPES)},
)
CITYSCAPES_TRAIN = by_numbers(CITYSCAPES.classes, CITYSCAPES.colours)
ADE20K = by_numbers([f"class {i}" for i in range(1, 151)], first=1, ignored=(0,))
