"""Near-copies of pictures: changes that a person hardly sees, or sees as the same picture."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
"""(32, 32, 3)."""
NOISE = 8.0
"""Standard deviation, of 255."""
COLOURS = (1.1, 1.0, 0.9)
"""What red, green and blue are multiplied by."""
QUALITY = 75
"""Of JPEG."""


def shifted(picture: Picture) -> Picture:
    """A pixel to the right and down; the first row and column are repeated."""
    return np.pad(picture, ((1, 0), (1, 0), (0, 0)), mode="edge")[:-1, :-1]


def coloured(picture: Picture) -> Picture:
    """Warmer."""
    return (picture * np.array(COLOURS)).round().clip(0, 255).astype(np.uint8)


def noisy(picture: Picture) -> Picture:
    """With noise, the same for every picture."""
    noise = np.random.default_rng(5).normal(0, NOISE, picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


def through_jpeg(picture: Picture) -> Picture:
    """Through a JPEG file and back."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY)
    with Image.open(file) as read:
        return np.asarray(read.convert("RGB"))


WAYS: dict[str, Callable[[Picture], Picture]] = {
    "shift": shifted,
    "colour": coloured,
    "noise": noisy,
    "JPEG": through_jpeg,
}
