"""Which chunks are done: those with their mark, written last, in the array `done`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError
from dmin_trace.store.files import sync
from dmin_trace.store.header import Header
from dmin_trace.store.layout import CHECKSUM_BYTES, chunk_file, chunk_names
from dmin_trace.store.untrusted import size_within

DONE = b"\x01" + google_crc32c.value(b"\x01").to_bytes(CHECKSUM_BYTES, "little")
"""The content of a mark. A file with any other content is no mark."""


def done_chunks(path: Path, header: Header) -> NDArray[np.bool_]:
    """(chunks,) which chunks are done. Raises TraceError if marks are reached by a link."""
    done = np.zeros(header.chunks, np.bool_)
    for folder in (path / "done", path / "done" / "c"):
        if folder.is_symlink():
            raise TraceError(f"{path} is damaged: {folder} is a symbolic link. A store holds none.")
    if not folder.is_dir():
        return done
    with os.scandir(folder) as found:
        for mark in found:
            numbered = re.fullmatch("0|[1-9][0-9]{0,9}", mark.name) and int(mark.name) < header.chunks
            if numbered and mark.is_file(follow_symlinks=False):
                # A query opens all marks: `Path` would take twice as long.
                handle = os.open(mark.path, os.O_RDONLY)
                try:
                    done[int(mark.name)] = os.read(handle, len(DONE) + 1) == DONE
                finally:
                    os.close(handle)
    return done


def is_done(path: Path, chunk: int) -> bool:
    """Whether a chunk has its mark."""
    try:
        size = size_within(path, chunk_names("done", chunk, 1))
    except ValueError:
        return False
    return size == len(DONE) and chunk_file(path, "done", chunk, 1).read_bytes() == DONE


def remove_marks(path: Path, chunks: Sequence[int]) -> None:
    """Takes away the marks of chunks, so that a capture writes them again. Raises OSError if the disk refuses."""
    for chunk in chunks:
        chunk_file(path, "done", chunk, 1).unlink(missing_ok=True)
    if (folder := path / "done" / "c").is_dir():
        sync(folder)
