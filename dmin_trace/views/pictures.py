"""What templates draw without scripts: pictures as data URIs, and curves as the paths of inline SVG.

Every number is formatted here, so that nothing but digits, signs and letters of path commands reaches an attribute.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmin_trace.store import webp_size

CURVE_WIDTH, CURVE_HEIGHT = 100.0, 30.0
MAX_POINTS = 60
COARSE = 48
"""Pixels of the longer side up to which a picture is enlarged pixel by pixel; a larger one is smoothed."""


@dataclass(frozen=True)
class Picture:
    """A picture in a page: a data URI, its pixels, and whether it is enlarged pixel by pixel."""

    uri: str
    width: int
    height: int

    @property
    def coarse(self) -> bool:
        return max(self.width, self.height) <= COARSE


def picture_of(webp: bytes | None) -> Picture | None:
    """The picture in a plain WebP file; None without one."""
    size = None if webp is None else webp_size(webp)
    if webp is None or size is None:
        return None
    return Picture(f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}", *size)


@dataclass(frozen=True)
class Scale:
    """The values that the lower and the upper edge of a curve stand for; zero is between them."""

    low: float
    high: float


def scale_of(curves: Sequence[Sequence[float]]) -> Scale:
    """One scale for several curves."""
    values = [value for curve in curves for value in curve if math.isfinite(value)]
    return Scale(min(0.0, *values, 0.0), max(0.0, *values, 0.0))


@dataclass(frozen=True)
class Curve:
    """A curve in a box of CURVE_WIDTH x CURVE_HEIGHT: the line, the area between it and zero, and where zero is."""

    line: str
    area: str
    zero: str


def curve_of(values: Sequence[float], scale: Scale) -> Curve | None:
    """The curve of some values on a scale; None for fewer than two finite ones."""
    steps = len(values) - 1
    if steps < 1 or not all(map(math.isfinite, values)):
        return None
    span = scale.high - scale.low or 1.0

    def height(value: float) -> str:
        # A pixel of room above and below, for the width of the line. Divided first, so that nothing overflows.
        return f"{1 + (CURVE_HEIGHT - 2) * (scale.high / span - value / span):.1f}"

    points = [f"{CURVE_WIDTH * n / steps:.1f},{height(value)}" for n, value in enumerate(values)]
    line, zero = f"M{' '.join(points)}", height(0.0)
    return Curve(line, f"{line} V{zero} H0 Z", zero)
