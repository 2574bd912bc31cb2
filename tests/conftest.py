"""What tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from warm import Warm


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts processes, for the tests of one file."""
    with Warm(tmp_path_factory.mktemp("said")) as started:
        yield started
