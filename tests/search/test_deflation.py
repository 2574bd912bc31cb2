"""Deflated scores against dense linear algebra in float64, whatever the store's dtype, codec and rows are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from clusters import clustered, like, signed
from stores import DTYPES, make_header, write_store

from dmin_trace.cli.app import main
from dmin_trace.errors import QueryError, SettingsError, TraceError
from dmin_trace.query import answer as query
from dmin_trace.search import deflation as kernel
from dmin_trace.search.build import build_index
from dmin_trace.search.deflation import choose_directions, principal_directions
from dmin_trace.search.index import open_directions
from dmin_trace.search.index_files import Facts, Unavailable, index_beside, read_facts
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import Store, open_store
from dmin_trace.views.describe import index_facts


def stored_rows(trace: Store) -> np.ndarray:
    """(T, n, v) what can be ranked, in float64."""
    return trace.gradients(np.flatnonzero(trace.valid)).transpose(1, 0, 2).astype(np.float64)


def slow_deflated(trace: Store, queries: np.ndarray, count: int) -> np.ndarray:
    """Deflation as its formula says, from the singular vectors of all rows of a timestep."""
    freed = np.empty(queries.shape)
    for t, rows in enumerate(stored_rows(trace)):
        _, singular, vectors = np.linalg.svd(rows, full_matrices=False)
        d, v = singular[:count] ** 2, vectors[:count]
        of_t = queries[:, t].astype(np.float64)
        freed[:, t] = of_t - (of_t @ v.T * (d / (d + d[-1]))) @ v
    return freed


def slow_scores(trace: Store, queries: np.ndarray) -> np.ndarray:
    """(Q, n) inner products, summed over timesteps."""
    return np.asarray(sum(queries[:, t] @ rows.T for t, rows in enumerate(stored_rows(trace))))


@pytest.fixture(scope="module", params=[*[(dtype, "none") for dtype in DTYPES], ("int8", "blosc")])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray]:
    """A store of 300 samples, five of which cannot be ranked, and 12 queries."""
    dtype: Dtype
    codec: Codec
    dtype, codec = request.param
    header = make_header(samples=300, timesteps=3, dimension=128, dtype=dtype, rows=64, codec=codec)
    rows = clustered(header, clusters=12)
    queries = like(rows, 12)
    for slot, norm in {2: 0.0, 9: np.nan, 16: np.inf, 130: 0.0, 299: -1.0}.items():
        rows.norm[slot, 1] = norm
    rows.grad[[9, 16]] = np.nan
    rows.grad[[2, 130]] = 0
    return write_store(tmp_path_factory.mktemp("kernel") / "trace.zarr", header, rows), queries


def test_deflated_queries_are_those_of_dense_algebra(stored: tuple[Store, np.ndarray]) -> None:
    trace, queries = stored
    found = principal_directions(trace, 40)
    assert found.vectors.shape == (3, 40, 128)
    assert found.eigenvalues.shape == (3, 40)
    assert np.allclose(found.vectors @ found.vectors.transpose(0, 2, 1), np.eye(40), atol=1e-4)
    for count in (1, 12, 40):
        ours = found.largest(count).deflate(queries)
        assert ours.dtype == np.float32
        assert np.allclose(ours, slow_deflated(trace, queries, count), atol=2e-5)
        assert not np.allclose(ours, queries, atol=1e-2)


def test_passes_over_the_store_come_near_to_dense_algebra(
    stored: tuple[Store, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, queries = stored
    monkeypatch.setattr(kernel, "MAX_DENSE_SAMPLES", 0)
    monkeypatch.setattr(kernel, "BLOCK_NUMBERS", 50 * 3 * 128)  # several blocks
    found = principal_directions(trace, 20)
    exact = np.linalg.svd(stored_rows(trace), compute_uv=False)[:, :20] ** 2
    assert np.allclose(found.eigenvalues[:, :10], exact[:, :10], rtol=1e-3)
    # Beyond the clusters all directions are alike, and which of them are found matters little.
    assert np.allclose(found.eigenvalues, exact, rtol=0.15) and (found.eigenvalues < exact * (1 + 1e-6)).all()
    assert np.allclose(found.vectors @ found.vectors.transpose(0, 2, 1), np.eye(20), atol=1e-5)
    ours, true = (slow_scores(trace, q) for q in (found.deflate(queries), slow_deflated(trace, queries, 20)))
    assert np.corrcoef(ours.ravel(), true.ravel())[0, 1] > 0.99


def test_directions_that_all_samples_share_are_more_than_one_sample_alone_has(tmp_path: Path) -> None:
    """Three directions shared by all, and of each sample its own: exactly those three are taken out."""
    header = make_header(samples=60, timesteps=2, dimension=256, dtype="float32", rows=16)
    rows = clustered(header)
    generator = np.random.default_rng(3)
    basis = np.linalg.qr(generator.standard_normal((256, 63)))[0].T
    mixed = generator.standard_normal((60, 3)) @ basis[:3] * 2 + 0.9 * basis[3:]
    rows.grad[:] = (mixed / np.linalg.norm(mixed, axis=1, keepdims=True))[:, None]
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    assert principal_directions(trace).vectors.shape == (2, 3, 256)
    assert choose_directions(np.array([[5.0, 3.1, 2.9], [0.5, 0.2, 0.0]])) == 2
    assert choose_directions(np.array([[5.0, 4.0, 3.1], [9.0, 0.2, 0.0]])) == 3
    assert choose_directions(np.array([[0.5, 0.2]])) == 1


def test_no_more_directions_are_taken_than_a_timestep_has(tmp_path: Path) -> None:
    header = make_header(samples=6, timesteps=2, dimension=16, dtype="float32", rows=6)
    rows = clustered(header, clusters=6)
    queries = like(rows, 3)
    rows.grad[:, 1] = rows.grad[0, 1]  # one direction alone
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    found = principal_directions(trace, 40)
    assert found.vectors.shape == (2, 6, 16)
    assert np.count_nonzero(found.eigenvalues[1]) == 1 and not found.vectors[1, 1:].any()
    # Along a timestep's only direction lambda is its eigenvalue: half is taken out.
    freed = found.deflate(queries)
    assert np.allclose(freed[:, 1] @ rows.grad[0, 1], queries[:, 1] @ rows.grad[0, 1] / 2, atol=1e-5)


def test_threads_and_blocks_change_nothing(stored: tuple[Store, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    trace, queries = stored
    for dense in (0, 1024):
        monkeypatch.setattr(kernel, "MAX_DENSE_SAMPLES", dense)
        found = {}
        for cores in (1, 5):
            monkeypatch.setattr("dmin_trace.search.deflation.core_count", lambda cores=cores: cores)
            found[cores] = principal_directions(trace, 10).deflate(queries)
        assert np.array_equal(found[1], found[5])


def test_what_cannot_be_asked(stored: tuple[Store, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    trace, queries = stored
    wrong: Any = "cosine"
    with pytest.raises(QueryError, match="score is 'cosine'; expected dmin or deflated"):
        query.answer_queries(trace, queries, k=3, score=wrong)
    for count in (0, -1, 5000):
        with pytest.raises(SettingsError, match="expected 1 to 4096"):
            principal_directions(trace, count)
    with pytest.raises(QueryError, match="have shape"):
        query.answer_queries(trace, queries[:, :1], k=3, score="deflated")
    monkeypatch.setattr("dmin_trace.search.MAX_QUERY_NUMBERS", 200)
    with pytest.raises(
        QueryError, match=r"here it has none; .* in up to 200 numbers, .* 113,280\. Make them with dmin-tr"
    ):
        query.answer_queries(trace, queries, k=3, score="deflated")


def test_gradients_that_are_not_finite_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(samples=10, dtype="float32")
    rows = clustered(header, clusters=2)
    rows.grad[5, 1, 3] = np.nan
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    zarr.open_array(trace.path / "grad", mode="r+")[5, 1, 3] = np.nan
    for dense in (0, 1024):
        monkeypatch.setattr(kernel, "MAX_DENSE_SAMPLES", dense)
        with pytest.raises(TraceError, match="damaged"):
            principal_directions(open_store(trace.path))


def test_a_few_samples_are_asked_without_an_index_and_with_what_it_keeps(tmp_path: Path) -> None:
    header = make_header(samples=40, timesteps=2, dimension=64, rows=16)
    rows = clustered(header, clusters=4)
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    queries = like(rows, 3)
    answer = query.answer_queries(trace, queries, k=40, score="deflated")
    assert answer.taken_out.endswith("principal directions of each timestep, found for this query")
    assert answer.score == "deflated" and answer.recall is None
    truth = slow_scores(trace, slow_deflated(trace, queries, int(answer.taken_out.split()[0])))
    for hits, scores in zip(answer.hits, truth, strict=True):
        slots = [trace.row_of(hit.sample) for hit in hits]
        assert np.allclose([hit.score for hit in hits], scores[slots], atol=2e-5)
        assert np.allclose([sum(hit.per_timestep) for hit in hits], scores[slots], atol=2e-5)
    facts = build_index(trace, directions=5)
    assert (facts.depths, facts.principal) == ((), 5)
    told = query.answer_queries(trace, queries, k=2, score="deflated").taken_out
    assert told == "5 principal directions of each timestep, kept by the index"
    assert query.answer_queries(trace, queries, k=2, score="dmin").taken_out == ""
    assert not build_index(trace, directions=0).files
    assert "found for this query" in query.answer_queries(trace, queries, k=2, score="deflated").taken_out
    with pytest.raises(SettingsError, match="directions is -1"):
        build_index(trace, directions=-1)


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[Store, np.ndarray]:
    """A store of 160 samples with an index, and queries."""
    header = make_header(samples=160, timesteps=2, dimension=64, rows=64)
    rows = clustered(header, clusters=8)
    trace = write_store(tmp_path / "trace.zarr", header, rows)
    build_index(trace, recall=0.8)
    return trace, like(rows, 10)


def test_the_index_answers_deflated_queries_with_the_scores_of_the_scan(indexed: tuple[Store, np.ndarray]) -> None:
    trace, queries = indexed
    facts = read_facts(trace)
    assert isinstance(facts, Facts)
    depth = facts.depth(10, "deflated")
    assert (
        depth is not None and depth.recall >= 0.8 and "deflated queries for up to 10" in str(index_facts(facts, trace))
    )
    ours = query.answer_queries(trace, queries, k=10, score="deflated")
    true = query.answer_queries(trace, queries, k=10, score="deflated", exact=True)
    assert ours.recall == (10, depth.recall) and true.recall is None
    scores = [[{hit.sample: hit.score for hit in hits} for hits in answer.hits] for answer in (ours, true)]
    both = [(some, all_) for some, all_ in zip(*scores, strict=True)]
    assert np.mean([len(some.keys() & all_.keys()) / 10 for some, all_ in both]) >= 0.7
    assert all(some[sample] == all_[sample] for some, all_ in both for sample in some.keys() & all_.keys())
    build_index(trace, recall=0.8, directions=0)
    scanned = query.answer_queries(trace, queries, k=10, score="deflated")
    assert scanned.said == "scanned all 160 samples: the index does not serve deflated scores"


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


def forge(file: Path, numbers: np.ndarray, dtype: str = "<f4") -> None:
    """Other numbers, with their size and checksum."""
    numbers.astype(dtype).tofile(file)
    facts = json.loads((file.parent / "index.json").read_text())
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    facts["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checksum}
    (file.parent / "index.json").write_text(signed(facts))


def edit(file: Path, **changes: object) -> None:
    facts = json.loads((file.parent / "index.json").read_text())
    (file.parent / "index.json").write_text(signed(facts | changes))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
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
    "more than samples": (lambda file: edit(file, principal=161), "names other files"),
    "a part of one": (lambda file: edit(file, principal=1.5), "Expected `int`, got `float` - at `$.principal`"),
    "text": (lambda file: edit(file, principal="many"), "Expected `int`, got `str`"),
    "a huge number": (lambda file: edit(file, principal=10**400), "index.json is not valid"),
    "another file": (lambda file: edit(file, files={"../x": {"bytes": 1, "sha256": "a" * 64}}), "names other files"),
    "a score that is none": (
        lambda file: edit(file, depths=[{"score": "x", "k": 1, "candidates": 1, "ef": 1, "recall": 1.0}]),
        "index.json is not valid",
    ),
    "another store": (
        lambda file: zarr.open_array(file.parent.parent / "trace.zarr" / "norm", mode="r+").__setitem__((5, 1), 2.0),
        "the store has changed",
    ),
}


@pytest.mark.parametrize(("spoil", "line"), SPOILED.values(), ids=SPOILED.keys())
def test_directions_that_do_not_fit_are_not_used(
    indexed: tuple[Store, np.ndarray], spoil: Callable[[Path], object], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(index_beside(indexed[0].path) / "principal.f32")
    trace = open_store(indexed[0].path)
    why = open_directions(trace)
    assert isinstance(why, Unavailable) and line in why.reason
    answer = query.answer_queries(trace, indexed[1], k=3, score="deflated", exact=True)
    assert answer.taken_out.endswith(f"principal directions of each timestep, found for this query ({why.reason})")
    monkeypatch.setattr("dmin_trace.search.MAX_QUERY_NUMBERS", 100)
    with pytest.raises(QueryError, match="Make them with dmin-trace index"):
        query.answer_queries(trace, indexed[1], k=3, score="deflated")


def test_the_command_line_shows_which_score(
    indexed: tuple[Store, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sample = str(indexed[0].path), str(int(indexed[0].sample[3]))
    assert main(["index", path, "--directions", "4", "--recall", "0.8"]) == 0
    assert "by 4 principal directions of each timestep" in " ".join(capsys.readouterr().out.split())
    words = "took out 4 principal directions"
    written = [tmp_path / "hits.json", tmp_path / "hits.csv"]
    options = ["--json", str(written[0]), "--csv", str(written[1])]
    assert main(["query", path, "--sample", sample, "--score", "deflated", *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "deflated score: inner product" in shown and words in shown and "perfect match" not in shown
    read = json.loads(written[0].read_text())
    assert read["scored_by"] == "deflated" and words[9:] in read["trace"]["taken_out"]
    assert ",deflated," in written[1].read_text().splitlines()[1]
    assert main(["query", path, "--sample", sample, "--score", "best"]) == 1
    assert "score is 'best'" in capsys.readouterr().err
