"""Graph files of hnswlib: their size, and the checks before one is loaded.

hnswlib believes the file that it loads: it follows lengths, offsets and links that lead outside of it. So a file is
read here first, as hnswlib 0.8 writes it, and every number that a search follows is checked. A forged file can still
leave the best rows out, or be slow; the rows that it names are rows of the store, and their scores come from the store.

    header     offset of the elements, 0; how many fit; how many there are; bytes of an element; where in it the label
               and the vector lie (8 bytes each); the top level, the first element of a search (4 each); the most links
               of an element above level 0 and on it; M; the factor of the levels; ef_construction (8 each)
    elements   links on level 0: their count (2 bytes), a mark and a byte of padding, then their numbers (4 each, padded
               to 2 M); the vector (float32); the label (8)
    levels     for each element the bytes of its links above level 0 (4), and for each level their count and M numbers
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import hnswlib

HEADER = struct.Struct("<6QiI3QdQ")


class GraphError(Exception):
    """A file of an index that is not used; the message says what is wrong with it. Does not leave `search`."""


def make_graph(length: int, most: int, m: int, ef_construction: int) -> hnswlib.Index:
    """An empty graph for vectors of `length` numbers, by inner product."""
    import hnswlib

    graph = hnswlib.Index(space="ip", dim=length)
    graph.init_index(max_elements=most, M=m, ef_construction=ef_construction)
    return graph


def graph_bytes(length: int, vectors: int, m: int) -> int:
    """The size of a graph's file, and about that of the graph in memory."""
    # An element is on level l with the probability M^-l.
    above = (4 * m + 4) / (m - 1)
    return HEADER.size + round(vectors * (_element_bytes(length, m) + 4 + above))


def load_graph(path: Path, length: int, count: int, rows: int, m: int) -> tuple[hnswlib.Index, NDArray[np.bool_]]:
    """The graph in a file, checked before hnswlib reads it, and which rows it holds, (rows,).

    Args:
        path: the file.
        length: the numbers of a vector.
        count: how many vectors the graph must hold.
        rows: the rows of the store: labels must be below it, and none may be there twice.
        m: links of an element.

    Raises:
        GraphError: the file is not such a graph.
    """
    import hnswlib

    try:
        held = _check(path, length, count, rows, m)
    except OSError as error:
        raise GraphError(f"{path.name} cannot be read: {error.strerror or error}") from None
    graph = hnswlib.Index(space="ip", dim=length)
    try:
        graph.load_index(os.fspath(path), max_elements=count)
    except RuntimeError as error:
        raise GraphError(f"{path.name} cannot be loaded: {error}") from None
    return graph, held


def _element_bytes(length: int, m: int) -> int:
    return 4 + 2 * m * 4 + length * 4 + 8


def _check(path: Path, length: int, count: int, rows: int, m: int) -> NDArray[np.bool_]:
    """The rows that the elements are of."""
    element = _element_bytes(length, m)
    elements_end = HEADER.size + count * element
    size = path.stat().st_size
    if size < elements_end + 4 * count:
        raise GraphError(f"{path.name} has {size} bytes; {count} vectors need {elements_end + 4 * count} at least")
    data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    *found, top, entry, above, ground, links, factor, _ = HEADER.unpack(data[: HEADER.size].tobytes())
    expected = [0, count, count, element, element - 8, 4 + 2 * m * 4]
    if found != expected or (above, ground, links) != (m, 2 * m, m) or not math.isclose(factor, 1 / math.log(m)):
        raise GraphError(f"{path.name} is no graph of {count} vectors of {length} numbers with M = {m}")
    # Views of the elements' parts; vectors are not read.
    at = HEADER.size
    labels = _view(data, at + element - 8, (count,), (element,), "<i8")
    counts = _view(data, at, (count,), (element,), "<u2")
    linked = _view(data, at + 4, (count, 2 * m), (element, 4), "<u4")
    held = np.zeros(rows, np.bool_)
    if count and labels.min() >= 0 and labels.max() < rows:
        held[labels] = True
    if held.sum() != count:
        raise GraphError(f"{path.name} does not name {count} rows of the store, each once")
    if counts.max() > 2 * m or linked.max() >= count:
        raise GraphError(f"{path.name} has links that lead nowhere")
    if not _levels_are_sound(data[elements_end:], count, m, top, entry):
        raise GraphError(f"{path.name} has links that lead nowhere")
    return held


def _levels_are_sound(data: NDArray[np.uint8], count: int, m: int, top: int, entry: int) -> bool:
    """Whether the links above level 0 lead to elements that are on that level too."""
    if len(data) % 4:
        return False
    words = data.view("<u4")
    # Most elements are on level 0 alone, and all that is here of them is a length of 0. The others begin at a word that
    # is not 0; their links end at the next such word at the earliest.
    filled = np.flatnonzero(words)
    after = np.searchsorted(filled, filled + 1 + words[filled] // 4)
    chain, place = [], 0
    following = memoryview(after)
    while place < len(filled):
        chain.append(place)
        place = following[place]
    starts = filled[np.array(chain, np.int64)]
    sizes = words[starts].astype(np.int64) // 4
    elements = starts - np.append(0, np.cumsum(sizes)[:-1])[: len(starts)]
    if (words[starts] % (4 * m + 4)).any() or count + sizes.sum() != len(words) or (elements >= count).any():
        return False
    levels = np.zeros(count, np.int64)
    levels[elements] = sizes // (m + 1)
    if not 0 <= entry < count or top != levels[entry] or top != levels.max():
        return False
    for level in range(1, top + 1):
        here = starts[sizes // (m + 1) >= level] + 1 + (level - 1) * (m + 1)
        lists = words[here[:, None] + np.arange(m + 1)]
        used = np.arange(m) < (lists[:, :1] & 0xFFFF)
        if (lists[:, 0] & 0xFFFF).max() > m or (lists[:, 1:] >= count).any():
            return False
        if (levels[lists[:, 1:]][used] < level).any():
            return False
    return True


def _view(data: NDArray[np.uint8], at: int, shape: tuple[int, ...], steps: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.ndarray(shape, dtype, data, at, steps)
