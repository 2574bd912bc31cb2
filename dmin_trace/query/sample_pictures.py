"""The pictures of a trace's samples, by data set index."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from dmin_trace.store import Store

if TYPE_CHECKING:
    from PIL.Image import Image


class SamplePictures(Sequence["Image | None"]):
    """The thumbnails of a trace by data set index: what the model saw of each sample, small, as a PIL image in RGB.

    Each is read when it is looked up. It is None for a sample without one, and if it is damaged, which is logged.
    """

    def __init__(self, store: Store, rows: NDArray[np.int64]) -> None:
        """`rows` has the row of each data set index."""
        self._store, self._rows = store, rows

    @overload
    def __getitem__(self, sample: int) -> "Image | None": ...

    @overload
    def __getitem__(self, sample: slice) -> "list[Image | None]": ...

    def __getitem__(self, sample: int | slice) -> "Image | None | list[Image | None]":
        if isinstance(sample, slice):
            return [self[number] for number in range(*sample.indices(len(self)))]
        row = int(self._rows[sample])
        return self._store.thumbnails.image(row) if self._is_done(row) else None

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self._rows)

    def __repr__(self) -> str:
        facts = self._store.header.thumbnails
        return f"SamplePictures({'none' if facts is None else f'at most {facts.side} pixels'})"

    def webp(self, sample: int) -> bytes | None:
        """The picture of a sample as a WebP file; None where there is none."""
        row = int(self._rows[sample])
        return self._store.thumbnails.webp(row) if self._is_done(row) else None

    def _is_done(self, row: int) -> bool:
        return bool(self._store.done[row // self._store.header.chunk_rows])
