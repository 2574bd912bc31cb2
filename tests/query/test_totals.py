"""Totals of groups, against slow oracles: shares, intervals, random groups, merged copies, and odd scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from stores import make_header, make_rows, write_store

import dmin_trace
from dmin_trace.cli.app import main
from dmin_trace.query import totals as module
from dmin_trace.query.totals import Grouping, total_groups
from dmin_trace.search import fit_background

ARTISTS = ["Ann", "Bob", "Ann;Bob", "", "Eve", "Ann"]


def trace_of(
    path: Path, samples: int, artists: list[str], equal: list[int] | None = None, **odd: Any
) -> dmin_trace.Trace:
    """A trace whose sample n is of artist n; those in `equal` have one row. Norms of `odd` samples are not usable."""
    header = make_header(samples=samples, dimension=64, rows=8, columns={"artist": "string", "file_name": "string"})
    rows = make_rows(header)
    order = rows.sample - 100
    place = np.argsort(order)
    if equal:
        rows.grad[place[equal]] = rows.grad[place[equal[0]]]
    for sample in odd.get("unusable", ()):
        rows.norm[place[sample], 1] = 0
    columns = {"artist": [artists[n] for n in order], "file_name": [f"{n}.png" for n in order]}
    return dmin_trace.Trace(write_store(path, header, rows._replace(sample=order, columns=columns)))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> dmin_trace.Trace:
    artists = (ARTISTS * 20)[:100]
    return trace_of(tmp_path_factory.mktemp("t") / "t.zarr", 100, artists, [3, 8, 13, 14], unusable=(0, 7))


def test_shares_are_sums_by_hand(trace: dmin_trace.Trace) -> None:
    queries = trace.query_samples([13, 4])
    totals = trace.totals(queries, "artist")
    scores = trace.scores(queries).astype(np.float64)
    usable = ~np.isnan(scores[0])
    assert (totals.samples, totals.by, totals.merged, len(totals)) == (98, "artist", None, 2)
    artists = trace.columns["artist"]
    assert totals.overlapping == sum(1 for n in range(100) if artists[n] == "Ann;Bob" and usable[n])
    for query, own in enumerate(scores):
        influence = own - np.median(own[usable])
        whole = sum(max(influence[n], 0) for n in range(100) if usable[n])
        found = {total.group: total for total in totals.groups[query]}
        assert set(found) == {"Ann", "Bob", "Eve", None} and totals.groups[query][-1].group is None
        background = fit_background(own[usable], 98)
        for name, total in found.items():
            places = [
                n for n in range(100) if usable[n] and (name in artists[n].split(";") if name else artists[n] == "")
            ]
            assert total.samples == len(places) and total.expected == len(places) / 98
            np.testing.assert_allclose(total.share, sum(max(influence[n], 0) for n in places) / whole, rtol=1e-5)
            np.testing.assert_allclose(total.mean, own[places].mean(), rtol=1e-5, atol=1e-7)
            assert total.standing_out == sum(background.stands_out(own[n]) or False for n in places)
            assert total.low is not None and total.share is not None and total.high is not None
            assert 0 < total.low < total.share < total.high < 1
        shares = [total.share or 0 for total in totals.groups[query][:-1]]
        assert shares == sorted(shares, reverse=True)


def test_p_and_z_are_those_of_all_random_groups() -> None:
    """All groups of a size, one after another."""
    random = np.random.default_rng(0)
    weights = random.laplace(size=(2, 14))
    sizes = np.array([1, 3, 5, 11, 13, 14])
    sums = np.stack([weights[:, random.permutation(14)[:size]].sum(1) for size in sizes], 1)
    parts = module._parts_as_large(weights, sizes, sums)
    for query in range(2):
        for n, size in enumerate(sizes):
            every = [weights[query, list(group)].sum() for group in combinations(range(14), int(size))]
            exact = np.mean(np.array(every) >= sums[query, n] - 1e-9)
            if size == 14:
                assert np.isnan(parts[query, n])
            else:
                assert abs(parts[query, n] - exact) < 4 * np.sqrt(exact * (1 - exact) / 9999) + 1e-3


def test_large_groups_are_as_good_as_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    scores = random.laplace(size=(1, 3000))
    scores[0, :200] += 0.15
    grouping = {"a": np.arange(200), "b": np.arange(100, 700), None: np.arange(700, 3000)}
    known = [fit_background(scores[0], 3000)]
    drawn = {total.group: total for total in module.totals_of(scores, known, grouping, "as is")[0]}
    monkeypatch.setattr(module, "MAX_DRAWN", 0)
    normal = {total.group: total for total in module.totals_of(scores, known, grouping, "as is")[0]}
    for name in grouping:
        one, other = drawn[name], normal[name]
        assert one.z == other.z and one.p is not None and other.p is not None
        assert abs(one.p - other.p) < 0.015
        every = [scores[0, random.permutation(3000)[: len(grouping[name])]].mean() for _ in range(2000)]
        assert one.mean is not None and one.z is not None
        assert abs((one.mean - np.mean(every)) / np.std(every) - one.z) < 0.3


def test_intervals_are_those_of_samples_drawn_anew() -> None:
    random = np.random.default_rng(2)
    scores = random.laplace(size=(1, 600))
    scores[0, :60] += 1
    grouping = {"a": np.arange(60), None: np.arange(60, 600)}
    (found,) = module.totals_of(scores, [fit_background(scores[0], 600)], grouping, "as is")
    total = found[0]
    positive = np.maximum(scores[0] - np.median(scores[0]), 0)
    drawn = []
    for _ in range(4000):
        times = random.poisson(1, 600)
        drawn.append((positive * times)[:60].sum() / (positive * times).sum())
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert total.low is not None and total.high is not None
    np.testing.assert_allclose([total.low, total.high], [low, high], atol=0.012)


@pytest.mark.parametrize("weighting", ["as is", "squared", "standing out"])
def test_weightings(weighting: module.Weighting) -> None:
    random = np.random.default_rng(3)
    scores = random.standard_normal((1, 400))
    scores[0, :4] = 30
    known = fit_background(scores[0], 400)
    assert known.standing_out == 4
    grouping: dict[str | None, Any] = {"a": np.arange(5), "b": np.arange(5, 400)}
    (found,) = module.totals_of(scores, [known], grouping, weighting)
    share = {total.group: total.share for total in found}["a"]
    influence = scores[0] - np.median(scores[0])
    weights = {
        "as is": influence,
        "squared": influence * abs(influence),
        "standing out": np.where(np.arange(400) < 4, influence, 0),
    }[weighting]
    np.testing.assert_allclose(share, np.maximum(weights, 0)[:5].sum() / np.maximum(weights, 0).sum())
    # Nothing stands out, nothing has a share.
    (none,) = module.totals_of(scores[:, 4:], [fit_background(scores[0, 4:], 396)], {"a": np.arange(9)}, "standing out")
    assert (none[0].share, none[0].low, none[0].z, none[0].p) == (None, None, None, None)


def test_near_copies_are_merged(trace: dmin_trace.Trace) -> None:
    queries = trace.query_samples([13])
    plain, merged = trace.totals(queries, "artist"), trace.totals(queries, "artist", merge=True)
    assert (plain.merged, merged.merged, merged.samples) == (None, 3, 95)
    # Samples 3, 8, 13 and 14: of nobody, Ann and Bob, Bob, Ann and Bob.
    by_hand = total_groups(
        trace, queries, Grouping("artist", {"Ann": np.array([13])}), copies=[np.array([3, 8, 13, 14])]
    )
    one = next(total for total in by_hand.groups[0] if total.group == "Ann")
    np.testing.assert_allclose(one.mean, trace.scores(queries)[0, [3, 8, 13, 14]].astype(np.float64).mean(), rtol=1e-5)
    assert one.samples == 1 and one.p is not None and one.p < 0.05
    counts = {total.group: total.samples for total in merged.groups[0]}
    expected = {total.group: total.samples for total in plain.groups[0]}
    assert counts == {
        "Ann": expected["Ann"] - 1,
        "Bob": expected["Bob"] - 2,
        "Eve": expected["Eve"],
        None: expected[None] - 1,
    }


def test_odd_scores(tmp_path: Path) -> None:
    one = trace_of(tmp_path / "one.zarr", 1, ["Ann"])
    (total,) = one.totals(one.query_samples([0]), "artist", score="dmin").groups[0]
    assert (total.group, total.samples, total.expected, total.share) == ("Ann", 1, 1.0, None)
    assert total.z is total.p is total.low is total.standing_out is None
    same = trace_of(tmp_path / "same.zarr", 40, ["Ann", "Bob"] * 20, list(range(40)))
    for total in same.totals(same.query_samples([0]), "artist", score="dmin").groups[0]:
        assert total.z is None and total.p is None and total.standing_out is None
    merged = same.totals(same.query_samples([0]), "artist", score="dmin", merge=True)
    assert (merged.samples, merged.merged, merged.overlapping) == (1, 39, 1)
    none = trace_of(tmp_path / "none.zarr", 6, ARTISTS, unusable=(4,))
    found = {total.group: total for total in none.totals(none.query_samples([0]), "artist").groups[0]}
    assert found["Eve"].samples == 0 and found["Eve"].mean is None and found["Eve"].share in (0.0, None)
    with pytest.raises(dmin_trace.DminTraceError, match="Their gradients cannot be compared"):
        none.totals(dmin_trace.Queries(np.zeros((1, 3, 64), np.float32), ("x",), (None,), "other"), "artist")


def test_totals_as_tables_and_on_the_command_line(
    trace: dmin_trace.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = trace.query_samples([13, 4])
    totals = trace.totals(queries, "artist", merge=True)
    assert repr(totals) == "Totals(2 queries, 4 groups by 'artist', 95 samples, deflated)"
    table = totals.to_pandas()
    assert table.columns.tolist() == [
        *("query", "prompt", "without", "by", "group", "samples", "share", "low", "high", "expected"),
        *("mean", "z", "p", "standing_out", "scored_by"),
    ]
    options = ["--sample", "13", "--sample", "4", "--by", "artist", "--merge"]
    files = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "csv", "parquet")}
    written = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    assert main(["query", str(trace.path), *options, *written]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Influence by artist on sample 13" in shown and "(of no group)" in shown and "near-copies" in shown
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["totals"] == {"by": "artist", "samples": 95, "overlapping": totals.overlapping, "merged": 3, "note": ""}
    for query, groups in zip(read["queries"], totals.groups, strict=True):
        assert [total["group"] for total in query["groups"]] == [total.group for total in groups]
        assert query["groups"][0] == pytest.approx(asdict(groups[0]))
    parquet = pyarrow.parquet.read_table(tmp_path / "out.groups.parquet")
    assert parquet.column_names == table.columns.tolist()
    assert parquet.schema.metadata[b"dmin_trace.format"] == b"dmin_trace.totals"
    assert parquet["group"].to_pylist() == [total.group for groups in totals.groups for total in groups]
    assert (tmp_path / "out.groups.csv").read_text().splitlines()[0] == ",".join(table.columns)
    mistakes = (
        (["--by", "owner"], "has no column 'owner'"),
        (["--merge"], "--merge is for groups"),
        (["--groups", str(tmp_path / "no.csv")], "cannot be read as groups"),
    )
    for wrong, words in mistakes:
        assert main(["query", str(trace.path), "--sample", "3", *wrong]) == 1
        assert words in capsys.readouterr().err.replace("\n", " ")
