"""Stores of made-up rows whose samples have pictures, captions and files, for tests of pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from stores import make_header

from dmin_trace.query import Trace
from dmin_trace.store import ThumbnailFacts, create, encode_webp, open_store, quantise

TIMESTEPS, DIMENSION = 5, 256


Kind = Literal["noise", "smooth"]


def picture(sample: int, side: int = 8, kind: Kind = "noise") -> Image.Image:
    """Of a sample, another for each: noise, or noise at several scales, of which the large ones are the strongest."""
    random = np.random.default_rng(sample)
    if kind == "noise":
        return Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
    layers = [
        np.asarray(Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).resize((side, side))) / size
        for size in (2, 4, 8, 16, 32)
    ]
    summed = sum(layers[1:], layers[0])
    return Image.fromarray((255 * (summed - summed.min()) / np.ptp(summed)).astype(np.uint8))


def pictured_store(
    path: Path,
    captions: Sequence[str],
    *,
    artists: Sequence[str] = ("Ann", "Ben", "Cem"),
    files: Sequence[str] | None = None,
    side: int = 8,
    kind: Kind = "noise",
    without: Sequence[int] = (),
    copies: bool = False,
) -> Trace:
    """A trace with a sample for each caption. Five samples are of each kind, of which sample n has the number n modulo
    the number of kinds. Those in `without` have no picture, and with `copies` sample 3 is sample 2 again."""
    count = len(captions)
    facts = ThumbnailFacts(side=max(side, 16), entry="pixel_values", low=-1.0, high=1.0)
    columns = {"caption": "string", "file_name": "string", "artist": "string"}
    header = make_header(
        samples=count, timesteps=TIMESTEPS, dimension=DIMENSION, rows=16, columns=columns, thumbnails=facts
    )
    random = np.random.default_rng(0)
    shape = (TIMESTEPS, DIMENSION)
    kinds, own = random.standard_normal((max(1, count // 5), *shape)), random.standard_normal((count, *shape))
    grad = kinds[np.arange(count) % len(kinds)] + own
    if copies:
        grad[3] = grad[2]
    grad /= np.linalg.norm(grad, axis=2, keepdims=True)
    files = [f"folder/{n:04d}.png" for n in range(count)] if files is None else files
    writer = create(path, header)
    for chunk in writer.pending():
        held = list(header.rows(chunk))
        ones = np.ones((len(held), TIMESTEPS), np.float32)
        texts = {
            "caption": [captions[n] for n in held],
            "file_name": [files[n] for n in held],
            "artist": [artists[n % len(artists)] for n in held],
        }
        pictures = [b"" if n in without else encode_webp(picture(n, side, kind), facts.side) for n in held]
        stored = quantise(grad[held].astype(np.float32), header.dtype)
        writer.write(chunk, *stored, ones, ones, np.array(held, np.int64), texts, pictures)
    writer.finish()
    return Trace(open_store(path))
