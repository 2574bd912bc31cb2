"""Files of an index: one that is stale, damaged or forged is not used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clusters import indexed_store, opened_index, signed
from stores import change

from dmin_trace.search import index_files
from dmin_trace.search.build import build_index
from dmin_trace.search.deflation import Directions
from dmin_trace.search.index import Index, open_directions, open_index, search
from dmin_trace.search.index_files import GRAPH, Facts, Unavailable, index_beside, read_facts
from dmin_trace.store import Store, open_store


@pytest.fixture
def indexed(tmp_path: Path) -> Store:
    """A small store with an index, to be changed."""
    return indexed_store(tmp_path)[0]


def other_id(folder: Path) -> None:
    change(folder / "trace.zarr", lambda facts: facts["attributes"].update(id="f" * 32))


def edited(**changes: object) -> Callable[[Path], None]:
    """Changes facts in index.json."""

    def edit(folder: Path) -> None:
        facts = json.loads((folder / "trace.index" / "index.json").read_text())
        (folder / "trace.index" / "index.json").write_text(signed(facts | changes))

    return edit


def shorter(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = folder / "trace.index" / name
        file.write_bytes(file.read_bytes()[:-1])

    return cut


def flipped(folder: Path) -> None:
    file = folder / "trace.index" / GRAPH
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def without_digest(folder: Path) -> None:
    file = folder / "trace.index" / "index.json"
    facts = json.loads(file.read_text())
    del facts["digest"]
    file.write_text(json.dumps(facts))


def rotten(folder: Path) -> None:
    file = folder / "trace.index" / "index.json"
    file.write_text(file.read_text().replace('"target": 0.9', '"target": 0.8'))


CHANGED_INDEX: dict[str, tuple[Callable[[Path], None], str]] = {
    "another store": (other_id, "of another store"),
    "another state": (edited(state="f" * 64), "the store has changed"),
    "another version": (edited(version=2), "another version"),
    "no digest": (without_digest, "index.json is damaged"),
    "another format": (edited(format="x"), "another version"),
    "another number of samples": (edited(samples=10), "the store has changed"),
    "another M": (edited(m=8), "graph.hnsw is no graph of 160 vectors"),
    "an M that is none": (edited(m=0), "Expected `int` >= 2 - at `$.m`"),
    "another fold": (edited(fold=4), "graph.hnsw is no"),
    "a fold that is none": (edited(fold=3), "fold 3 does not divide dimension 64"),
    "a fold that is text": (edited(fold="8"), "Expected `int`, got `str` - at `$.fold`"),
    "a recall beyond one": (edited(target=7), "Expected `float` <= 1.0 - at `$.target`"),
    "a fact more": (edited(more=1), "unknown field `more`"),
    "depths that are none": (edited(depths=[1]), "Expected `object`, got `int` - at `$.depths[0]`"),
    "more candidates than samples": (
        edited(depths=[{"score": "dmin", "k": 10, "candidates": 10**9, "ef": 10**9, "recall": 1.0}]),
        "1000000000 candidates do not fit 160 vectors",
    ),
    "no JSON": (
        lambda folder: (folder / "trace.index" / "index.json").write_text("{") and None,
        "index.json is not valid",
    ),
    "JSON that is deep": (
        lambda folder: (folder / "trace.index" / "index.json").write_text("[" * 10**5) and None,
        "index.json is not valid",
    ),
    "no facts": (lambda folder: (folder / "trace.index" / "index.json").unlink(), "no index.json that can be read"),
    "no graph": (lambda folder: (folder / "trace.index" / GRAPH).unlink(), "graph.hnsw is not of the size"),
    "half a graph": (shorter(GRAPH), "graph.hnsw is not of the size"),
    "half of the common directions": (shorter("common.f32"), "common.f32 is not of the size"),
    "a bit": (flipped, "graph.hnsw is damaged"),
    "half of the checksums": (shorter("rows.u32"), "rows.u32 is not of the size"),
    "timesteps that are no whole number": (edited(timesteps=4.5), "Expected `int`, got `float` - at `$.timesteps`"),
    "another recall, and the old digest": (rotten, "index.json is damaged"),
}


@pytest.mark.parametrize(("spoil", "line"), CHANGED_INDEX.values(), ids=CHANGED_INDEX.keys())
def test_open_index_gives_the_reason_why_an_index_is_not_used(
    indexed: Store, spoil: Callable[[Path], None], line: str
) -> None:
    spoil(indexed.path.parent)
    why = open_index(open_store(indexed.path))
    assert isinstance(why, Unavailable) and line in why.reason
    build_index(open_store(indexed.path), recall=0.9)
    opened_index(indexed)


def damaged(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def values(file: Path, first: np.ndarray) -> None:
    """Other eigenvalues of the first timestep."""
    kept = file.parent / "eigenvalues.f64"
    numbers = np.fromfile(kept, "<f8")
    numbers[: len(first)] = first
    forge(kept, numbers, "<f8")


def changed_facts(file: Path, **changes: object) -> None:
    edited(**changes)(file.parent.parent)


def forge(file: Path, numbers: np.ndarray, dtype: str = "<f4") -> None:
    """Other numbers, with their size and checksum."""
    numbers.astype(dtype).tofile(file)
    facts = json.loads((file.parent / "index.json").read_text())
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    facts["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checksum}
    (file.parent / "index.json").write_text(signed(facts))


CHANGED_DIRECTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (damaged, "principal.f32 is damaged"),
    "no file": (Path.unlink, "principal.f32 is not of the size"),
    "half a file": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "principal.f32 is not of the size"),
    "fewer than claimed": (lambda file: forge(file, np.ones(128)), "it is damaged"),
    "more than claimed": (lambda file: forge(file, np.ones(10**6)), "principal.f32 is not of the size"),
    "no directions": (lambda file: forge(file, np.ones(file.stat().st_size // 4)), "holds no directions"),
    "not finite": (lambda file: forge(file, np.full(file.stat().st_size // 4, np.nan)), "holds no directions"),
    "eigenvalues that rise": (
        lambda file: values(file, np.arange(2, dtype="<f8")),
        "eigenvalues.f64 holds no eigenvalues",
    ),
    "eigenvalues below zero": (
        lambda file: values(file, np.array([1.0, -2.0])),
        "eigenvalues.f64 holds no eigenvalues",
    ),
    "eigenvalues that are none": (
        lambda file: values(file, np.array([1.0, np.nan])),
        "eigenvalues.f64 holds no eigenvalues",
    ),
    "endless eigenvalues": (lambda file: values(file, np.array([np.inf, 1.0])), "eigenvalues.f64 holds no eigenvalues"),
    "no eigenvalues": (lambda file: (file.parent / "eigenvalues.f64").unlink(), "is not of the size"),
    "more than samples": (lambda file: changed_facts(file, principal=161), "names other files"),
    "a part of one": (
        lambda file: changed_facts(file, principal=1.5),
        "Expected `int`, got `float` - at `$.principal`",
    ),
    "text": (lambda file: changed_facts(file, principal="many"), "Expected `int`, got `str`"),
    "a huge number": (lambda file: changed_facts(file, principal=10**400), "index.json is not valid"),
    "another file": (
        lambda file: changed_facts(file, files={"../x": {"bytes": 1, "sha256": "a" * 64}}),
        "names other files",
    ),
    "a score that is none": (
        lambda file: changed_facts(file, depths=[{"score": "x", "k": 1, "candidates": 1, "ef": 1, "recall": 1.0}]),
        "index.json is not valid",
    ),
}


@pytest.mark.parametrize(("spoil", "line"), CHANGED_DIRECTIONS.values(), ids=CHANGED_DIRECTIONS.keys())
def test_open_directions_gives_the_reason_why_they_are_not_used(
    indexed: Store, spoil: Callable[[Path], object], line: str
) -> None:
    spoil(index_beside(indexed.path) / "principal.f32")
    why = open_directions(open_store(indexed.path))
    assert isinstance(why, Unavailable) and line in why.reason


def test_files_are_hashed_once_and_only_where_they_are_used(indexed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = index_files._sha256
    monkeypatch.setattr(index_files, "_sha256", lambda file: (hashed.append(file.name), real(file))[1])
    store = open_store(indexed.path)
    assert isinstance(read_facts(store), Facts) and not hashed
    open_directions(store)
    assert sorted(hashed) == ["eigenvalues.f64", "principal.f32"]
    hashed.clear()
    open_index(store)
    assert sorted(hashed) == ["common.f32", "copies.i64", "graph.hnsw", "rows.u32"]


def test_a_query_reads_no_numbers_of_all_rows(indexed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the candidates alone; nor does it compute the store's state."""
    store = open_store(indexed.path)
    queries = store.gradients(np.array([3]))
    for name in ("sample", "norm", "loss", "valid", "rows_done"):
        monkeypatch.setattr(Store, name, property(lambda self: pytest.fail("reads numbers of all rows")))
    monkeypatch.setattr(Store, "compute_state", lambda self: pytest.fail("reads all checksums"))
    directions, opened = open_directions(store), open_index(store)
    assert isinstance(directions, Directions) and isinstance(opened, Index)
    assert search(opened, directions.deflate(queries), 5, kind="deflated").rows.shape == (1, 5)
