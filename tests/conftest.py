"""What tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from warm import Warm


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the gradients of queries out of the cache of the user who runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts processes, for the tests of one file."""
    with Warm(tmp_path_factory.mktemp("said")) as started:
        yield started
