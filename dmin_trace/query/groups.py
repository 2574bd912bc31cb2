"""Which training samples belong together: groups by a column of the trace, by folder, or by a list of files.

A sample may be in several groups: a value such as "ink; portrait" names two. An empty value names none.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, brief
from dmin_trace.store import FILE_COLUMN, parse

if TYPE_CHECKING:
    from dmin_trace.query.trace import Trace

SEPARATOR = ";"
"""Between the groups that one value names."""
FOLDER = "folder"
"""What `by` calls the folder of each sample's file, where the trace has no column of that name."""
MAX_FILE_BYTES = 2**26
MAX_NAME_LENGTH = 1000
"""Characters of the name of a group: more are not a name."""

Groups = Mapping[str, str | Sequence[str]]
"""For each file the name of its group, or the names of several."""


@dataclass(frozen=True)
class Grouping:
    """The groups of N samples.

    by: what they are by, in words.
    members: for each group by name its samples, (n,) int64 data set indices in order, none twice.
    note: what a reader should know, as a sentence; "" if nothing.
    """

    by: str
    members: dict[str, NDArray[np.int64]]
    note: str = ""


def group_samples(trace: "Trace", by: str | None, groups: Groups | str | os.PathLike[str] | None) -> Grouping:
    """The groups of a trace's samples.

    Args:
        by: the name of a column; "folder" for the folder of each file, if there is no such column. With `groups` as a
            CSV file, the name of a column in it.
        groups: the groups of files, or a CSV or JSON file with them.

    Raises QueryError if neither is given, there is no such column, the file cannot be read, or no sample is in a group.
    """
    if groups is not None:
        return _by_files(trace, by, groups)
    if by is None:
        raise QueryError("No groups were given. Name a column with by (--by), or give groups of files (--groups).")
    if by in trace.columns:
        return _grouping(by, [_names(value) for value in trace.columns[by]])
    if by == FOLDER:
        folders = (str(PurePath(file.replace("\\", "/")).parent) if file else "" for file in _files(trace))
        return _grouping(by, [(folder,) if folder else () for folder in folders])
    has = ", ".join(trace.columns) or "none"
    raise QueryError(
        f"The trace has no column {brief(by)}; it has {has}. Name one of these, or folder for folders of files, or "
        "give groups of files (--groups)."
    )


def read_groups(path: Path, by: str | None) -> dict[str, list[str]]:
    """The groups of files in a file; nothing in it is executed.

    A .json file holds one object: for each file the name of its group, or a list of names. Any other file is CSV with a
    line of headings: one of them is file_name, or the first one names files, and `by` is the heading of the groups,
    which is not needed if there are two columns.

    Raises QueryError if it cannot be read, or is not so.
    """
    expected = 'expected CSV with a line such as file_name,artist, or JSON such as {"a.png": "Ann"}'
    try:
        if not path.is_file():
            raise ValueError("it is no file")  # opening a pipe would block
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(f"it has {size:,} bytes; expected {MAX_FILE_BYTES:,} at most")
        text = path.read_bytes().decode("utf-8-sig")
        return _from_json(text) if path.suffix.lower() == ".json" else _from_csv(text, by)
    except (OSError, ValueError, csv.Error) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else brief(str(error))[1:-1]
        raise QueryError(f"{path} cannot be read as groups: {reason}; {expected}.") from None


def _from_json(text: str) -> dict[str, list[str]]:
    found = parse(text)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    groups = {}
    for file, named in found.items():
        names = named if isinstance(named, list) else [named]
        if not all(isinstance(name, (str, int)) and not isinstance(name, bool) for name in names):
            raise ValueError(f"the groups of {brief(file)} are {brief(named)}")
        groups[file] = [str(name) for name in names]
    return groups


def _from_csv(text: str, by: str | None) -> dict[str, list[str]]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    headings = next(lines, [])
    if len(set(headings)) != len(headings) or len(headings) < 2:
        raise ValueError(f"its headings are {brief(headings)}")
    file = headings.index(FILE_COLUMN) if FILE_COLUMN in headings else 0
    others = [heading for n, heading in enumerate(headings) if n != file]
    if by is None and len(others) > 1:
        raise ValueError(f"it has the columns {brief(others)}, and --by does not say which are the groups")
    if by is not None and by not in others:
        raise ValueError(f"it has no column {brief(by)}, but {brief(others)}")
    column = headings.index(others[0] if by is None else by)
    groups: dict[str, list[str]] = {}
    for line in lines:
        if not line:
            continue
        if len(line) != len(headings):
            raise ValueError(f"line {lines.line_num} has {len(line)} values for {len(headings)} headings")
        # A file may have a line for each of its groups.
        groups.setdefault(line[file], []).append(line[column])
    return groups


def _by_files(trace: "Trace", by: str | None, groups: Groups | str | os.PathLike[str]) -> Grouping:
    read = groups if isinstance(groups, Mapping) else read_groups(Path(groups), by)
    named: dict[str, tuple[str, ...]] = {}
    for file, names in read.items():
        some = [names] if isinstance(names, str) else list(names)
        named[_plain(file)] = tuple(dict.fromkeys(name for text in some for name in _names(text)))
    if not named:
        raise QueryError("The groups of files are empty. Give a group for each file.")
    files = [_plain(file) for file in _files(trace)]
    matched = _match(files, named)
    if not any(matched):
        raise QueryError(
            f"None of the {len(named):,} files with a group is a file of the trace, such as {brief(files[0])}. Use the "
            f"names of its column {FILE_COLUMN}."
        )
    unused = len(named) - len(set(matched) - {""})
    note = f"{unused:,} of {len(named):,} files with a group are no files of the trace." if unused else ""
    return _grouping(by or "group", [named.get(match, ()) for match in matched], note)


def _match(files: Sequence[str], named: Iterable[str]) -> list[str]:
    """For each file of the trace its name in a list, "" if it is not there.

    The names may be shorter than the paths that a trace keeps, or longer. Raises QueryError if a name may be of two
    files.
    """
    listed = set(named)
    by_end: dict[str, list[str]] = {}
    for name in sorted(listed):
        by_end.setdefault(_end(name), []).append(name)
    matched, taken = [], dict[str, str]()
    for file in files:
        if file in listed or not file:
            matched.append(file)
            continue
        same = [name for name in by_end.get(_end(file), ()) if _is_end(name, file) or _is_end(file, name)]
        if len(same) > 1:
            found = f"{brief(same[0])} and {brief(same[1])} may be the file {brief(file)}"
            raise QueryError(f"In the groups of files, {found}. Give whole paths.")
        if same and (first := taken.setdefault(same[0], file)) != file:
            found = f"{brief(same[0])} may be the file {brief(first)} or {brief(file)}"
            raise QueryError(f"In the groups of files, {found}. Give whole paths.")
        matched.append(same[0] if same else "")
    return matched


def _end(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _is_end(end: str, path: str) -> bool:
    return path.endswith(f"/{end}")


def _plain(file: str) -> str:
    return file.strip().replace("\\", "/").removeprefix("./")


def _files(trace: "Trace") -> list[str]:
    """The file of each sample. Raises QueryError if the trace does not know them."""
    if trace.store.header.columns.get(FILE_COLUMN) != "string":
        raise QueryError(
            f"The trace has no column {FILE_COLUMN}, so its samples' files are not known. Name another column (--by): "
            f"it has {', '.join(trace.columns) or 'none'}."
        )
    files: list[str] = trace.columns[FILE_COLUMN]
    return files


def _names(value: Any) -> tuple[str, ...]:
    """The groups that a value names, none twice; no names for a value that means none."""
    if isinstance(value, str):
        return tuple(dict.fromkeys(name for part in value.split(SEPARATOR) if (name := part.strip())))
    if value != value or (isinstance(value, int) and value == -1):
        return ()
    return (f"{value:g}" if isinstance(value, float) else str(value),)


def _grouping(by: str, names: Iterable[Sequence[str]], note: str = "") -> Grouping:
    """The groups of samples, from the names of each one's groups."""
    members: dict[str, list[int]] = {}
    for sample, own in enumerate(names):
        for name in own:
            if len(name) > MAX_NAME_LENGTH:
                raise QueryError(f"Sample {sample} is of the group {brief(name)}, which is too long for a name.")
            members.setdefault(name, []).append(sample)
    if not members:
        raise QueryError(f"No sample has a value in {brief(by)[1:-1]}. Give another column, or groups of files.")
    arrays = {name: np.array(samples, np.int64) for name, samples in members.items()}
    return Grouping(by, arrays, note)
