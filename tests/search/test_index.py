"""The index: real gradients and made ones against the exact scan; what is stale, damaged or forged is not used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from clusters import clustered, like, signed
from stores import DTYPES, Rows, change, make_header, make_rows, write_store
from test_way import with_settings
from tiny import digit_folder, run

from dmin_trace.errors import QueryError, SettingsError, TraceError
from dmin_trace.query import answer as query
from dmin_trace.search import build
from dmin_trace.search import exact as score
from dmin_trace.search.build import build_index
from dmin_trace.search.deflation import Score
from dmin_trace.search.graph import HEADER, graph_bytes
from dmin_trace.search.index import Index, open_index, search
from dmin_trace.search.index_files import GRAPH, Unavailable, index_beside
from dmin_trace.search.ranking import Ranking
from dmin_trace.search.vectors import Reduction
from dmin_trace.settings import Dtype
from dmin_trace.store import Store, open_store

CLI = ("-m", "dmin_trace.cli.app")


def opened(trace: Store) -> Index:
    """The index of a store, which must be one to use."""
    found = open_index(open_store(trace.path))
    assert isinstance(found, Index), found
    return found


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """What part of the true best was found."""
    return float(np.mean([np.isin(best, ours).mean() for ours, best in zip(found, truth, strict=True)]))


@pytest.fixture(scope="module", params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Rows]:
    """A store of 1,200 samples in clusters, with its index."""
    dtype: Dtype = request.param
    header = make_header(samples=1200, timesteps=3, dimension=512, dtype=dtype, rows=256)
    rows = clustered(header)
    trace = write_store(tmp_path_factory.mktemp(dtype) / "trace.zarr", header, rows)
    build_index(trace)
    return trace, rows


@pytest.fixture
def indexed(tmp_path: Path) -> Store:
    """A small store with an index, to be spoiled."""
    header = make_header(samples=160, timesteps=2, dimension=64, rows=64)
    trace = write_store(tmp_path / "trace.zarr", header, clustered(header, clusters=8))
    assert build_index(trace, recall=0.9).depths
    return trace


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 240 digits, its trace, and twenty other digits."""
    folder = tmp_path_factory.mktemp("digits")
    digit_folder(folder / "digits", 240)
    digit_folder(folder / "others", 20, first=400)
    script = with_settings(folder / "train.py", "timesteps=3, dimension=1024")
    command = [script, "--train_data_dir", "digits", "--max_train_steps", "90", "--train_batch_size", "16"]
    run([*command, "--output_dir", "out", "--learning_rate", "2e-3"], folder)
    return folder


def test_real_gradients_are_found_by_images_that_were_not_trained_on(digits: Path) -> None:
    trace = open_store(digits / "out" / "trace.zarr")
    others = sorted((digits / "others").iterdir())
    built = run([*CLI, "index", "out/trace.zarr"], digits)
    assert "recall@10" in built.stdout and "up to 10 hits" in built.stdout
    assert opened(trace).facts.depths[0].recall >= 0.99
    said = {}
    for name, options in {"index": (), "scan": ("--exact",)}.items():
        ran = run(
            [*CLI, "query", "--score", "dmin", "out/trace.zarr", *others, "--json", f"{name}.json", *options], digits
        )
        said[name] = ran.stdout.strip().splitlines()[-1]
    assert said["index"].startswith("answered by the index (recall@10 ")
    assert said["scan"] == "scanned all 240 samples"
    answers = {name: json.loads((digits / f"{name}.json").read_text()) for name in said}
    assert [answers[name]["trace"]["answered_by"] for name in answers] == ["index", "scan"]
    assert answers["scan"]["trace"]["index_recall"] is None
    hits = {name: [{h["sample"]: h["score"] for h in q["hits"]} for q in answers[name]["queries"]] for name in answers}
    both = [(ours, true) for ours, true in zip(hits["index"], hits["scan"], strict=True)]
    assert np.mean([len(ours.keys() & true.keys()) / 10 for ours, true in both]) >= 0.98
    assert all(ours[sample] == true[sample] for ours, true in both for sample in ours.keys() & true.keys())
    assert "recall@10" in run([*CLI, "info", "out/trace.zarr"], digits).stdout


def test_python_uses_the_index_unless_told_to_scan(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(digits / "state"))
    build_index(open_store(digits / "out" / "trace.zarr"))
    images = sorted((digits / "others").iterdir())[:2]
    searched: list[int] = []

    def watched(found: Index, gradients: np.ndarray, k: int, *, kind: Score) -> Ranking:
        searched.append(k)
        return search(found, gradients, k, kind=kind)

    monkeypatch.setattr(query, "search", watched)
    hits = query.attribute(digits / "out" / "trace.zarr", images, k=3, score="dmin")
    assert searched == [3]
    scanned = query.attribute(digits / "out" / "trace.zarr", images, k=3, score="dmin", exact=True)
    assert searched == [3]
    assert [hit.sample for hit in hits[0]] == [hit.sample for hit in scanned[0]]


@pytest.mark.parametrize(("k", "least"), [(10, 0.99), (100, 0.95), (1, 0.99), (37, 0.95)])
def test_the_recall_of_calibration_is_kept_by_other_queries(stored: tuple[Store, Rows], k: int, least: float) -> None:
    trace, rows = stored
    found = opened(trace)
    assert [depth.k for depth in found.facts.depths if depth.score == "dmin"] == [10, 100]
    assert found.facts.depths[0].recall >= 0.99 and found.facts.depths[1].recall >= 0.95
    queries = like(rows, 60)
    truth = score.exact_top_k(trace, queries, k)
    ranking = search(found, queries, k)
    assert ranking.rows.shape == (60, k) and ranking.per_timestep.shape == (60, k, 3)
    assert recall(ranking.rows, truth.rows) >= least
    # What both found has the same scores to the last bit, and is in the same order.
    for ours, true in zip(range(60), range(60), strict=True):
        here = np.isin(ranking.rows[ours], truth.rows[true])
        there = np.isin(truth.rows[true], ranking.rows[ours])
        assert np.array_equal(ranking.rows[ours][here], truth.rows[true][there])
        assert np.array_equal(ranking.scores[ours][here], truth.scores[true][there])
        assert np.array_equal(ranking.per_timestep[ours][here], truth.per_timestep[true][there])


def test_candidates_are_few(stored: tuple[Store, Rows]) -> None:
    """An index that proposed every sample would have any recall."""
    for depth in opened(stored[0]).facts.depths:
        assert depth.k <= depth.candidates <= 1200 / 8


def test_products_of_vectors_are_scores_but_for_the_fold() -> None:
    header = make_header(samples=200, timesteps=3, dimension=256)
    rows = clustered(header)
    queries = like(rows, 20)
    shared = np.stack([np.linalg.svd(rows.grad[:, t], full_matrices=False)[2][:4] for t in range(3)])
    truth = np.einsum("qtv,ntv->qn", queries, rows.grad)
    whole = Reduction(shared, 256)
    assert whole.vectors(rows.grad).shape == (200, whole.length)
    assert np.allclose(whole.vectors(queries) @ whole.vectors(rows.grad).T, truth, atol=1e-5)
    errors = {}
    for name, split in {"split": Reduction(shared, 32), "plain": Reduction(np.zeros_like(shared), 32)}.items():
        errors[name] = np.std(split.vectors(queries) @ split.vectors(rows.grad).T - truth)
    assert 0 < errors["split"] < 0.7 * errors["plain"]


def test_copies_are_ranked_as_the_scan_ranks_them(tmp_path: Path) -> None:
    """One image many times over: more often than it has links, and more often than is asked for."""
    header = make_header(samples=300, timesteps=2, dimension=128, rows=64)
    rows = clustered(header)
    same, pair = list(range(7, 300, 5)), [3, 250]
    rows.grad[same] = rows.grad[7]
    rows.grad[pair] = rows.grad[3]
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    facts = build_index(trace, recall=0.95)
    assert facts.vectors == 300 - len(same) + 1 - 1
    queries = np.concatenate([rows.grad[[7, 3]], like(rows, 10)])
    for k in (1, 10):
        truth, ranking = score.exact_top_k(trace, queries, k), search(opened(trace), queries, k)
        assert ranking.rows[0].tolist() == same[:k]
        assert ranking.rows[1, : min(k, 2)].tolist() == pair[:k]
        assert np.array_equal(ranking.rows[:2], truth.rows[:2])


def test_rows_without_a_direction_are_never_candidates(tmp_path: Path) -> None:
    header = make_header(samples=200, timesteps=2, dimension=64, rows=64)
    rows = clustered(header, clusters=8)
    bad = {2: 0.0, 9: np.nan, 16: np.inf, 199: -1.0}
    for slot, norm in bad.items():
        rows.norm[slot, 1] = norm
    rows.grad[9] = np.nan
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    facts = build_index(trace, recall=0.9)
    assert facts.vectors == 196
    ranking = search(opened(trace), like(rows._replace(grad=rows.grad[20:60]), 20), 10)
    assert not np.isin(ranking.rows, list(bad)).any()
    assert np.isfinite(ranking.scores).all()


def test_more_hits_than_were_calibrated_are_scanned_for(stored: tuple[Store, Rows]) -> None:
    trace, rows = stored
    queries = like(rows, 2)
    assert "index (recall@100" in query.answer_queries(trace, queries, k=100, score="dmin").said
    deep = query.answer_queries(trace, queries, k=101, score="dmin")
    assert deep.said == "scanned all 1,200 samples: the index serves up to 100 hits"
    assert deep.recall is None
    truth = score.exact_top_k(trace, queries, 101)
    assert [hit.score for hit in deep.hits[0]] == truth.scores[0].tolist()
    with pytest.raises(QueryError, match="k is 101, more than the index was calibrated for"):
        search(opened(trace), queries, 101)


def test_questions_that_cannot_be_asked(indexed: Store) -> None:
    found = opened(indexed)
    queries = indexed.gradients(np.array([1, 2]))
    for wrong, k, line in [(queries, 0, "k is 0"), (queries, 161, "k is 161"), (queries[:, :1], 1, "have shape")]:
        with pytest.raises(QueryError, match=line):
            search(found, wrong, k)
    queries[0, 0, 0] = np.nan
    with pytest.raises(QueryError, match="not finite"):
        search(found, queries, 1)


@pytest.mark.parametrize("fold", [None, 16])
def test_a_store_that_cannot_be_served_is_scanned_and_told_of(tmp_path: Path, fold: int | None) -> None:
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
    queries = like(rows, 2)
    answer = query.answer_queries(trace, queries, k=10, score="dmin")
    assert answer.said.startswith("scanned all 1,000 samples: the index does not serve (recall@10 is 0.")
    assert [hit.score for hit in answer.hits[1]] == score.exact_top_k(trace, queries, 10).scores[1].tolist()


def test_a_few_samples_are_scanned(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    assert not build_index(trace).depths
    said = query.answer_queries(trace, trace.gradients(np.array([1])), k=2, score="dmin").said
    assert said == "scanned all 10 samples: the index does not serve (10 samples are few enough to scan)"


def test_no_index_is_nothing_to_talk_about(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    assert (
        query.answer_queries(trace, trace.gradients(np.array([1])), k=2, score="dmin").said == "scanned all 10 samples"
    )


def test_an_index_that_folds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(samples=300, timesteps=2, dimension=128, rows=64)
    rows = clustered(header)
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    facts = build_index(trace, fold=128)
    assert (facts.fold, facts.length) == (128, 2 * (128 + 8))
    # Nothing is folded away: the ten best are the first ten candidates, and the margin is all there is beyond.
    assert facts.depths[0].candidates <= 2 * 11
    queries = like(rows, 20)
    assert recall(search(opened(trace), queries, 10).rows, score.exact_top_k(trace, queries, 10).rows) >= 0.99
    before = (index_beside(trace.path) / GRAPH).read_bytes()
    monkeypatch.setattr(build, "_free_memory", lambda: 200_000)
    with pytest.raises(SettingsError, match=r"needs 0.0 GiB of memory \(300 samples of 2 x 128 float32 numbers"):
        build_index(trace, fold=128)
    assert (index_beside(trace.path) / GRAPH).read_bytes() == before
    with pytest.raises(SettingsError, match="To find principal directions takes .* Give a smaller --directions"):
        build_index(trace, fold=16)
    assert (index_beside(trace.path) / GRAPH).read_bytes() == before
    build_index(trace, fold=16, directions=4)


def test_the_size_that_is_foretold_is_the_size_that_is_written(stored: tuple[Store, Rows]) -> None:
    facts = opened(stored[0]).facts
    found = (index_beside(stored[0].path) / GRAPH).stat().st_size
    assert found == pytest.approx(graph_bytes(facts.length, facts.vectors, facts.m), rel=0.01)


def test_the_fold_begins_within_five_percent_of_the_store() -> None:
    header = make_header(samples=9288, timesteps=10, dimension=2**14)
    folds = build.possible_folds(Store(Path("nowhere"), header, True, np.zeros(0, bool)), None, 16)
    assert folds == [128, 256, 512]
    assert graph_bytes(10 * 136, 9288, 16) < 0.05 * 9288 * 10 * 2**14 < graph_bytes(10 * 264, 9288, 16)
    for small in (make_header(timesteps=2, dimension=256), make_header(timesteps=1000, dimension=16)):
        assert build.possible_folds(Store(Path("nowhere"), small, True, np.zeros(0, bool)), None, 16)


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
def test_arguments_that_cannot_be_meant(indexed: Store, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=line):
        build_index(indexed, **arguments)


def other_id(folder: Path) -> None:
    change(folder / "trace.zarr", lambda facts: facts["attributes"].update(id="f" * 32))


def other_timesteps(folder: Path) -> None:
    change(folder / "trace.zarr", lambda facts: facts["attributes"].update(timesteps=[1.0, 2.0]))


def other_gradients(folder: Path) -> None:
    grad = zarr.open_array(folder / "trace.zarr" / "grad", mode="r+")
    grad[5, 1, 3] = grad[5, 1, 3] // 2 + 1


def other_norms(folder: Path) -> None:
    zarr.open_array(folder / "trace.zarr" / "norm", mode="r+")[5, 1] = 0


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


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another store": (other_id, "of another store"),
    "other timesteps": (other_timesteps, "the store has changed"),
    "other gradients": (other_gradients, "the store has changed"),
    "other norms": (other_norms, "the store has changed"),
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


@pytest.mark.parametrize(("spoil", "line"), SPOILED.values(), ids=SPOILED.keys())
def test_an_index_that_does_not_fit_is_not_used(indexed: Store, spoil: Callable[[Path], None], line: str) -> None:
    spoil(indexed.path.parent)
    trace = open_store(indexed.path)
    why = open_index(trace)
    assert isinstance(why, Unavailable) and line in why.reason
    queries = trace.gradients(np.array([17]))
    answer = query.answer_queries(trace, queries, k=5, score="dmin")
    assert answer.said == f"scanned all 160 samples: {why.reason}"
    assert [hit.score for hit in answer.hits[0]] == score.exact_top_k(trace, queries, 5).scores[0].tolist()
    # And it is mended by building it.
    build_index(trace, recall=0.9)
    opened(trace)


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
    "a label of no slot": (
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


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with an index of a known shape."""
    header = make_header(samples=160, timesteps=2, dimension=64, rows=64)
    trace = write_store(tmp_path_factory.mktemp("genuine") / "trace.zarr", header, clustered(header, clusters=8))
    facts = build_index(trace, recall=0.5, fold=32)
    assert facts.depths and (facts.fold, facts.m, facts.vectors) == (32, 16, 160)
    return trace


@pytest.mark.parametrize(("edit", "line"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_graph_is_refused_before_hnswlib_reads_it(
    genuine: Store, tmp_path: Path, edit: Callable[[bytearray], object], line: str
) -> None:
    shutil.copytree(genuine.path.parent, tmp_path / "copy")
    trace = open_store(tmp_path / "copy" / "trace.zarr")
    opened(trace)
    forged(trace, edit)
    why = open_index(trace)
    assert isinstance(why, Unavailable) and line in why.reason and GRAPH in why.reason


def test_a_link_above_to_an_element_below_is_refused(genuine: Store, tmp_path: Path) -> None:
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


def test_words_from_an_index_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    build_index(trace)
    edited(short="\x1b[2J[red]x")(tmp_path)
    ran = run([*CLI, "query", "--score", "dmin", "trace.zarr", "--sample", "100", "-k", "1"], tmp_path)
    assert "\x1b" not in ran.stdout and "\\x1b[2J[red]x" in ran.stdout
    assert "\x1b" not in run([*CLI, "info", "trace.zarr"], tmp_path).stdout


KILLED = """
import os, sys
from pathlib import Path
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
def test_a_killed_build_leaves_nothing_in_use(indexed: Store, when: str, before: bool) -> None:
    folder = index_beside(indexed.path)
    if not before:
        shutil.rmtree(folder)
    old = opened(indexed).facts if before else None
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
    assert opened(indexed).facts.fold == 16
    assert sorted(path.name for path in folder.parent.iterdir()) == ["trace.index", "trace.zarr"]


def test_what_is_not_ours_is_not_overwritten(indexed: Store) -> None:
    folder = index_beside(indexed.path)
    (folder / "thesis.tex").write_text("all of it")
    with pytest.raises(TraceError, match="is no index of dmin_trace. Move it away"):
        build_index(indexed)
    assert (folder / "thesis.tex").read_text() == "all of it"


def test_an_unfinished_store_is_not_indexed(tmp_path: Path) -> None:
    header = make_header(samples=10)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    change(trace.path, lambda facts: facts["attributes"].update(complete=False))
    with pytest.raises(TraceError, match="is unfinished"):
        build_index(open_store(trace.path, unfinished=True))


def test_building_holds_a_part_of_the_gradients_at_a_time(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("arguments", [("--fold", "many"), ("--fold", "48"), ("--recall", "2")])
def test_a_mistake_on_the_command_line_gives_one_line(indexed: Store, arguments: tuple[str, ...]) -> None:
    ran = run([*CLI, "index", "trace.zarr", *arguments], indexed.path.parent, code=1)
    assert len(ran.stderr.strip().splitlines()) == 1 and arguments[1] in ran.stderr
