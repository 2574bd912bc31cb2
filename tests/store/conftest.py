"""Finished stores, to read or to copy and damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import make_header, make_rows, write_store


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that tests read, or copy to do harm to."""
    path = tmp_path_factory.mktemp("finished") / "trace.zarr"
    header = make_header()
    write_store(path, header, make_rows(header))
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store whose chunks are packed, and large enough for Blosc to take the trouble."""
    path = tmp_path_factory.mktemp("packed") / "trace.zarr"
    header = make_header(dimension=1024, dtype="float32", codec="blosc")
    write_store(path, header, make_rows(header))
    return path
