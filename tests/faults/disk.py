"""What a disk may hold after a crash: the operations of a commit, recorded, and every state that they may have left.

    with recording(folder) as disk: ...write...
    for point, mode, state in disk.states(seeds): build(state, another folder)

Recorded are the functions of `os` and `io` by which Python, and so Zarr, writes: folders made, files opened for
writing, files written (when they are closed), linked, renamed, removed; files and folders synced. The model is that of
a file system which promises no more than POSIX does:

- a file's bytes are kept once the file was synced; before that any of them may be there, none, or zeros in their place;
- a name in a folder, new, moved or removed, is kept once the folder was synced; before that it may be or not.
"""

from __future__ import annotations

import io
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Mode = Literal["synced", "all", "truncated", "zeroed", "torn", "random"]
MODES: tuple[Mode, ...] = ("synced", "all", "truncated", "zeroed", "torn", "random")


State = dict[str, bytes | None]
"""Files and their bytes by their paths; folders have None, and come before what is in them."""


def build(state: State, folder: Path) -> None:
    """Makes a state in a folder, which is empty."""
    for path, data in state.items():
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


@dataclass(frozen=True)
class Operation:
    """One operation: its kind, and the paths or the file it is of.

    kind: "make" a folder, "write" a file's bytes, "link", "move", "remove", "sync".
    """

    kind: str
    path: str
    to: str = ""
    data: bytes = b""


@dataclass
class _Node:
    """A file or a folder, by whatever name.

    data, kept: what a file holds now, and what the disk has promised to hold.
    names, kept_names: what a folder names now, and what the disk has promised that it names.
    """

    folder: bool
    data: bytes = b""
    kept: bytes | None = None
    names: dict[str, _Node] = field(default_factory=dict)
    kept_names: dict[str, _Node] = field(default_factory=dict)


class Disk:
    """A recording of what was done in one folder, in order.

    returned: after how many operations something was over, by its name; for who records to fill in.
    """

    def __init__(self, root: Path) -> None:
        """The folder, which is there and is empty."""
        self.root = root
        self.operations: list[Operation] = []
        self.returned: dict[str, int] = {}

    def state(self, point: int, mode: Mode, seed: int = 0) -> State:
        """What the disk may hold after the first `point` operations and a crash.

        Args:
            point: how many operations were begun and done.
            mode: "synced": only what was promised. "all": everything. "truncated": all names, and of what was not
                synced no bytes. "zeroed": likewise, with zeros; "torn": with its first bytes, then zeros. "random": of
                all that was not promised a part.
            seed: for "random".
        """
        found: State = {}
        self._collect(self._after(point), "", found, mode, random.Random(f"{point} {seed}"))
        return found

    def states(self, seeds: int) -> Iterator[tuple[int, Mode, State]]:
        """Every state after every operation, each once, with so many random ones."""
        known = set()
        for point in range(len(self.operations) + 1):
            for mode in MODES:
                for seed in range(seeds if mode == "random" else 1):
                    found = self.state(point, mode, seed)
                    # What was promised is more at each point, so the same state is to be checked anew.
                    key = hash((frozenset(found.items()), frozenset(self.promised(point))))
                    if key not in known:
                        known.add(key)
                        yield point, mode, found

    def promised(self, point: int) -> list[str]:
        """What had returned before the first `point` operations were done."""
        return [name for name, after in self.returned.items() if after <= point]

    def _after(self, point: int) -> _Node:
        root = _Node(folder=True)
        for done in self.operations[:point]:
            above, name = self._find(root, done.path)
            if done.kind == "make":
                above.names[name] = _Node(folder=True)
            elif done.kind == "write":
                if name not in above.names or above.names[name].folder:
                    above.names[name] = _Node(folder=False)
                above.names[name].data = done.data
            elif done.kind in ("move", "link"):
                there, new = self._find(root, done.to)
                there.names[new] = above.names.pop(name) if done.kind == "move" else above.names[name]
            elif done.kind == "remove":
                above.names.pop(name, None)
            else:
                node = above.names[name] if name else root
                if node.folder:
                    node.kept_names = dict(node.names)
                else:
                    node.kept = node.data
        return root

    def _find(self, root: _Node, path: str) -> tuple[_Node, str]:
        *folders, name = path.split("/")
        for folder in folders:
            root = root.names[folder]
        return root, name

    def _collect(self, node: _Node, above: str, found: State, mode: Mode, generator: random.Random) -> None:
        for name, below in self._names(node, mode, generator).items():
            if below.folder:
                found[above + name] = None
                self._collect(below, f"{above}{name}/", found, mode, generator)
            else:
                found[above + name] = _bytes(below, mode, generator)

    def _names(self, node: _Node, mode: Mode, generator: random.Random) -> dict[str, _Node]:
        if mode == "synced":
            return node.kept_names
        if mode != "random":
            return node.names
        names = {}
        for name in sorted(node.names.keys() | node.kept_names.keys()):
            now, before = node.names.get(name), node.kept_names.get(name)
            # A folder that was synced has no choice left.
            found = generator.choice([now, before])
            if found is not None:
                names[name] = found
        return names


def _bytes(node: _Node, mode: Mode, generator: random.Random) -> bytes:
    if node.data == node.kept or mode == "all":
        return node.data
    if mode == "synced":
        return node.kept or b""
    if mode == "truncated":
        return b""
    if mode == "zeroed":
        return bytes(len(node.data))
    if mode == "torn":
        first = 1 + len(node.data) // 8
        return node.data[:first] + bytes(max(0, len(node.data) - first))
    length = generator.randrange(len(node.data) + 1)
    torn = node.data[:length], node.data[:length] + bytes(len(node.data) - length), node.kept or b"", node.data
    return generator.choice(torn)


@contextmanager
def recording(root: Path) -> Iterator[Disk]:
    """Records what is done below `root`, until the block ends."""
    disk = Disk(root)
    lock = threading.RLock()
    before: dict[tuple[Any, str], Any] = {}
    opened: dict[int, str] = {}

    def inside(path: Any) -> str | None:
        """The path in the recorded folder; None for others. "" for the folder itself."""
        if not isinstance(path, (str, os.PathLike)):
            return None
        absolute = str(Path.cwd() / path)
        if absolute == str(root):
            return ""
        return absolute[len(str(root)) + 1 :] if absolute.startswith(f"{root}{os.sep}") else None

    def note(*operation: Any) -> None:
        disk.operations.append(Operation(*operation))

    def patch(home: Any, name: str, wrapper: Any) -> None:
        before[home, name] = getattr(home, name)
        setattr(home, name, wrapper)

    def mkdir(path: Any, *rest: Any, **options: Any) -> None:
        with lock:
            before[os, "mkdir"](path, *rest, **options)
            if inside(path):
                note("make", inside(path))

    def move(name: str) -> Any:
        def moved(source: Any, target: Any, *rest: Any, **options: Any) -> None:
            with lock:
                before[os, name](source, target, *rest, **options)
                if inside(source) is not None:
                    note("link" if name == "link" else "move", inside(source), inside(target))

        return moved

    def remove(name: str) -> Any:
        def removed(path: Any, *rest: Any, **options: Any) -> None:
            with lock:
                before[os, name](path, *rest, **options)
                if inside(path):
                    note("remove", inside(path))

        return removed

    def open_handle(path: Any, *rest: Any, **options: Any) -> int:
        handle: int = before[os, "open"](path, *rest, **options)
        where = inside(path)
        if where is not None:
            opened[handle] = where
        return handle

    def fsync(handle: int) -> None:
        with lock:
            before[os, "fsync"](handle)
            if handle in opened:
                note("sync", opened[handle])

    def close_handle(handle: int) -> None:
        opened.pop(handle, None)
        before[os, "close"](handle)

    def open_file(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = before[io, "open"](path, mode, *rest, **options)
        where = inside(path)
        if where and any(letter in mode for letter in "wax+"):
            with lock:
                note("write", where, "", b"")
            close = file.close

            def closed() -> None:
                was = file.closed
                close()
                if not was:
                    with lock:
                        note("write", where, "", Path(path).read_bytes())

            return _Closing(file, closed)
        return file

    patch(os, "mkdir", mkdir)
    for name in ("rename", "replace", "link"):
        patch(os, name, move(name))
    for name in ("unlink", "remove", "rmdir"):
        patch(os, name, remove(name))
    patch(os, "open", open_handle)
    patch(os, "fsync", fsync)
    patch(os, "close", close_handle)
    patch(io, "open", open_file)
    try:
        yield disk
    finally:
        for (home, name), original in before.items():
            setattr(home, name, original)


class _Closing:
    """A file whose closing is seen."""

    def __init__(self, file: Any, closed: Any) -> None:
        self._file, self._closed = file, closed

    def __getattr__(self, name: str) -> Any:
        return self._closed if name == "close" else getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._closed()
