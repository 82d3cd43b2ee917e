"""Small sets of images that need no file: drawn shapes, and scikit-learn's handwritten digits."""

from typing import Any

import numpy as np

from selectra.data.vision import vision

Example = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], tuple[str, ...]]
SIDE, PER_CLASS = 32, 100
SHAPES = ("disc", "ring", "square", "cross")


def shapes() -> Example:
    """400 drawn colour images of 32 x 32 pixels: a disc, a ring, a square or a cross somewhere on a noisy ground."""
    draw = np.random.default_rng(0)
    labels = np.tile(np.arange(len(SHAPES)), PER_CLASS)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    images = np.empty((len(labels), SIDE, SIDE, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        radius, middle = draw.uniform(6, 11), draw.uniform(11, SIDE - 11, 2)
        inside = _shape(label, np.abs(rows - middle[0]), np.abs(columns - middle[1]), radius)
        ground, colour = draw.uniform(0, 110, 3), draw.uniform(140, 255, 3)
        noisy = np.where(inside[..., None], colour, ground) + draw.normal(0, 12, image.shape)
        image[:] = noisy.clip(0, 255)
    return images, labels, SHAPES


def shape_masks() -> Example:
    """160 drawn images of 48 x 64 pixels with two shapes each, and masks: ground, disc, ring, square, cross."""
    draw = np.random.default_rng(1)
    rows, columns = np.mgrid[:48, :64]
    images, masks = np.empty((160, 48, 64, 3), np.uint8), np.zeros((160, 48, 64), np.uint8)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        canvas = np.broadcast_to(draw.uniform(0, 110, 3), image.shape).copy()
        for half, label in enumerate((i % 4, int(draw.integers(4)))):
            radius = draw.uniform(7, 12)
            middle = draw.uniform(12, 36), draw.uniform(12, 20) + 32 * half
            inside = _shape(label, np.abs(rows - middle[0]), np.abs(columns - middle[1]), radius)
            canvas[inside], mask[inside] = draw.uniform(140, 255, 3), label + 1
        image[:] = (canvas + draw.normal(0, 12, image.shape)).clip(0, 255)
    return images, masks, ("ground", *SHAPES)


def _shape(label: int, down: Any, right: Any, radius: float) -> Any:
    """Where a shape is, by the distances from its middle."""
    distance, box = np.hypot(down, right), np.maximum(down, right)
    return (
        distance < radius,
        (distance < radius) & (distance > 0.6 * radius),
        box < radius,
        (box < radius) & (np.minimum(down, right) < 0.3 * radius),
    )[label]


def digits() -> Example:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels in 17 greys (UCI, CC BY 4.0)."""
    bunch = vision("sklearn.datasets").load_digits()
    return (bunch.images * 15.9375).astype(np.uint8), bunch.target, tuple("0123456789")
