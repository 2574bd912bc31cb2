"""quantise: stored numbers and their scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import (
    DTYPES,
    make_header,
    make_rows,
    write_store,
)

from dmin_trace.settings import Dtype
from dmin_trace.store import (
    quantise,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise_gives_the_number_over_the_scale(dtype: Dtype) -> None:
    """The definition, all at once in float64."""
    grad = make_rows(make_header(samples=9)).grad
    grad[2, 1] = 0
    grad[4, 0, 3] = np.nan
    values, scale = quantise(grad, dtype)
    clean = np.where(np.isfinite(grad).all(axis=2, keepdims=True), grad, 0).astype(np.float64)
    step = np.abs(clean).max(axis=2) / 127 if dtype == "int8" else np.ones((9, 3))
    expected = clean / np.where(step > 0, step, 1)[:, :, None]
    assert np.array_equal(values, np.rint(expected) if dtype == "int8" else expected.astype(dtype))
    if dtype == "int8":
        assert np.allclose(scale, step, rtol=0.02)
        # Norms are kept.
        stored = np.linalg.norm(values.astype(np.float64) * scale[:, :, None], axis=2)
        assert np.allclose(stored, np.linalg.norm(clean, axis=2), rtol=1e-5)
    else:
        assert np.array_equal(scale, step)
    assert values.dtype == dtype and np.isnan(grad[4, 0, 3])


@given(grad=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=16, max_size=16))
def test_quantise_to_int8_is_off_by_half_a_step_at_most(grad: list[float]) -> None:
    given_row = np.array(grad, np.float32).reshape(1, 1, 16)
    values, scale = quantise(given_row, "int8")
    step = np.abs(given_row).max() / 127
    error = np.abs(values.astype(np.float64) * step - given_row).max()
    assert error <= step * 0.5001 + 127 * 2.0**-149
    # Half a step in each of 16 numbers moves the norm, 127 steps or more, by two steps at the most.
    assert abs(scale[0, 0] - step) <= step * (2 / 127) * 1.05 + 2.0**-149
    assert values.dtype == np.int8 and values.min() >= -127


def test_quantise_stores_gradients_that_are_not_finite_as_zeros(tmp_path: Path) -> None:
    for dtype in DTYPES:
        header = make_header(dtype=dtype)
        rows = make_rows(header)
        rows.grad[1, 2] = 0
        rows.grad[2, 0, 5], rows.norm[2, 0] = np.nan, np.nan
        rows.grad[3, 1, 0], rows.norm[3, 1] = -np.inf, np.inf
        trace = write_store(tmp_path / dtype, header, rows)
        back = trace.gradients(np.arange(10))
        for slot, timestep in ((1, 2), (2, 0), (3, 1)):
            assert not back[slot, timestep].any()
        assert back[2, 1].any()
        assert np.isnan(trace.norm[2, 0]) and np.isinf(trace.norm[3, 1])
        if dtype == "int8":
            assert trace.numbers_of(0).scale[1, 2] == 0
