"""`build_index`: what it makes, refuses, and leaves when it is killed."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clusters import clustered, indexed_store, like, opened_index, recall
from stores import change, make_header, make_rows, write_store

from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.search import build
from dmin_trace.search.build import build_index
from dmin_trace.search.exact import exact_top_k
from dmin_trace.search.hnsw import graph_bytes
from dmin_trace.search.index import Index, open_index, search
from dmin_trace.search.index_files import GRAPH, Unavailable, index_beside
from dmin_trace.store import Store, open_store


@pytest.fixture
def indexed(tmp_path: Path) -> Store:
    """A small store with an index, to be changed."""
    return indexed_store(tmp_path)[0]


@pytest.mark.parametrize("fold", [None, 16])
def test_build_index_keeps_no_graph_that_misses_the_recall(tmp_path: Path, fold: int | None) -> None:
    """Isotropic rows are all equally far from each other."""
    header = make_header(samples=1000, timesteps=2, dimension=8192, rows=256)
    rows = make_rows(header)
    rows = rows._replace(grad=rows.grad / np.linalg.norm(rows.grad, axis=2, keepdims=True))
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    facts = build_index(trace, fold=fold)
    assert not facts.depths
    assert "recall@10 is 0." in facts.short
    assert sorted(file.name for file in index_beside(trace.path).iterdir()) == [
        "eigenvalues.f64",
        "index.json",
        "principal.f32",
    ]
    why = open_index(trace)
    assert isinstance(why, Unavailable) and why.reason.startswith("the index does not serve (recall@10 is 0.")


def test_build_index_makes_no_graph_of_a_few_samples(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    assert not build_index(trace).depths
    assert open_index(trace) == Unavailable("the index does not serve (10 samples are few enough to scan)")


def test_build_index_with_full_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(samples=300, timesteps=2, dimension=128, rows=64)
    rows = clustered(header)
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    facts = build_index(trace, fold=128)
    assert (facts.fold, facts.length) == (128, 2 * (128 + 8))
    # Nothing is folded away: the ten best are the first ten candidates, and the margin is all there is beyond.
    assert facts.depths[0].candidates <= 2 * 11
    queries = like(rows, 20)
    assert recall(search(opened_index(trace), queries, 10).rows, exact_top_k(trace, queries, 10).rows) >= 0.99
    before = (index_beside(trace.path) / GRAPH).read_bytes()
    monkeypatch.setattr(build.psutil, "virtual_memory", lambda: SimpleNamespace(available=200_000))
    with pytest.raises(SettingsError, match=r"\(300 samples of 2 x 128 float32 numbers, and links\) needs 0.0 GiB"):
        build_index(trace, fold=128)
    assert (index_beside(trace.path) / GRAPH).read_bytes() == before
    with pytest.raises(SettingsError, match="Finding the principal directions needs .* Give a smaller --directions"):
        build_index(trace, fold=16)
    assert (index_beside(trace.path) / GRAPH).read_bytes() == before
    build_index(trace, fold=16, directions=4)


def test_possible_folds_begin_within_five_percent_of_the_store() -> None:
    header = make_header(samples=9288, timesteps=10, dimension=2**14)
    folds = build.possible_folds(Store(Path("nowhere"), header, np.zeros(0, bool), None), None, 16)
    assert folds == [128, 256, 512]
    assert graph_bytes(10 * 136, 9288, 16) < 0.05 * 9288 * 10 * 2**14 < graph_bytes(10 * 264, 9288, 16)
    for small in (make_header(timesteps=2, dimension=256), make_header(timesteps=1000, dimension=16)):
        assert build.possible_folds(Store(Path("nowhere"), small, np.zeros(0, bool), None), None, 16)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"recall": 0.0}, "recall is 0.0"),
        ({"recall": 1.5}, "recall is 1.5"),
        ({"fold": 48}, "fold is 48; expected a divisor of the store's dimension 64"),
        ({"fold": 0}, "fold is 0"),
        ({"m": 1}, "M is 1"),
        ({"m": 101}, "M is 101"),
        ({"ef_construction": 3}, "ef_construction is 3"),
    ],
)
def test_build_index_refuses_settings_out_of_range(indexed: Store, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=line):
        build_index(indexed, **arguments)


KILLED = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from dmin_trace.search import build, index_files
from dmin_trace.store import open_store
def progress(what, done, of):
    if sys.argv[2] in what:
        os._exit(9)
if sys.argv[2] == "writing":
    index_files.sync_tree = lambda path: os._exit(9)
if sys.argv[2] == "between":
    def rename(self, target, rename=Path.rename):
        rename(self, target)
        os._exit(9)
    Path.rename = rename
build.build_index(open_store(sys.argv[1]), recall=0.5, fold=16, progress=progress)
"""


@pytest.mark.parametrize("when", ["copies", "scanning", "linking", "writing", "between"])
@pytest.mark.parametrize("before", [True, False])
def test_a_killed_build_leaves_the_index_before_it(indexed: Store, when: str, before: bool) -> None:
    folder = index_beside(indexed.path)
    if not before:
        shutil.rmtree(folder)
    old = opened_index(indexed).facts if before else None
    code = subprocess.run([sys.executable, "-c", KILLED, indexed.path, when], check=False).returncode
    assert code == 9
    found = open_index(open_store(indexed.path))
    if when == "between" and not before:
        assert isinstance(found, Index) and found.facts.fold == 16
    elif old is None or when == "between":
        assert found == Unavailable("")
    else:
        assert isinstance(found, Index) and found.facts == old
    build_index(indexed, recall=0.5, fold=16)
    assert opened_index(indexed).facts.fold == 16
    assert sorted(path.name for path in folder.parent.iterdir()) == ["trace.index", "trace.zarr"]


def test_build_index_overwrites_no_other_folder(indexed: Store) -> None:
    folder = index_beside(indexed.path)
    (folder / "thesis.tex").write_text("all of it")
    with pytest.raises(TraceError, match="is no index of dmin_trace. Move it away"):
        build_index(indexed)
    assert (folder / "thesis.tex").read_text() == "all of it"


def test_build_index_refuses_an_unfinished_store(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    change(trace.path, lambda facts: facts["attributes"].update(complete=False))
    with pytest.raises(TraceError, match="is unfinished"):
        build_index(open_store(trace.path, unfinished=True))


def test_build_index_holds_a_part_of_the_gradients_at_a_time(tmp_path: Path) -> None:
    """Traced memory leaves the graph out, which hnswlib holds, and the maps."""
    header = make_header(samples=1024, timesteps=2, dimension=8192, rows=256)
    rows = clustered(dataclasses.replace(header, samples=256))
    grad = np.concatenate([np.roll(rows.grad, turn * 64, axis=2) for turn in range(4)])
    whole = make_rows(dataclasses.replace(header, dimension=16))._replace(grad=grad)
    trace = write_store(tmp_path / "trace.zarr", header, whole)
    del grad, whole
    tracemalloc.start()
    build_index(trace, fold=128, recall=0.5, directions=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All of it is 64 MiB as float32.
    assert peak < 60 * 2**20
