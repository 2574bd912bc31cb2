"""Pictures in a terminal: by its own graphics where it has some, and else in half blocks, two pixels a character.

The package `textual-image` (the extra `terminal`) asks the terminal what it can, and draws with Sixel (iTerm2, WezTerm,
foot, Konsole, Windows Terminal) or with the protocol of Kitty. Half blocks need colours alone.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
COLUMNS = 16
"""Characters across a picture."""
MIN_WIDTH = 60
"""Columns of the narrowest terminal in which pictures leave room for a caption."""
ENLARGED = 128
"""Pixels to which smaller pictures are enlarged for a terminal's own graphics, which would blur them."""

Draw = Callable[["Image"], RenderableType]


class HalfBlocks:
    """A picture in upper half blocks: the colour of each is the pixel above, and its background the pixel below.

    A picture of at most COLUMNS pixels is drawn as it is, and a larger one is reduced.
    """

    def __init__(self, image: "Image") -> None:
        from PIL.Image import Resampling

        scale = min(1.0, COLUMNS / max(image.size))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        self._pixels = image.convert("RGB").resize(size, Resampling.BOX)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = self._pixels.size
        data = self._pixels.tobytes()

        def colour(x: int, y: int) -> Color | None:
            at = 3 * (y * width + x)
            return Color.from_rgb(*data[at : at + 3]) if y < height else None

        for y in range(0, height, 2):
            for x in range(width):
                yield Segment("▀", Style(color=colour(x, y), bgcolor=colour(x, y + 1)))
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._pixels.width, self._pixels.width)


def shows_pictures(console: Console, wanted: str) -> bool:
    """Whether an answer on this console has pictures.

    wanted: "never"; "always", in every terminal; or "auto", in a terminal of MIN_WIDTH columns that has colours and
        Unicode. What is no terminal, such as a pipe or a file, has none in any case.
    """
    if wanted == "never" or not console.is_terminal:
        return False
    able = console.color_system in ("256", "truecolor", "windows") and not console.options.ascii_only
    return wanted == "always" or able and console.width >= MIN_WIDTH


def find_draw(console: Console) -> Draw:
    """What draws pictures on a console of standard output: the terminal is asked, where the package for that is
    installed."""
    # It asks when it is imported, on these two, and waits for a tenth of a second.
    streams = (sys.__stdin__, sys.__stdout__)
    if all(stream is not None and stream.isatty() for stream in streams):
        # Whatever goes wrong between the package and a terminal, there are half blocks.
        with suppress(Exception):
            from PIL.Image import new
            from textual_image.renderable import Image as Chosen
            from textual_image.renderable import SixelImage, TGPImage

            if Chosen in (SixelImage, TGPImage):
                logger.debug("Pictures are drawn by %s.", Chosen.__module__)

                def draw(image: "Image") -> RenderableType:
                    wide = image.width >= image.height
                    # A character is about twice as high as it is wide.
                    size = (COLUMNS, "auto") if wide else ("auto", COLUMNS // 2)
                    return Chosen(_enlarged(image), *size)

                # It also needs the size of a character, which some terminals do not tell.
                Measurement.get(console, console.options, draw(new("RGB", (1, 1))))
                return draw
    return HalfBlocks


def _enlarged(image: "Image") -> "Image":
    """A small picture with each pixel as a square of several."""
    from PIL.Image import Resampling

    times = ENLARGED // max(image.size)
    return image.resize((image.width * times, image.height * times), Resampling.NEAREST) if times > 1 else image
