"""GradientChunks (store/chunks.py): mapped, read in parts, and unpacked."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import (
    make_header,
    make_rows,
    with_checksum,
    write_store,
)

from dmin_trace.errors import TraceError
from dmin_trace.settings import Codec
from dmin_trace.store import (
    Store,
    chunk_file,
    open_store,
)


@pytest.mark.parametrize("codec", ["none", "blosc"])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_parts_are_the_chunk(tmp_path: Path, codec: Codec, rows: int) -> None:
    header = make_header(dtype="float16", codec=codec)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    memory = np.empty(rows * header.sample_bytes, np.uint8)
    # Read, then mapped, then from the map that was kept.
    for chunk in (0, 1, 2) * 3:
        parts = [np.array(part) for part in trace.grad_parts(chunk, rows, memory)]
        assert [len(part) for part in parts[:-1]] == [rows] * (len(parts) - 1)
        assert np.array_equal(np.concatenate(parts), trace.grad_chunk(chunk))


def test_parts_keeps_few_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmin_trace.store.chunks.MAX_MAPS", 2)
    header = make_header(samples=20)
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    memory = np.empty(4 * header.sample_bytes, np.uint8)
    for turn in range(3):
        mapped = []
        for chunk in range(5):
            (part,) = trace.grad_parts(chunk, 4, memory)
            mapped.append(isinstance(part, np.memmap))
            assert np.array_equal(part, trace.grad_chunk(chunk))
        assert mapped == ([False] * 5 if turn == 0 else [True, True, False, False, False])


def test_parts_raises_if_the_file_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """A map of it would end the process."""
    header = make_header()
    trace = write_store(tmp_path / "trace.zarr", header, make_rows(header))
    parts = trace.grad_parts(1, 1, np.empty(header.sample_bytes, np.uint8))
    next(parts)
    os.truncate(chunk_file(trace.path, "grad", 1), header.sample_bytes + 10)
    with pytest.raises(TraceError, match="chunk 1 of grad became shorter while read"):
        next(parts)


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


FRAMES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "unpacks to more": (lambda f: f[:4] + number(2**31 - 17) + f[8:], "claims 2147483631 bytes in"),
    "unpacks to less": (lambda f: f[:4] + number(49148) + f[8:], "claims 49148 bytes in .*expected 49152"),
    "is said to be longer": (lambda f: f[:12] + number(2**30) + f[16:], "claims 49152 bytes in 1073741824"),
    "has no blocks": (lambda f: f[:8] + number(0) + f[12:], "claims 49152"),
    "has a block larger than itself": (lambda f: f[:8] + number(2**31 - 1) + f[12:], "claims 49152"),
    "is cut short": (lambda f: f[:-100], "claims 49152 bytes in"),
    "is cut short and says so": (lambda f: f[:12] + number(len(f) - 100) + f[16:-100], "cannot be unpacked"),
    "is a header alone": (lambda f: f[:12] + number(16) + f[16:16], "cannot be unpacked"),
    "is of another format": (lambda f: b"\xff" + f[1:], "cannot be unpacked"),
    "is empty": (lambda f: b"", "has 4 bytes, expected at most 49172"),
    "is longer than any": (lambda f: f + bytes(49152), "bytes, expected at most 49172"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_chunk_allocates_nothing_for_a_frame_that_lies(packed: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(packed, tmp_path / "trace.zarr")
    trace = open_store(tmp_path / "trace.zarr")
    file = chunk_file(trace.path, "grad", 1)
    forge, message = FRAMES[name]
    file.write_bytes(with_checksum(forge(file.read_bytes()[:-4])))
    trace.gradients(np.array([0]))
    tracemalloc.start()
    for read in (lambda: trace.grad_chunk(1), lambda: trace.gradients(np.array([5])), lambda: list(parts_of(trace, 1))):
        with pytest.raises(TraceError, match=f"is damaged: chunk 1 of grad .*{message}"):
            read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def parts_of(trace: Store, chunk: int) -> Iterator[np.ndarray]:
    return trace.grad_parts(chunk, 2, np.empty(0, np.uint8))


def test_chunk_finds_a_flipped_bit(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "trace.zarr")
    trace = open_store(tmp_path / "trace.zarr")
    file = chunk_file(trace.path, "grad", 1)
    whole = file.read_bytes()
    for place in (0, 5, 13, 16, 20, len(whole) // 2, len(whole) - 5, len(whole) - 4, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(TraceError, match="does not have the numbers of its checksum"):
            trace.grad_chunk(1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_chunk_of_any_frame_gives_an_error_or_numbers(packed: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whoever can write a file can write its checksum."""
    if not (tmp_path / "trace.zarr").exists():
        shutil.copytree(packed, tmp_path / "trace.zarr")
    trace = open_store(tmp_path / "trace.zarr")
    frame = bytearray(chunk_file(packed, "grad", 1).read_bytes()[:-4])
    near = st.integers(0, 200) if data.draw(st.booleans()) else st.integers(0, len(frame) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        frame[data.draw(near)] = data.draw(st.integers(0, 255))
    chunk_file(trace.path, "grad", 1).write_bytes(with_checksum(bytes(frame)))
    try:
        assert trace.grad_chunk(1).shape == (4, 3, 1024)
    except TraceError as error:
        assert "chunk 1 of grad" in str(error)
