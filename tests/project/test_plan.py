"""Plan and make_plan: numbers, fingerprints, widths."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from projections import KIND_PARAMS, kind_of, small_plan

from dmin_trace.errors import SettingsError
from dmin_trace.project import compress_gradient, make_plan, project
from dmin_trace.settings import Projection


@pytest.fixture(params=KIND_PARAMS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Projection:
    """Each kind of projection, rotation by both backends."""
    return kind_of(request.param, monkeypatch)


def test_plan_gives_bins_of_equal_size() -> None:
    assert np.bincount(make_plan(1024, 16, 0, "uniform").bins()).tolist() == [64] * 16
    # Two elements of one row of W = v never meet.
    plan = small_plan("rotation", 512, 128)
    rows = torch.ones(4, 128)
    for r in range(4):
        alone = torch.zeros_like(rows)
        alone[r] = rows[r]
        assert project([alone], plan)[0].abs().tolist() == [1.0] * 128


def test_plan_shifts_differ_within_each_turn() -> None:
    shifts = small_plan("rotation", 64 * 150, 16, width=64).shifts()
    assert [len(set(part.tolist())) for part in (shifts[:64], shifts[64:128], shifts[128:])] == [64, 64, 22]


def test_make_plan_refuses_invalid_arguments() -> None:
    for length, dimension, kind in ((0, 16, "rotation"), (0, 16, "uniform"), (9, 12, "rotation"), (9, 16, "dense")):
        with pytest.raises(SettingsError, match="expected"):
            make_plan(length, dimension, 0, kind)  # type: ignore[arg-type]


def test_plan_leaves_global_generators_alone(kind: Projection) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    plan = make_plan(1000, 16, 0, kind)
    compress_gradient([torch.ones(1000)], plan)
    assert plan.fingerprint
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_plan_fingerprint_differs_between_plans() -> None:
    plans = [(1000, 16, 0, "rotation"), (1000, 16, 0, "uniform"), (1000, 16, 1, "rotation"), (1000, 16, 1, "uniform")]
    plans += [(1000, 32, 0, "rotation"), (1000, 32, 0, "uniform"), (999, 16, 0, "rotation"), (999, 16, 0, "uniform")]
    fingerprints = [make_plan(*plan).fingerprint for plan in plans]  # type: ignore[arg-type]
    assert len(set(fingerprints)) == len(plans)
    assert fingerprints == [make_plan(*plan).fingerprint for plan in plans]  # type: ignore[arg-type]


UNIFORM = "6625919c9ca239d53736f7754493ab4b53beb48448c55c5f464ca45b98b4aa80", [197.0, -3.0, -667.0, 49.0]
GOLDEN: dict[tuple[str, int | None], tuple[str, list[float]]] = {
    ("rotation", 2**17): (
        "4f33c38fa06307f48cacb977f9717291ec3cba176798321828eb6bc68d74ba62",
        [115.0, 314.0, -197.0, -316.0],
    ),
    ("rotation", 2**14): (
        "97bb35a8cad13aa2f3783b1ec5ff15f3882f9bdb5ab3770bb4bed125e79fcb27",
        [-239.0, -191.0, 91.0, 486.0],
    ),
    ("uniform", None): UNIFORM,
    ("uniform", 300_000): UNIFORM,
}


@pytest.mark.parametrize("of", GOLDEN)
def test_make_plan_makes_the_plans_of_existing_stores(of: tuple[Projection, int]) -> None:
    # If this fails, no store written before can be queried: do not mend the numbers, mend the change.
    plan = make_plan(300_000, 16, 7, *of)
    fingerprint, values = GOLDEN[of]
    assert plan.fingerprint == fingerprint
    assert project([torch.arange(300_000.0) % 7 - 3], plan)[0][:4].tolist() == values


def test_make_plan_chooses_the_row_width() -> None:
    lengths = (1, 16, 17, 2**14, 2**17, 2**20, 2**20 + 1, 2**21 + 1, 2**23, 2**28, 2**28 + 1, 2**31)
    widths = [make_plan(length, 16, 0, "rotation").width for length in lengths]
    narrow, wide = 2**14, 2**17
    assert widths == [16, 16, 32, narrow, narrow, narrow, 2**15, 2**16, wide, wide, 2**18, 2**20]
    assert make_plan(100, 4096, 0, "rotation").width == 4096


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("rotation", 0),
        ("rotation", 8),
        ("rotation", 48),
        ("rotation", 2**40),
        ("uniform", 992),
        ("uniform", 1001),
        ("uniform", 2**40),
    ],
)
def test_plan_refuses_a_width_that_does_not_fit(kind: Projection, width: int) -> None:
    with pytest.raises(SettingsError, match=f"width is {width}, which does not fit 1000 elements and 16 bins"):
        make_plan(1000, 16, 0, kind, width)
