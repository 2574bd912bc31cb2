"""Graph files: `load_graph` refuses what hnswlib would follow out of the file."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clusters import clustered, opened_index, signed
from stores import make_header, write_store

from dmin_trace.search.build import build_index
from dmin_trace.search.hnsw import HEADER, graph_bytes, load_graph, make_graph
from dmin_trace.search.index import open_index
from dmin_trace.search.index_files import GRAPH, Unavailable, index_beside
from dmin_trace.store import Store, open_store


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with an index of a known shape."""
    header = make_header(samples=160, timesteps=2, dimension=64, rows=64)
    trace = write_store(tmp_path_factory.mktemp("genuine") / "trace.zarr", header, clustered(header, clusters=8))
    facts = build_index(trace, recall=0.5, fold=32)
    assert facts.depths and (facts.fold, facts.m, facts.vectors) == (32, 16, 160)
    return trace


def forged(trace: Store, edit: Callable[[bytearray], object]) -> None:
    """Changes the graph's file, and its size and checksum with it."""
    folder = index_beside(trace.path)
    data = bytearray((folder / GRAPH).read_bytes())
    edit(data)
    (folder / GRAPH).write_bytes(data)
    facts = json.loads((folder / "index.json").read_text())
    facts["files"][GRAPH] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "index.json").write_text(signed(facts))


def header_field(number: int, value: float) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        fields = list(HEADER.unpack(data[: HEADER.size]))
        fields[number] = type(fields[number])(value)
        data[: HEADER.size] = HEADER.pack(*fields)

    return edit


ELEMENT = 4 + 32 * 4 + 4 * 2 * (32 + 8) + 8


def elements_end(data: bytearray) -> int:
    return HEADER.size + 160 * ELEMENT


def first_level(data: bytearray) -> int:
    """Where the links of the first element above level 0 are, behind their length."""
    at = elements_end(data)
    while struct.unpack_from("<I", data, at)[0] == 0:
        at += 4
    return at + 4


FORGERIES: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "an offset": (header_field(0, 8), "no graph of"),
    "room for fewer than there are": (header_field(1, 1), "no graph of"),
    "room for very many": (header_field(1, 2**60), "no graph of"),
    "more elements": (header_field(2, 161), "no graph of"),
    "no elements": (header_field(2, 0), "no graph of"),
    "larger elements": (header_field(3, ELEMENT + 4), "no graph of"),
    "a label elsewhere": (header_field(4, 2**40), "no graph of"),
    "a vector elsewhere": (header_field(5, 2**40), "no graph of"),
    "a top level too many": (header_field(6, 9), "lead nowhere"),
    "a negative top level": (header_field(6, -1), "lead nowhere"),
    "an entry that is none": (header_field(7, 160), "lead nowhere"),
    "more links above": (header_field(8, 17), "no graph of"),
    "more links": (header_field(9, 33), "no graph of"),
    "another M": (header_field(10, 15), "no graph of"),
    "another factor": (header_field(11, 0.0), "no graph of"),
    "a count of links": (lambda data: struct.pack_into("<H", data, HEADER.size, 33), "lead nowhere"),
    "a link": (lambda data: struct.pack_into("<I", data, HEADER.size + 3 * ELEMENT + 4, 160), "lead nowhere"),
    "a label twice": (
        lambda data: struct.pack_into("<q", data, HEADER.size + ELEMENT - 8, 100),
        "does not name 160 rows",
    ),
    "a label of no row": (
        lambda data: struct.pack_into("<q", data, HEADER.size + ELEMENT - 8, 2**40),
        "does not name 160 rows",
    ),
    "a length of levels": (
        lambda data: struct.pack_into("<I", data, first_level(data) - 4, 2**32 - 4),
        "lead nowhere",
    ),
    "a length that is no level's": (lambda data: struct.pack_into("<I", data, elements_end(data), 4), "lead nowhere"),
    "a count above": (lambda data: struct.pack_into("<H", data, first_level(data), 17), "lead nowhere"),
    "a link above": (lambda data: struct.pack_into("<I", data, first_level(data) + 4, 160), "lead nowhere"),
    "more at the end": (lambda data: data.extend(b"\0" * 4), "lead nowhere"),
    "less at the end": (lambda data: data.__delitem__(slice(-4, None)), "lead nowhere"),
    "a third of it": (lambda data: data.__delitem__(slice(len(data) // 3, None)), "has"),
    "nothing": (lambda data: data.clear(), "has 0 bytes"),
}


@pytest.mark.parametrize(("edit", "line"), FORGERIES.values(), ids=FORGERIES.keys())
def test_load_graph_refuses_a_forged_file(
    genuine: Store, tmp_path: Path, edit: Callable[[bytearray], object], line: str
) -> None:
    shutil.copytree(genuine.path.parent, tmp_path / "copy")
    trace = open_store(tmp_path / "copy" / "trace.zarr")
    opened_index(trace)
    forged(trace, edit)
    why = open_index(trace)
    assert isinstance(why, Unavailable) and line in why.reason and GRAPH in why.reason


def test_load_graph_refuses_a_link_to_an_element_that_is_not_on_that_level(genuine: Store, tmp_path: Path) -> None:
    """The search would follow the links of a level that the element does not have."""
    shutil.copytree(genuine.path.parent, tmp_path / "copy")
    trace = open_store(tmp_path / "copy" / "trace.zarr")

    def edit(data: bytearray) -> None:
        at, levels = elements_end(data), []
        for _ in range(160):
            size = struct.unpack_from("<I", data, at)[0]
            levels.append(size // 68)
            at += 4 + size
        struct.pack_into("<HH", data, first_level(data), 1, 0)
        struct.pack_into("<I", data, first_level(data) + 4, levels.index(0))

    forged(trace, edit)
    why = open_index(trace)
    assert isinstance(why, Unavailable) and "lead nowhere" in why.reason


def test_hnsw_bytes_is_the_size_that_is_written(genuine: Store) -> None:
    facts = opened_index(genuine).facts
    found = (index_beside(genuine.path) / GRAPH).stat().st_size
    assert found == pytest.approx(graph_bytes(facts.length, facts.vectors, facts.m), rel=0.01)


def test_load_graph_takes_a_genuine_file_with_several_levels(tmp_path: Path) -> None:
    graph = make_graph(4, 500, 2, 10)
    vectors = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    graph.add_items(vectors, np.arange(500) * 3)
    graph.save_index(str(tmp_path / "graph"))
    top = HEADER.unpack((tmp_path / "graph").read_bytes()[: HEADER.size])[6]
    assert top >= 3
    loaded, held = load_graph(tmp_path / "graph", 4, 500, 1500, 2)
    assert np.flatnonzero(held).tolist() == list(range(0, 1500, 3))
    assert np.array_equal(loaded.knn_query(vectors[:5], k=3)[0], graph.knn_query(vectors[:5], k=3)[0])
