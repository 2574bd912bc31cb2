"""Who is in which group: columns, folders, lists of files, and lists from anybody."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import ANY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_header, make_rows, write_store

import dmin_trace
from dmin_trace.errors import DminTraceError, QueryError
from dmin_trace.query.groups import SEPARATOR, group_samples, read_groups


def trace_of(path: Path, columns: dict[str, list[Any]]) -> dmin_trace.Trace:
    """A trace with these columns by data set index, whose rows are in another order."""
    count = len(next(iter(columns.values())))
    kinds = {
        name: "string" if isinstance(values[0], str) else "integer" if isinstance(values[0], int) else "number"
        for name, values in columns.items()
    }
    header = make_header(samples=count, dimension=32, columns=kinds)
    rows = make_rows(header)
    samples = rows.sample - 100
    by_row = {name: [values[sample] for sample in samples] for name, values in columns.items()}
    return dmin_trace.Trace(write_store(path, header, rows._replace(sample=samples, columns=by_row)))


def members(trace: dmin_trace.Trace, by: str | None = None, groups: Any = None) -> dict[str, list[int]]:
    found = group_samples(trace, by, groups)
    assert all(samples.dtype == np.int64 for samples in found.members.values())
    return {name: samples.tolist() for name, samples in found.members.items()}


def test_groups_by_a_column(tmp_path: Path) -> None:
    artists = ["Ann", "", "Bob; Ann", " Ann ;Ann; ", ";", "Bob"]
    labels, sizes = [3, -1, 0, 3, 3, -1], [0.5, float("nan"), 2.0, 0.5, float("nan"), 2.0]
    trace = trace_of(tmp_path / "t.zarr", {"artist": artists, "label": labels, "size": sizes})
    assert members(trace, "artist") == {"Ann": [0, 2, 3], "Bob": [2, 5]}
    assert members(trace, "label") == {"3": [0, 3, 4], "0": [2]}
    assert members(trace, "size") == {"0.5": [0, 3], "2": [2, 5]}
    with pytest.raises(
        QueryError, match=r"no column 'owner'; it has artist, label, size\. Name one of these, or folder"
    ):
        members(trace, "owner")
    with pytest.raises(QueryError, match="No groups were given"):
        members(trace)
    with pytest.raises(QueryError, match="no column file_name, so its samples' files are not known"):
        members(trace, "folder")
    empty = trace_of(tmp_path / "e.zarr", {"artist": ["", ";", "  "]})
    with pytest.raises(QueryError, match="No sample has a value in artist"):
        members(empty, "artist")
    long = trace_of(tmp_path / "l.zarr", {"artist": ["a" * 1001]})
    with pytest.raises(QueryError, match="too long for a name"):
        members(long, "artist")


def test_groups_by_folder(tmp_path: Path) -> None:
    files = ["cats/1.png", "cats/2.png", "dogs/old/1.png", "3.png", "", "win\\4.png"]
    trace = trace_of(tmp_path / "t.zarr", {"file_name": files})
    assert members(trace, "folder") == {"cats": [0, 1], "dogs/old": [2], ".": [3], "win": [5]}
    own = trace_of(tmp_path / "o.zarr", {"file_name": files[:2], "folder": ["a", "b"]})
    assert members(own, "folder") == {"a": [0], "b": [1]}


def test_groups_of_files(tmp_path: Path) -> None:
    files = ["cats/1.png", "cats/2.png", "dogs/1.png", "3.png", "", "deep/er/4.png"]
    trace = trace_of(tmp_path / "t.zarr", {"file_name": files})
    named = {
        "cats/1.png": "Ann",
        "./2.png": ["Bob", "Ann"],
        "/data/set/3.png": "Bob",
        "er\\4.png": "Eve",
        "no.png": "x",
    }
    found = group_samples(trace, None, named)
    assert {name: samples.tolist() for name, samples in found.members.items()} == {
        "Ann": [0, 1],
        "Bob": [1, 3],
        "Eve": [5],
    }
    assert found.by == "group" and found.note == "1 of 5 files with a group are no files of the trace."
    assert group_samples(trace, None, {"3.png": "x"}).note == ""
    assert members(trace, None, {"cats/1.png": "", "3.png": "x"}) == {"x": [3]}


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"1.png": "x"}, r"'1.png' may be the file 'cats/1.png' or 'dogs/1.png'\. Give whole paths"),
        ({"a/cats/1.png": "x", "b/cats/1.png": "y"}, "'a/cats/1.png' and 'b/cats/1.png' may be the file 'cats/1.png'"),
        ({"other/1.png": "x"}, "None of the 1 files with a group is a file of the trace, such as 'cats/1.png'"),
        ({"scats/1.png": "x"}, "None of the 1 files"),
        ({}, "The groups of files are empty"),
        ({"cats/1.png": ""}, "No sample has a value in group"),
    ],
)
def test_groups_of_other_files_are_refused(tmp_path: Path, named: dict[str, str], words: str) -> None:
    trace = trace_of(tmp_path / "t.zarr", {"file_name": ["cats/1.png", "dogs/1.png"]})
    with pytest.raises(QueryError, match=words):
        members(trace, None, named)


def test_a_file_of_groups(tmp_path: Path) -> None:
    table = '\ufefffile_name,artist,licence\r\n1.png,"Ann, A.",CC0\r\n1.png,Bob,CC0\r\n\r\n2.png,Bob,\r\n'
    (tmp_path / "g.csv").write_bytes(table.encode())
    assert read_groups(tmp_path / "g.csv", "artist") == {"1.png": ["Ann, A.", "Bob"], "2.png": ["Bob"]}
    assert read_groups(tmp_path / "g.csv", "licence") == {"1.png": ["CC0", "CC0"], "2.png": [""]}
    (tmp_path / "two.txt").write_text("picture,who\n1.png,Ann\n")
    assert read_groups(tmp_path / "two.txt", None) == {"1.png": ["Ann"]}
    (tmp_path / "last.csv").write_text("who,file_name\nAnn,1.png\n")
    assert read_groups(tmp_path / "last.csv", None) == {"1.png": ["Ann"]}
    (tmp_path / "g.json").write_text(json.dumps({"1.png": "Ann", "2.png": ["Bob", 7], "3.png": 4, "4.png": []}))
    assert read_groups(tmp_path / "g.json", None) == {
        "1.png": ["Ann"],
        "2.png": ["Bob", "7"],
        "3.png": ["4"],
        "4.png": [],
    }
    trace = trace_of(tmp_path / "t.zarr", {"file_name": ["x/1.png", "x/2.png"]})
    assert members(trace, "artist", tmp_path / "g.csv") == {"Ann, A.": [0], "Bob": [0, 1]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("g.csv", b"", r"its headings are \[\]"),
        ("g.csv", b"file_name\n1.png\n", "its headings are"),
        ("g.csv", b"a,a\n1,2\n", "its headings are"),
        ("g.csv", b"file_name,a,b\n1,2,3\n", "--by does not say which"),
        ("g.csv", b"file_name,a\n1,2,3\n", "line 2 has 3 values for 2 headings"),
        ("g.csv", b'file_name,a\n1,"2\n', "unexpected end of data"),
        ("g.csv", b"file_name,a\n1,2\x00\n", ""),
        ("g.csv", b"file_name,a\n\xff,2\n", "it is not UTF-8"),
        ("g.csv", b"file_name,a\n1," + b"x" * 200_000 + b"\n", "field larger than field limit"),
        ("g.json", b"[]", "it is no object"),
        ("g.json", b"{", ""),
        ("g.json", b'{"a": "x", "a": "y"}', "it has a name twice"),
        ("g.json", b'{"a": {"b": 1}}', "the groups of 'a' are"),
        ("g.json", b'{"a": [true]}', "the groups of 'a' are"),
        ("g.json", b'{"a": null}', "the groups of 'a' are"),
        ("g.json", b'{"a": NaN}', "not a finite number"),
        ("g.json", b"[" * 100_000, ""),
        ("g.json", b'{"a": "\\ud800"}', None),
    ],
)
def test_a_file_that_has_no_groups_is_refused(tmp_path: Path, name: str, content: bytes, words: str | None) -> None:
    (tmp_path / name).write_bytes(content)
    if words is None:
        assert read_groups(tmp_path / name, None) == {"a": ["\ud800"]}
        return
    try:
        read_groups(tmp_path / name, None)
    except QueryError as error:
        assert words in str(error) or words.startswith("its") and "its headings are" in str(error)
        assert str(error).isprintable() and "cannot be read as groups" in str(error)
    else:
        assert words == ""  # What this version of Python's csv takes, it takes as text.


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path, tmp_path / "no.csv", tmp_path / "pipe.csv"):
        with pytest.raises(QueryError, match="it is no file"):
            read_groups(path, None)
    (tmp_path / "large.csv").write_text("file_name,a\n")
    monkeypatch.setattr("dmin_trace.query.groups.MAX_FILE_BYTES", 10)
    with pytest.raises(QueryError, match="it has 12 bytes; expected 10 at most"):
        read_groups(tmp_path / "large.csv", None)


@given(st.binary(max_size=300), st.sampled_from(["g.csv", "g.json"]), st.none() | ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_groups_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str, by: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    try:
        found = read_groups(path, by)
    except DminTraceError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert all(isinstance(group, str) for groups in found.values() for group in groups)


@given(st.lists(ANY_TEXT, min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_values_make_groups_or_none(values: list[str]) -> None:
    from dmin_trace.query.groups import _grouping, _names

    try:
        found = _grouping("x", [_names(value) for value in values])
    except QueryError:
        assert not any(part.strip() for value in values for part in value.split(SEPARATOR))
        return
    for name, samples in found.members.items():
        assert name == name.strip() != "" and SEPARATOR not in name
        assert samples.tolist() == [n for n, v in enumerate(values) if name in [p.strip() for p in v.split(SEPARATOR)]]
