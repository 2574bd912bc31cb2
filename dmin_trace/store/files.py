"""Files and folders that stay on disk: fsync, new folders, and what killed captures leave."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from dmin_trace.errors import TraceError
from dmin_trace.store.layout import index_beside, weights_beside


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the OSError of a disk that refuses into a TraceError that names the store."""
    try:
        yield
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror or error}.") from None


def sync(path: Path) -> None:
    """Waits until the disk keeps a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Waits until the disk keeps a folder and everything in it."""
    for kept in (*path.rglob("*"), path):
        sync(kept)


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents, and waits until the disk keeps their names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew in one step, and waits until the disk keeps it: a crash leaves the old file or the new."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sweep(path: Path) -> None:
    """Removes unfinished stores and weights that killed captures left beside `path`, whose lock the caller holds."""
    half_made = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}\.partial")
    for left in path.parent.iterdir():
        if half_made.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    weights = weights_beside(path)
    weights.with_name(f".{weights.name}.partial").unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raises TraceError if something exists at `path`, or if nothing can be written there."""
    with writing(path):
        taken = path.exists() or path.is_symlink()
    if taken:
        raise TraceError(
            f"{path} exists already and belongs to another run. Give another path (out, --out), or move it away."
        )
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raises TraceError if nothing can be written at `path`."""
    with writing(path):
        parent = next((folder for folder in path.absolute().parents if folder.exists()), path)
        writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    if not writable:
        raise TraceError(f"{path} cannot be written: {parent} is no folder that this user may write to.")


def set_aside(path: Path) -> Path | None:
    """Renames a store that lies at `path`, with its weights and its index, to the next free number: `trace-1.zarr`.

    Returns its new path, or None if there was nothing. The caller holds the lock of `path`. Raises TraceError if it
    cannot be renamed.
    """
    with writing(path):
        if not (path.exists() or path.is_symlink()):
            return None
        stem, ending = path.name.removesuffix(".zarr"), ".zarr" if path.name.endswith(".zarr") else ""
        numbered = (path.with_name(f"{stem}-{number}{ending}") for number in count(1))
        aside = next(free for free in numbered if not (free.exists() or free.is_symlink()))
        # The store last: if this is interrupted, the next call finds it, and goes on.
        for beside in (weights_beside, index_beside):
            if beside(path).exists() and not beside(aside).exists():
                beside(path).rename(beside(aside))
        path.rename(aside)
        sync(path.parent)
    return aside
