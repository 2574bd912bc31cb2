"""Built-in scores: what is fitted, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clusters import clustered, like
from stores import Rows, make_header, write_store

from dmin_trace.errors import QueryError, SettingsError
from dmin_trace.search import scores
from dmin_trace.search.build import build_index
from dmin_trace.search.deflation import principal_directions
from dmin_trace.search.scores import check_score, fit_score
from dmin_trace.store import Store


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Store, Rows]:
    """A store of 40 samples without an index."""
    header = make_header(samples=40, timesteps=2, dimension=64, rows=16)
    rows = clustered(header, clusters=4)
    return write_store(tmp_path / "trace.zarr", header, rows), rows


def test_the_score_dmin_leaves_queries_as_they_are(stored: tuple[Store, Rows]) -> None:
    fitted = fit_score(stored[0], "dmin")
    queries = like(stored[1], 3)
    assert fitted.transform(queries) is queries
    assert (fitted.name, fitted.description) == ("dmin", "")


def test_the_deflated_score_finds_directions_or_takes_those_of_the_index(stored: tuple[Store, Rows]) -> None:
    store, rows = stored
    queries = like(rows, 3)
    found = principal_directions(store)
    fitted = fit_score(store, "deflated")
    assert np.array_equal(fitted.transform(queries), found.deflate(queries))
    count = found.eigenvalues.shape[1]
    assert fitted.description == f"{count} principal directions of each timestep, found for this query"
    facts = build_index(store, directions=5)
    assert (facts.depths, facts.principal) == ((), 5)
    fitted = fit_score(store, "deflated")
    assert fitted.description == "5 principal directions of each timestep, kept by the index"
    assert np.array_equal(fitted.transform(queries), principal_directions(store, 5).deflate(queries))
    assert not build_index(store, directions=0).files
    assert fit_score(store, "deflated").description.endswith("found for this query")
    with pytest.raises(SettingsError, match="directions is -1"):
        build_index(store, directions=-1)


def test_check_score_refuses_what_cannot_be_scored(stored: tuple[Store, Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored[0]
    with pytest.raises(QueryError, match="score is 'cosine'; expected dmin or deflated"):
        check_score(store, "cosine")
    with pytest.raises(QueryError, match="score is 'cosine'; expected dmin or deflated"):
        fit_score(store, "cosine")
    monkeypatch.setattr(scores, "MAX_QUERY_NUMBERS", 200)
    line = r"here it has none\. .* in up to 200 numbers; .* 5,120\. Make them with dmin-trace index"
    with pytest.raises(QueryError, match=line):
        check_score(store, "deflated")
    build_index(store, directions=0)
    with pytest.raises(QueryError, match=line):
        check_score(store, "deflated")
    build_index(store, directions=4)
    file = store.path.with_name("trace.index") / "principal.f32"
    fit_score(store, "deflated")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(QueryError, match=r"here the index is not used: principal.f32 is damaged.*Make them with"):
        fit_score(store, "deflated")
