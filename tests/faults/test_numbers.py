"""Numbers that are none, and samples that fail to load: counted, shown, and never ranked by anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dmin_trace.integrations import lightning
from lightning_points import SMALL, Points
from lightning_points import Denoiser as Module
from points import POINTS, denoiser, loss_of, record
from stores import make_header, make_rows, write_store

import dmin_trace
from dmin_trace import query
from dmin_trace.audit import measure_column
from dmin_trace.errors import CaptureError, QueryError
from dmin_trace.query import Trace
from dmin_trace.search import deflation as kernel
from dmin_trace.search import exact_top_k
from dmin_trace.store import FAILED, Store, UnrankedSamples, drop_failed, open_store
from dmin_trace.views import describe_store

ODD = {3: np.nan, 17: np.inf, 18: 0.0, 40: FAILED, 61: FAILED, 62: -np.inf}
"""Slots and the norms of their gradients."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """64 samples, six of which must never be ranked, though what is stored of them is as good as that of the others."""
    header = make_header(samples=64, dtype="float32", columns={"label": "integer"})
    rows = make_rows(header)
    rows.norm[:] = 1
    for slot, value in ODD.items():
        rows.norm[slot, slot % 3] = value
        rows.norm[slot] = FAILED if value == FAILED else rows.norm[slot]
    # All alike, so that each of them would be found.
    rows.grad[:] = rows.grad[0] + rows.grad * 0.5
    rows.sample[:] = np.arange(64)
    rows.columns["label"] = [k % 2 for k in range(64)]
    return write_store(tmp_path_factory.mktemp("odd") / "trace.zarr", header, rows)


def test_they_are_counted_each_with_its_own_line(odd: Store) -> None:
    assert odd.unranked == UnrankedSamples(failed=(40, 61), infinite=3, zero=1)
    shown = dict(describe_store(odd))
    assert shown["failed to load"] == "2 samples: 40, 61; never ranked"
    assert shown["not finite"] == "3 samples have a gradient with NaN or infinity; never ranked"
    assert shown["zero"] == "1 samples have a gradient that is zero; never ranked"
    assert odd.valid.sum() == 64 - len(ODD)


def test_no_score_ranks_them(odd: Store) -> None:
    asked = odd.gradients(np.array([0, 5]))
    most = int(odd.valid.sum())
    for name in ("dmin", "deflated"):
        answer = query.answer_queries(odd, asked, k=most, score=name)  # type: ignore[arg-type]
        assert all({hit.sample for hit in hits}.isdisjoint(ODD) and len(hits) == most for hits in answer.hits), name
    assert len(query.answer_queries(odd, asked, k=most + 1, score="dmin").hits[0]) == most
    assert set(exact_top_k(odd, asked, most).rows[0]) == set(range(64)) - set(ODD)
    directions = kernel.principal_directions(odd, 4)
    kept = [slot for slot in range(64) if slot not in ODD]
    rows = odd.gradients(np.array(kept))[:, 0].astype(np.float64)
    # As of the good ones alone.
    expected = np.linalg.eigvalsh(rows @ rows.T)[::-1][:4]
    assert np.allclose(directions.eigenvalues[0], expected, rtol=1e-3)


def test_the_measures_leave_them_out(odd: Store) -> None:
    """Of the index see test_index.py."""
    measured = measure_column(Trace(odd), "label", "labels", queries=64, ks=[5], exact=True)
    assert set(measured.values["queries"]) == set(range(64)) - set(ODD)
    for slot in ODD:
        with pytest.raises(QueryError, match=f"Sample {slot} has no gradient to use as a query"):
            Trace(odd).query_samples([5, slot])


def test_a_plain_loop_may_say_that_a_sample_is_missing(tmp_path: Path) -> None:
    whole = open_store(record(denoiser(), tmp_path / "whole.zarr"))
    settings: dict[str, Any] = {"timesteps": 3, "dimension": 64, "dtype": "float32", "transform": "none"}
    captions = [f"point {k}" for k in range(12)]
    with dmin_trace.recording(
        denoiser(), samples=12, out=tmp_path / "trace.zarr", columns={"caption": captions}, **settings
    ) as recording:
        for i in recording.samples:
            if i in (0, 1, 6, 11):
                recording.missing(i, OSError("the file is torn"))
                continue
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss_of(recording._models[0], POINTS[i : i + 1]).backward()
    trace = open_store(tmp_path / "trace.zarr")
    good = [2, 3, 4, 5, 7, 8, 9, 10]
    assert trace.unranked.failed == (0, 1, 6, 11) and np.flatnonzero(trace.valid).tolist() == good
    assert np.array_equal(trace.gradients(np.array(good)), whole.gradients(np.array(good)))
    assert trace.column("caption") == [captions[k] if k in good else "" for k in range(12)]

    # They can be loaded now, at first but for one: drop_failed has them tried again, with what else is in their chunks.
    chunks = [trace.path / "grad" / "c" / str(k) / "0" / "0" for k in (0, 1)]
    for torn, tried in (([1], range(12)), ([], range(8))):
        before, again = [chunk.stat().st_ino for chunk in chunks], []
        assert drop_failed(trace.path) == ([0, 1] if torn else [0])
        with dmin_trace.recording(
            denoiser(), samples=12, out=tmp_path / "trace.zarr", columns={"caption": captions}, **settings
        ) as recording:
            for i in recording.samples:
                again.append(i)
                if i in torn:
                    recording.missing(i, OSError("the file is torn"))
                    continue
                for k in recording.timesteps:
                    with recording.step(i, k):
                        loss_of(recording._models[0], POINTS[i : i + 1]).backward()
        whole_again, found = open_store(tmp_path / "trace.zarr"), [k for k in range(12) if k not in torn]
        # Before them come the first of these, to be probed and compared, and the first of the whole recording.
        assert again[-len(tried) :] == list(tried) and set(again) == {*tried, 2}
        assert whole_again.unranked.failed == tuple(torn)
        assert np.array_equal(whole_again.gradients(np.array(found)), whole.gradients(np.array(found)))
        assert whole_again.column("caption") == [captions[k] if k in found else "" for k in range(12)]
        anew = [chunk.stat().st_ino != inode for chunk, inode in zip(chunks, before, strict=True)]
        assert anew == [True, len(tried) == 12]


def test_a_plain_loop_most_of_whose_samples_are_missing_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(CaptureError, match=r"7 of the first samples could not be loaded, .* sample 6: OSError: torn"),
        dmin_trace.recording(denoiser(), samples=12, out=tmp_path / "trace.zarr", timesteps=2) as recording,
    ):
        for i in recording.samples:
            recording.missing(i, OSError("torn"))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_lightning_goes_on_without_samples_that_fail(tmp_path: Path) -> None:
    class Torn(Points):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index in (0, 7):
                raise OSError("the file is torn")
            return super().__getitem__(index)

    torch.manual_seed(0)
    module = Module()
    loader = torch.utils.data.DataLoader(Torn(), batch_size=4)
    lightning.capture(module, loader, out=tmp_path / "trace.zarr", settings=SMALL)
    trace = open_store(tmp_path / "trace.zarr")
    assert trace.complete and trace.unranked.failed == (0, 7) and len(trace.header.data_sha256) == 64
    assert trace.column("caption")[6:9] == ["point 6", "", "point 8"]
