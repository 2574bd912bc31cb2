"""A small picture of each sample, for people to look at: what the model saw, or else the sample's file.

The batch of a sample has its picture as a tensor, whose values a script scales to [-1, 1], to [0, 1] or otherwise.
Which of these it is cannot be told from one sample: a bright picture has no values below zero either way. So it is
decided once for a capture, from the samples of which the data set's fingerprint is made, and from how bright their
files are. They are the same in every process and in every capture of the data set. The store keeps what was decided.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, features

from dmin_trace.errors import message_of
from dmin_trace.store import PICTURE_ENDINGS, PICTURE_FORMATS, ThumbnailFacts, encode_webp

logger = logging.getLogger(__name__)
ENTRIES = (
    *("pixel_values", "edited_pixel_values", "images", "image", "input", "inputs", "img", "instance_images"),
    *("videos", "video", "pixels"),
)
"""Names of batch entries with the pictures that a model learns to make, the likeliest first."""
OTHER_WORDS = (
    *("cond", "control", "original", "source", "mask", "class", "clip", "depth", "noise", "latent", "embed", "prompt"),
    *("text", "caption"),
)
"""Words in the names of entries that are no such pictures. An entry whose name says nothing may be one."""
CHANNELS = (1, 3)
TOLERANCE = 0.1
"""By how much an interpolated picture may leave its range."""
COMPARED_SIDE = 64
"""Pixels of the longer side of a file's picture, of which the mean is taken."""


class SampleThumbnails:
    """Makes the thumbnails of one capture. Nothing that fails here ends it: then a sample has no picture.

    facts: how the thumbnails are made; None if there are none, or if that is not known yet.
    """

    def __init__(self, side: int) -> None:
        """`side` is the setting `thumbnails`: pixels of the longer side, 0 for no thumbnails."""
        if side and not features.check("webp"):
            logger.warning("This installation of Pillow cannot write WebP, so the trace has no thumbnails.")
            side = 0
        self._side = side
        self.facts: ThumbnailFacts | None = None
        self._batch: Any = None
        self._file: str | None = None
        self._low, self._high = math.inf, -math.inf
        # The entry with the pictures in the batches that were looked at.
        self._entry: str | None = None
        self._means: list[tuple[float, float]] = []
        self._warned = False

    def begin(self, batch: Any, file: object = None) -> None:
        """Begins a sample, by its batch and its file; None for what is not known."""
        self._batch, self._file = batch, file if isinstance(file, str) else None

    def watch(
        self, fetch: Callable[[int], Any], file_of: Callable[[int], str | None] = lambda sample: None
    ) -> Callable[[int], Any]:
        """The same function; the values in the batches that it gives, and the files of the samples, which `file_of`
        gives after each, tell the range of the pictures."""

        def watched(sample: int) -> Any:
            batch = fetch(sample)
            try:
                self._note(batch, file_of(sample))
            except Exception:
                logger.debug("The values of a batch could not be read.", exc_info=True)
            return batch

        return watched if self._side else fetch

    def decide(self) -> None:
        """Decides how the thumbnails are made, when the first sample has begun and its data set was watched."""
        if not self._side:
            return
        try:
            self._note(self._batch, self._file)
            if self._entry is not None:
                low, high = value_range(self._low, self._high, self._means)
                self.facts = ThumbnailFacts(side=self._side, entry=self._entry, low=low, high=high)
            elif self._file is not None and _may_be_picture(self._file, self._side):
                self.facts = ThumbnailFacts(side=self._side, entry="", low=0.0, high=255.0)
        except Exception:
            logger.debug("The first sample's picture could not be read.", exc_info=True)
        if self.facts is None:
            logger.info("The samples have no pictures that are known, so the trace has no thumbnails.")

    def make(self) -> bytes:
        """The thumbnail of the sample that has begun, a WebP file; b"" if there is none."""
        if (facts := self.facts) is None:
            return b""
        try:
            if not facts.entry:
                image = None if self._file is None else read_file(self._file, facts.side)
            else:
                picture = picture_in(self._batch, facts.entry)
                image = None if picture is None else self._image(picture, facts)
            return b"" if image is None else encode_webp(image, facts.side)
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("The picture of a sample could not be made: %s. It has none.", message_of(error))
            return b""

    def _note(self, batch: Any, file: str | None) -> None:
        """Looks at the picture in a sample's batch, and compares it with that in its file, if both are known."""
        entry = find_picture(batch) if self._entry is None else self._entry
        if entry is None or (picture := picture_in(batch, entry)) is None:
            return
        self._entry = entry
        if picture.dtype == torch.uint8:
            self._low, self._high = 0.0, 255.0
            return
        finite = picture[torch.isfinite(picture)].float()
        if not finite.numel():
            return
        self._low, self._high = min(self._low, finite.min().item()), max(self._high, finite.max().item())
        if file is not None and (image := read_file(file, COMPARED_SIDE)) is not None:
            self._means.append((finite.mean().item(), float(np.asarray(image).mean() / 255)))

    def _image(self, picture: torch.Tensor, facts: ThumbnailFacts) -> Image.Image:
        values = picture.detach().float()
        if not self._warned and facts.low == 0 and values.min().item() < -TOLERANCE:
            self._warned = True
            logger.warning(
                "The thumbnails are darker than the pictures: those that were looked at first had no values below 0, "
                "and this one has."
            )
        scaled = (torch.nan_to_num(values) - facts.low) * (255 / (facts.high - facts.low))
        pixels = scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
        return _shrunk(image, facts.side)


def find_picture(batch: Any) -> str | None:
    """The name of the batch's entry with the pictures, or its number where entries have no names; None without one."""
    named = _entries(batch)
    unlikely = [name for name in named if any(word in name.lower() for word in OTHER_WORDS)]
    names = [name for name in ENTRIES if name in named]
    names += [name for name in named if name not in names and (name not in unlikely)]
    return next((name for name in names if picture_in(batch, name) is not None), None)


def picture_in(batch: Any, entry: str) -> torch.Tensor | None:
    """The first picture in an entry of a batch, (1 or 3, H, W); of a video its middle frame. None if there is none.

    Entries are (B, C, H, W), (B, H, W, C), (B, F, C, H, W) or (B, C, F, H, W) with C of 1 or 3, of floating-point
    numbers or of bytes; or (B, H, W), if the name is that of pictures. B begins with the sample itself, which a class
    picture may follow.
    """
    value = _entries(batch).get(entry)
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.dtype == torch.uint8):
        return None
    if value.dim() not in (3, 4, 5) or not value.numel() or value.dim() == 3 and entry not in ENTRIES:
        return None
    first = value[0]
    if first.dim() == 4:
        if first.shape[1] in CHANNELS and not (first.shape[1] == 1 and first.shape[0] == 3):
            first = first[first.shape[0] // 2]
        else:
            first = first[:, first.shape[1] // 2]
    elif first.dim() == 2:
        first = first[None]
    if first.shape[0] not in CHANNELS and first.shape[2] in CHANNELS:
        first = first.permute(2, 0, 1)
    return first if first.shape[0] in CHANNELS else None


def value_range(low: float, high: float, means: Sequence[tuple[float, float]] = ()) -> tuple[float, float]:
    """The values of black and white, by the least and the largest value in the pictures of several samples.

    Scripts scale pictures to [-1, 1], which shows in values below zero, to [0, 1], or leave them in [0, 255]. Anything
    else (a mean and a deviation of the data set, say) is taken to reach from black to white.

    `means`: for samples whose files are known, the mean of the values and that of the file, from 0 to 1. They tell
    pictures that are all bright from those in [0, 1]. A crop changes a mean, but little.
    """
    if -1 - TOLERANCE <= low < -TOLERANCE and high <= 1 + TOLERANCE:
        return -1.0, 1.0
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        as_signed = sum(abs(ours - (2 * theirs - 1)) for ours, theirs in means)
        as_unsigned = sum(abs(ours - theirs) for ours, theirs in means)
        is_bright = as_signed < min(as_unsigned / 2, TOLERANCE * len(means))
        return (-1.0, 1.0) if is_bright else (0.0, 1.0)
    if low >= -TOLERANCE and 16 < high <= 255 * (1 + TOLERANCE):
        return 0.0, 255.0
    return low, max(high, low + 1e-3)


def read_file(path: str, side: int) -> Image.Image | None:
    """The picture in a sample's file, of at most `side` pixels; the middle frame of an animation.

    None if there is no such file, or no picture of PICTURE_FORMATS in it.
    """
    try:
        if not Path(path).is_file():
            return None
        with Image.open(path, formats=PICTURE_FORMATS) as opened:
            opened.draft("RGB", (side, side))
            opened.seek(getattr(opened, "n_frames", 1) // 2)
            return _shrunk(ImageOps.exif_transpose(opened).convert("RGB"), side)
    except Exception:  # a decoder may raise anything
        logger.debug("%s could not be read as a picture.", path, exc_info=True)
        return None


def _may_be_picture(path: str, side: int) -> bool:
    """Whether a file is a picture; or would be by its name, where this one is missing or damaged."""
    return Path(path).suffix.lower() in PICTURE_ENDINGS or read_file(path, side) is not None


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _entries(batch: Any) -> dict[str, Any]:
    """The entries of a batch by name, or by number without names, as in `batch_shapes`."""
    values = batch if isinstance(batch, (Mapping, list, tuple)) else [batch]
    return {str(name): value for name, value in (values.items() if isinstance(values, Mapping) else enumerate(values))}
