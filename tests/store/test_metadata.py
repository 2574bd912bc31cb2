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
    content,
    make_header,
)

from dmin_trace.errors import TraceError
from dmin_trace.settings import Codec
from dmin_trace.store import (
    create,
    open_store,
)
from dmin_trace.store.metadata import damaged_metadata, restore_metadata


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
    "codecs": lambda metadata: metadata["codecs"].append({"name": "zstd", "configuration": {}}),
    "attributes": lambda metadata: metadata.update(attributes={"note": "mine"}),
}


@pytest.mark.parametrize("fact", ARRAYS)
@pytest.mark.parametrize("name", ["grad", "numbers", "done", "meta/caption"])
def test_damaged_metadata_names_arrays_that_are_not_those_of_the_header(
    finished: Path, tmp_path: Path, name: str, fact: str
) -> None:
    path = tmp_path / "trace.zarr"
    shutil.copytree(finished, path)
    header = open_store(path).header
    assert damaged_metadata(path, header) == {}
    change(path / name, ARRAYS[fact])
    assert damaged_metadata(path, header) == {name: "is not what was written"}
    (path / name / "zarr.json").unlink()
    assert damaged_metadata(path, header) == {name: "cannot be read: it is missing, or no file"}
    restore_metadata(path, header, [name])
    assert content(path) == content(finished)


@pytest.mark.parametrize("codec", ["none", "blosc"])
def test_create_arrays_writes_what_zarr_would(tmp_path: Path, codec: Codec) -> None:
    """Opened by Zarr and written again, it is the same."""
    path = create(tmp_path / "trace.zarr", make_header(codec=codec)).path
    for file in path.rglob("zarr.json"):
        name = file.parent.relative_to(path).as_posix()
        node: Any = zarr.open(path / name, mode="r")
        ours, theirs = json.loads(file.read_text()), json.loads(json.dumps(node.metadata.to_dict(), default=str))
        if ours["node_type"] == "group":
            assert (name, theirs["attributes"]) in ((".", ours["attributes"]), ("meta", {}))
            continue
        assert [codec["name"] for codec in theirs["codecs"]] == [codec["name"] for codec in ours["codecs"]]
        for fact in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "attributes", "dimension_names"):
            assert theirs[fact] == ours[fact], (name, fact)
        assert str(theirs["fill_value"]).lower() == str(ours["fill_value"]).lower()
