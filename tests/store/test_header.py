"""The header: every attribute is checked, and a wrong one is named."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import (
    change,
    make_header,
)

from dmin_trace.errors import TraceError
from dmin_trace.store import (
    create,
    open_store,
)
from dmin_trace.views import describe_store

WRONG: dict[str, tuple[str, ...]] = {
    "id": ("../../etc/passwd", "A" * 32, "0" * 31, "0" * 32 + "\n"),
    "samples": ("0", "-1", "1000000000000001", "10.0", "true", '"10"', "null"),
    "timesteps": ("[]", "[true, 1, 2]", "5", "[1" + "0" * 400 + ", 1, 2]"),
    "dimension": ("0", "1" + "0" * 15, "-32"),
    "dtype": ('"object"', '"|O"', '["int8"]', "{}"),
    "chunk_rows": ("0", "-4", "4.0"),
    "codec": ('"zstd"', '["blosc"]', "1"),
    "projection.kind": ('"other"', "1"),
    "parameters.shapes": ("[[70, 70]]", "[[70, -70], [100]]", "[[70.0], [1]]", "[1, 2]"),
    "noise.draws": ("[]", '[["randn"], [], []]', '[[["randn", "x"]], [], []]'),
    "batch": ("[]", '{"x": [-1]}', '{"x": 1}'),
    "columns": ('{"../x": "string"}', '{"x": "object"}', "[]", '{"x": 1}'),
    "settings": ("[]", "null"),
    "writers": ('{"a": 1}',),
    "weights": ('""', '"zz"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_from_attributes_names_a_wrong_attribute(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    file = tmp_path / "trace.zarr" / "zarr.json"
    whole = json.loads(file.read_text())
    *outer, last = name.split(".")
    for text in (*WRONG[name], None):
        metadata = copy.deepcopy(whole)
        place = metadata["attributes"]
        for part in outer:
            place = place[part]
        place[last] = "@"
        if text is None:
            del place[last]
        quoted = json.dumps(text) if name == "id" else text
        file.write_text(json.dumps(metadata).replace('"@"', str(quoted)))
        with pytest.raises(TraceError, match=rf"its attribute .*{last} is ") as caught:
            open_store(tmp_path / "trace.zarr")
        assert "; expected " in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", ""])
def test_from_attributes_refuses_column_names_that_are_no_folder_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match="its attribute columns is"):
        create(tmp_path / "trace.zarr", make_header(columns={name: "string"}))
    assert list(tmp_path.iterdir()) == []


def test_from_attributes_refuses_too_many_chunks(tmp_path: Path) -> None:
    """A flag is allocated for each chunk."""
    with pytest.raises(TraceError, match="its attribute chunk_rows is 1; expected at most 4194304 chunks"):
        create(tmp_path / "trace.zarr", make_header(samples=2**40, rows=1))


def test_from_attributes_refuses_chunks_that_are_too_large(tmp_path: Path) -> None:
    for header in (
        make_header(samples=2**20, dimension=2**20, rows=2**8, codec="blosc"),
        make_header(samples=2**20, dimension=2**20, rows=2**8),
        make_header(samples=2, timesteps=200, dimension=2**24, rows=1, codec="blosc"),
    ):
        line = (
            "chunk_rows is 256; expected 1, or chunks" if header.chunk_rows > 1 else "codec is 'blosc'; expected none"
        )
        with pytest.raises(TraceError, match=f"its attribute {line} of|its attribute {line} for chunks of more than"):
            create(tmp_path / "trace.zarr", header)
    create(tmp_path / "trace.zarr", make_header(samples=2, timesteps=20, dimension=2**22, rows=1, codec="blosc"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document lies."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(place for key, item in inner for place in places(item, (*path, key)))]


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_open_store_of_any_attributes_gives_an_error_or_a_store(
    finished: Path, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "trace.zarr"
    if not path.exists():
        shutil.copytree(finished, path)
    metadata = json.loads((finished / "zarr.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(metadata["attributes"])))
        holder = metadata["attributes"]
        for key in place[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[place[-1]] = data.draw(JSON)
        else:
            del holder[place[-1]]
    (path / "zarr.json").write_text(json.dumps(metadata))
    # What holds an infinity has no digest.
    with contextlib.suppress(ValueError):
        change(path, lambda metadata: None)
    tracemalloc.start()
    try:
        trace = open_store(path, unfinished=True)
        assert trace.norm.shape == (10, 3)
        assert trace.gradients(np.arange(10)).shape == (10, 3, 32)
        assert all(len(trace.column(name)) == 10 for name in trace.header.columns)
        assert describe_store(trace)
    except TraceError as error:
        assert len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**22
