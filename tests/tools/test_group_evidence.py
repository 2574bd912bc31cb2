"""The evidence for totals and audits in tiny form: figures by slow oracles, and runs that go on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import audit_evidence
import ddpm
import groups
import standing_out
import subsets

RECIPE = ddpm.Recipe(size=8, channels=(8, 16), attention=False, steps=2, batch=4, rate=1e-3)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsets, "RECIPE", RECIPE)
    monkeypatch.setattr(subsets, "SAMPLES", 100)
    monkeypatch.setattr(subsets, "QUERIES", 3)
    monkeypatch.setattr(ddpm, "evenly", lambda count: [250, 750])
    subsets.queries.cache_clear()


def test_groups_in_small(tiny: None, tmp_path: Path) -> None:
    options = {"work": tmp_path / "work", "out": tmp_path / "out", "seeds": 1, "processes": 1, "dimension": 64}
    groups.main(**options)  # type: ignore[arg-type]
    page = (tmp_path / "out" / "groups.md").read_text("utf-8")
    assert "| deflated score, as is, share |" in page and "| likeness of pixels, squared, z of the mean |" in page
    assert page.count("| chance |") == 2
    work = tmp_path / "work"
    full, without = (np.load(groups.losses_file(work, label, 0)) for label in (groups.ALL, 3))
    np.testing.assert_array_equal(groups.harm(work, 1)[3], without - full)
    # A model without a class is one that is trained on the others.
    digits = subsets.digits()
    kept = [n for n in range(100) if digits.labels[n] != 3]
    model = ddpm.train(RECIPE, digits.images[kept])
    # Pictures of a model that knows nothing differ between processes that take unlike numbers of threads.
    expected = ddpm.losses(model, subsets.queries(work))
    np.testing.assert_allclose(without[: subsets.QUERIES], expected[: subsets.QUERIES], rtol=1e-5)
    # What is done is not done again.
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    groups.main(**options)  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    subsets.queries.cache_clear()


def test_what_is_planted(tiny: None) -> None:
    planted, digits = audit_evidence.plant(), subsets.digits()
    changed = planted.labels != digits.labels
    assert planted.swapped.sum() == 5 and changed[planted.swapped].all()
    assert planted.copied.sum() == 10 and planted.foreign.sum() == 2
    assert not (planted.swapped & planted.copied).any() and not (planted.foreign & planted.copied).any()
    moved = (planted.images != digits.images).flatten(1).any(1).numpy()
    assert moved.sum() == 7 and not moved[~(planted.copied | planted.foreign)].any()
    flat = planted.images.flatten(1)
    for n in np.flatnonzero(planted.copied & moved):
        distance = torch.linalg.norm(flat - flat[n], dim=1)
        distance[n] = torch.inf
        nearest = int(distance.argmin())
        assert planted.copied[nearest] and planted.labels[nearest] == planted.labels[n]
    assert float(planted.images.min()) == -1 and float(planted.images.max()) == 1


def test_measures_by_hand() -> None:
    values, true = np.array([3.0, 1.0, 2.0, 2.0, 0.0]), np.array([True, False, True, False, False])
    pairs = [(a > b) + (a == b) / 2 for a in values[true] for b in values[~true]]
    assert audit_evidence.area_under_curve(values, true) == np.mean(pairs)
    assert audit_evidence.precision(values, true) == 1.0
    assert audit_evidence.precision(-values, true) == 0.0
    cells = audit_evidence.with_intervals(values, true, 50)
    assert cells[0].startswith("1.000 (") and cells[1].startswith("0.917 (")


def test_an_audit_in_small(tiny: None, tmp_path: Path) -> None:
    options = {"work": tmp_path / "work", "out": tmp_path / "out", "dimension": 64, "resamples": 20}
    audit_evidence.main(**options)  # type: ignore[arg-type]
    page = (tmp_path / "out" / "audit_evidence.md").read_text("utf-8")
    for words in ("## Swapped labels: 5", "## Near-copies: 10", "## Foreign pictures: 2"):
        assert words in page
    assert page.count("| audit, by gradient |") == page.count("| likeness of pixels |") == 3


def test_what_stands_out_in_small(tiny: None, tmp_path: Path) -> None:
    standing_out.main(work=tmp_path / "work", out=tmp_path / "out", dimension=64)
    page = (tmp_path / "out" / "standing_out.md").read_text("utf-8")
    for kind in ("near-copies of samples", "held-out digits", "generated digits", "noise", "pieces of photographs"):
        assert page.count(f"| {kind} |") == 2
    assert "## The sample that a near-copy is of" in page
    found, own, samples = standing_out.answers(tmp_path / "work", 64)
    assert samples == 100 and len(own) == 3
    assert found["noise"]["dmin"].samples.shape == (3, 100)
    subsets.queries.cache_clear()
