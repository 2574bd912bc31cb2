"""hnswlib's graph files: their size, and whether one may be loaded.

hnswlib believes the file that it loads: lengths, offsets and links that lead outside of it are followed. So a file is
read here first, as hnswlib 0.8 writes it, and every number that a search follows is compared with what it must be. What
a hostile file can still do is to answer wrongly: leave the best out, or be slow. It names rows of the store and no
other, and their scores are taken from the store.

    header     offset of the elements, 0; how many fit; how many there are; bytes of an element; where in it the label
               and the vector lie (8 bytes each); the top level, the element to begin at (4 each); links of an element
               above level 0 and on it; M; the factor of the levels; ef_construction (8 each)
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
    """A graph file that is not to be loaded; the message says what is wrong with it. Never leaves `index`."""


def make_graph(length: int, most: int, m: int, ef_construction: int) -> hnswlib.Index:
    """An empty graph for vectors of so many numbers, by inner product."""
    import hnswlib

    graph = hnswlib.Index(space="ip", dim=length)
    graph.init_index(max_elements=most, M=m, ef_construction=ef_construction)
    return graph


def graph_bytes(length: int, vectors: int, m: int) -> int:
    """The size of a graph's file, and about that of the graph in memory."""
    # An element is on level l with the probability M^-l.
    above = (4 * m + 4) / (m - 1)
    return HEADER.size + round(vectors * (_element_bytes(length, m) + 4 + above))


def load_graph(path: Path, length: int, labels: NDArray[np.int64], m: int) -> hnswlib.Index:
    """The graph in a file, checked before hnswlib sees it.

    Args:
        path: the file.
        length: numbers in a vector.
        labels: what the elements must be named, each once, in any order.
        m: links of an element.

    Raises:
        GraphError: the file is not such a graph.
    """
    import hnswlib

    try:
        _check(path, length, labels, m)
    except OSError as error:
        raise GraphError(f"{path.name} cannot be read: {error.strerror or error}") from None
    graph = hnswlib.Index(space="ip", dim=length)
    try:
        graph.load_index(os.fspath(path), max_elements=len(labels))
    except RuntimeError as error:
        raise GraphError(f"{path.name} cannot be loaded: {error}") from None
    return graph


def _element_bytes(length: int, m: int) -> int:
    return 4 + 2 * m * 4 + length * 4 + 8


def _check(path: Path, length: int, labels: NDArray[np.int64], m: int) -> None:
    count, element = len(labels), _element_bytes(length, m)
    elements_end = HEADER.size + count * element
    size = path.stat().st_size
    if size < elements_end + 4 * count:
        raise GraphError(f"{path.name} has {size} bytes; {count} vectors need {elements_end + 4 * count} at least")
    data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    *found, top, entry, above, ground, links, factor, _ = HEADER.unpack(data[: HEADER.size].tobytes())
    expected = [0, count, count, element, element - 8, 4 + 2 * m * 4]
    if found != expected or (above, ground, links) != (m, 2 * m, m) or not math.isclose(factor, 1 / math.log(m)):
        raise GraphError(f"{path.name} is no graph of {count} vectors of {length} numbers with M = {m}")
    # Views of the elements' parts: nothing of the vectors is read.
    at = HEADER.size
    named = _view(data, at + element - 8, (count,), (element,), "<i8")
    counts = _view(data, at, (count,), (element,), "<u2")
    linked = _view(data, at + 4, (count, 2 * m), (element, 4), "<u4")
    if not np.array_equal(np.sort(named), np.sort(labels)):
        raise GraphError(f"{path.name} names other slots than those that can be ranked")
    if counts.max() > 2 * m or linked.max() >= count:
        raise GraphError(f"{path.name} has links that lead nowhere")
    _check_levels(path, data[elements_end:], count, m, top, entry)


def _check_levels(path: Path, data: NDArray[np.uint8], count: int, m: int, top: int, entry: int) -> None:
    """Links above level 0 must lead to elements that are on that level too."""
    wrong = GraphError(f"{path.name} has links that lead nowhere")
    level_bytes = 4 * m + 4
    if len(data) % 4:
        raise wrong
    words: NDArray[np.uint32] = np.frombuffer(data.tobytes(), "<u4")
    levels = np.zeros(count, np.int64)
    starts = np.zeros(count, np.int64)
    at = 0
    sizes = words.tolist()
    for element in range(count):
        if at >= len(sizes) or sizes[at] % level_bytes or at + 1 + sizes[at] // 4 > len(sizes):
            raise wrong
        levels[element], starts[element] = sizes[at] // level_bytes, at + 1
        at += 1 + sizes[at] // 4
    if at != len(sizes) or not 0 <= entry < count or top != levels[entry] or top != levels.max():
        raise wrong
    for level in range(1, top + 1):
        here = starts[levels >= level] + (level - 1) * (m + 1)
        lists = words[here[:, None] + np.arange(m + 1)]
        used = np.arange(m) < (lists[:, :1] & 0xFFFF)
        if (lists[:, 0] & 0xFFFF).max() > m or (lists[:, 1:] >= count).any():
            raise wrong
        if (levels[lists[:, 1:]][used] < level).any():
            raise wrong


def _view(data: NDArray[np.uint8], at: int, shape: tuple[int, ...], steps: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.ndarray(shape, dtype, data, at, steps)
