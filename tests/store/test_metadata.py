"""The metadata: what is no store, and arrays that are not those of the header."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from stores import (
    change,
)

from dmin_trace.errors import TraceError
from dmin_trace.store import (
    open_store,
)


def test_read_header_says_what_is_no_store(finished: Path, tmp_path: Path) -> None:
    def line(path: Path) -> str:
        with pytest.raises(TraceError) as caught:
            open_store(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "There is no store at" in line(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "is not a trace: it has no zarr.json" in line(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "is not a trace: it has no zarr.json" in line(tmp_path / "empty")
    zarr.create_group(tmp_path / "other", zarr_format=3, attributes={"format": "else"})
    assert "not a trace of dmin_trace" in line(tmp_path / "other")
    for text in (
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": 1, "a": 1}',
        '{"attributes": 1' + "0" * 5000 + "}",
    ):
        (tmp_path / "empty" / "zarr.json").write_text(text)
        assert "damaged" in line(tmp_path / "empty")
    (tmp_path / "empty" / "zarr.json").write_bytes(b"\xff\xfe")
    assert "cannot be read as JSON" in line(tmp_path / "empty")
    for version in (2, "1", True, 1.0, None):
        copied = tmp_path / f"version{version!r}"
        shutil.copytree(finished, copied)
        metadata = json.loads((copied / "zarr.json").read_text())
        metadata["attributes"]["version"] = version
        (copied / "zarr.json").write_text(json.dumps(metadata))
        assert f"is of version {version!r}; expected 1. Read it with the dmin_trace that wrote it" in line(copied)


ARRAYS: dict[str, Callable[[dict[str, Any]], None]] = {
    "shape": lambda metadata: metadata["shape"].__setitem__(0, 10**15),
    "data_type": lambda metadata: metadata.update(data_type="uint16"),
    "chunk_grid": lambda metadata: metadata["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 5),
    "chunk_key_encoding": lambda metadata: metadata["chunk_key_encoding"]["configuration"].update(separator="."),
    "codecs": lambda metadata: metadata["codecs"].append({"name": "zstd", "configuration": {}}),
}


@pytest.mark.parametrize("fact", ARRAYS)
@pytest.mark.parametrize("name", ["grad", "numbers", "done", "meta/caption"])
def test_check_arrays_refuses_arrays_that_are_not_those_of_the_header(
    finished: Path, tmp_path: Path, name: str, fact: str
) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    change(tmp_path / "trace.zarr" / name, ARRAYS[fact])
    with pytest.raises(
        TraceError, match=f"the metadata of {name} is not that of the header: its {fact} is .*; expected "
    ):
        open_store(tmp_path / "trace.zarr")
    (tmp_path / "trace.zarr" / name / "zarr.json").unlink()
    with pytest.raises(TraceError, match=f"the metadata of {name} is missing"):
        open_store(tmp_path / "trace.zarr")


def test_check_arrays_refuses_another_codec(finished: Path, packed: Path, tmp_path: Path) -> None:
    for path, codec in ((finished, "blosc"), (packed, "none")):
        shutil.copytree(path, tmp_path / codec)
        change(tmp_path / codec, lambda metadata, codec=codec: metadata["attributes"].update(codec=codec))
        with pytest.raises(
            TraceError, match="the metadata of grad is not that of the header: its codecs is .*; expected"
        ):
            open_store(tmp_path / codec)
