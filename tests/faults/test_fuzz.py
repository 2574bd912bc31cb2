"""A short form of `tools/torture.py fuzz`: every reader, with inputs that are nearly right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torture_fuzz import RefusedError, Target, _changed, targets

from dmin_trace.errors import DminTraceError

READERS = (
    *("json", "header", "header text", "settings", "index facts", "outputs", "store", "index", "graph", "captions"),
    *("thumbnails", "thumbnail", "packed chunk", "list", "weights", "arrays", "image", "cached query", "cached facts"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    """Every reader, on stores of its own."""
    folder: Path = tmp_path_factory.mktemp("fuzz")
    yield targets(folder)


def test_no_reader_is_left_out(made: dict[str, Target]) -> None:
    assert tuple(made) == READERS


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), bytes_of=st.binary(max_size=64), whole=st.booleans())
def test_every_outcome_is_an_answer_or_an_error(
    made: dict[str, Target], name: str, seed: int, bytes_of: bytes, whole: bool
) -> None:
    chosen = random.Random(seed)
    data = bytes_of if whole else _changed(chosen.choice(made[name].seeds), chosen)
    try:
        made[name].read(data)
    except (DminTraceError, RefusedError) as error:
        assert len(str(error)) < 5000
