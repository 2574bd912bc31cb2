"""Graph files of hnswlib: their size, and the checks before one is loaded.

hnswlib follows lengths, offsets and links that lead outside of a file. So a file is read here first, as hnswlib 0.8
writes it, and every number that a search follows is checked. A forged file can still leave the best rows out, or be
slow; the rows that it names are rows of the store, and their scores come from the store.

    header     offset of the elements, 0; how many fit; how many there are; bytes of an element; where in it the label
               and the vector lie (8 bytes each); the top level, the first element of a search (4 each); the most links
               of an element above level 0 and on it; M; the factor of the levels; ef_construction (8 each)
    elements   links on level 0: their count (2 bytes), a mark and a byte of padding, then their numbers (4 each, padded
               to 2 M); the vector (float32); the label (8)
    levels     for each element the bytes of its links above level 0 (4), and for each level their count and M numbers
"""

import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import hnswlib

Graph: TypeAlias = "hnswlib.Index"
HEADER = struct.Struct("<6QiI3QdQ")


class GraphError(Exception):
    """A file of an index that is not used; the message says what is wrong with it. Does not leave `search`."""


def make_graph(length: int, most: int, m: int, ef_construction: int) -> Graph:
    """An empty graph for vectors of `length` numbers, by inner product."""
    import hnswlib

    graph = hnswlib.Index(space="ip", dim=length)
    graph.init_index(max_elements=most, M=m, ef_construction=ef_construction)
    return graph


def graph_bytes(length: int, vectors: int, m: int) -> int:
    """The size of a graph's file, and about that of the graph in memory."""
    above = (4 * m + 4) / (m - 1)  # an element is on level l with the probability M^-l
    return HEADER.size + round(vectors * (_element_bytes(length, m) + 4 + above))


def load_graph(path: Path, length: int, count: int, rows: int, m: int) -> tuple[Graph, NDArray[np.bool_]]:
    """The graph in a file, checked before hnswlib reads it, and which rows it holds, (rows,). Raises GraphError if it
    is no graph of `count` vectors of `length` numbers, each of another one of `rows` rows."""
    import hnswlib

    try:
        held = _check(path, length, count, rows, m)
        graph = hnswlib.Index(space="ip", dim=length)
        graph.load_index(os.fspath(path), max_elements=count)
    except OSError as error:
        raise GraphError(f"{path.name} cannot be read: {error.strerror or error}") from None
    except RuntimeError as error:
        raise GraphError(f"{path.name} cannot be loaded: {error}") from None
    return graph, held


def _element_bytes(length: int, m: int) -> int:
    return 4 + 2 * m * 4 + length * 4 + 8


def _check(path: Path, length: int, count: int, rows: int, m: int) -> NDArray[np.bool_]:
    """The rows that the elements are of. Raises GraphError or OSError."""
    element = _element_bytes(length, m)
    at, elements_end = HEADER.size, HEADER.size + count * element
    size = path.stat().st_size
    if size < elements_end + 4 * count:
        raise GraphError(f"{path.name} has {size} bytes; {count} vectors need {elements_end + 4 * count} at least")
    data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    *found, top, entry, above, ground, links, factor, _ = HEADER.unpack(data[:at].tobytes())
    expected = [0, count, count, element, element - 8, 4 + 2 * m * 4]
    if found != expected or (above, ground, links) != (m, 2 * m, m) or not math.isclose(factor, 1 / math.log(m)):
        raise GraphError(f"{path.name} is no graph of {count} vectors of {length} numbers with M = {m}")
    labels: NDArray[np.int64] = np.ndarray(count, "<i8", data, at + element - 8, element)
    counts: NDArray[np.uint16] = np.ndarray(count, "<u2", data, at, element)
    linked: NDArray[np.uint32] = np.ndarray((count, 2 * m), "<u4", data, at + 4, (element, 4))
    held = np.zeros(rows, np.bool_)
    if count and labels.min() >= 0 and labels.max() < rows:
        held[labels] = True
    if held.sum() != count:
        raise GraphError(f"{path.name} does not name {count} rows of the store, each once")
    inside = counts.max() <= 2 * m and linked.max() < count
    if not inside or not _levels_are_sound(data[elements_end:], count, m, top, entry):
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
    chain, place, following = [], 0, memoryview(after)
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
        lengths, numbers = lists[:, :1] & 0xFFFF, lists[:, 1:]
        if lengths.max() > m or (numbers >= count).any() or (levels[numbers][np.arange(m) < lengths] < level).any():
            return False
    return True
