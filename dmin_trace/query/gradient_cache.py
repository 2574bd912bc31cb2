"""The projected gradients of queries that were captured before, in the user's own cache folder: `GradientCache`.

An entry is one .npz file without pickle, for one query, named by what decides its gradients (`query_key`). It also has
the marks of the files that the run of the script read: if one has changed, the script is run again, and refuses what is
not as it was.

The folder is read as hostile data all the same. What cannot be used counts as missing, and the log says why.
"""

import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from platformdirs import user_cache_path

from dmin_trace.query.file_marks import FileMark, mark_of
from dmin_trace.store import ArrayHeader, parse, read_arrays

logger = logging.getLogger(__name__)

MAX_BYTES, MAX_ENTRIES = 2**30, 10_000
"""The size of the folder, and the number of its entries. Those that were used longest ago are removed first."""
MAX_FACTS_BYTES = 2**22
MAX_FILES = 10_000
PARTIAL_SECONDS = 24 * 3600
"""A partial file that is older was left by a process that was killed."""
ENTRY = ".npz"


class _Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an entry holds besides its gradients."""

    format: Literal["dmin_trace query"]
    version: Literal[1]
    key: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    files: Annotated[tuple[FileMark, ...], Meta(max_length=MAX_FILES)]


class GradientCache:
    """The entries in a folder: of this user's cache, if no other is given."""

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES) -> None:
        self.folder = user_cache_path("dmin_trace", appauthor=False) / "queries" if folder is None else folder
        self._max_bytes, self._max_entries = max_bytes, max_entries
        self._warned = False

    def find(self, key: str, shape: tuple[int, int]) -> NDArray[np.float32] | None:
        """The gradients under a key, (R, v); None if there are none of this shape, or a file has changed since."""
        path = self.folder / f"{key}{ENTRY}"
        if not os.path.lexists(path) or not self._is_safe():
            return None
        try:
            facts, gradients = _read(path, shape)
            if facts.key != key:
                raise ValueError(f"it is the entry {facts.key}")
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            logger.warning("%s cannot be used: %s. The query is captured again.", path, error)
            return None
        if (changed := next((mark.path for mark in facts.files if mark_of(Path(mark.path)) != mark), None)) is not None:
            logger.info("%s has changed since the query was captured, so it is captured again.", changed)
            return None
        try:
            # The times of its use decide what is removed.
            os.utime(path)
        except OSError as error:
            logger.debug("%s: %s", path, error)
        return gradients

    def keep(self, key: str, gradients: NDArray[np.float32], files: Sequence[FileMark]) -> None:
        """Keeps gradients (R, v) under a key, whole or not at all. What goes wrong is logged."""
        facts = _Facts("dmin_trace query", 1, key, tuple(files))
        # msgspec takes no names that are not Unicode.
        text = json.dumps(msgspec.to_builtins(facts)).encode("ascii")
        if len(files) > MAX_FILES or len(text) > MAX_FACTS_BYTES or gradients.nbytes > self._max_bytes // 2:
            logger.info("The query is not kept: it, or the list of the files that it depends on, is too large.")
            return
        path = self.folder / f"{key}{ENTRY}"
        partial = path.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_safe():
                return
            try:
                with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                    np.savez(file, gradients=gradients, facts=np.frombuffer(text, np.uint8))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._remove_old()
        except OSError as error:
            logger.warning("The query cannot be kept in %s: %s.", self.folder, error.strerror or error)

    def _is_safe(self) -> bool:
        """Whether the folder is this user's, and nobody else can write to it or read it; logs why not."""
        found, why = os.lstat(self.folder), ""
        if not stat.S_ISDIR(found.st_mode):
            why = "it is no folder, or a link to one"
        elif hasattr(os, "getuid") and found.st_uid != os.getuid():
            why = "it is another user's"
        elif hasattr(os, "getuid") and found.st_mode & 0o077:
            why = f"others may use it (chmod 700 {self.folder})"
        if why and not self._warned:
            self._warned = True
            logger.warning("Queries are not kept in %s: %s.", self.folder, why)
        return not why

    def _remove_old(self) -> None:
        """Removes entries until the rest is small enough. Another process may do so at the same time."""
        entries, now = list[tuple[float, int, str]](), time.time()
        with os.scandir(self.folder) as listed:
            for file in listed:
                try:
                    found = file.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if file.name.endswith(".partial") and found.st_mtime < now - PARTIAL_SECONDS:
                    Path(file.path).unlink(missing_ok=True)
                if file.name.endswith(ENTRY) and not stat.S_ISDIR(found.st_mode):
                    entries.append((found.st_mtime, found.st_size, file.path))
        entries.sort()
        total, count = sum(size for _, size, _ in entries), len(entries)
        for _, size, path in entries:
            if total <= self._max_bytes and count <= self._max_entries:
                return
            Path(path).unlink(missing_ok=True)
            total, count = total - size, count - 1


def _read(path: Path, shape: tuple[int, int]) -> tuple[_Facts, NDArray[np.float32]]:
    """What is in an entry. Raises ValueError, OSError or MsgspecError if it is no file of this user's, or its gradients
    have another shape."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no file, or a link to one")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise ValueError("it is another user's")

    def check(headers: Mapping[str, ArrayHeader]) -> None:
        gradients, facts = headers["gradients"], headers["facts"]
        if gradients.dtype != np.float32 or gradients.shape != shape:
            raise ValueError(f"its gradients are {gradients.dtype} {gradients.shape}, expected float32 {shape}")
        if facts.dtype != np.uint8 or len(facts.shape) != 1 or facts.size_bytes > MAX_FACTS_BYTES:
            raise ValueError(f"its facts are {facts.dtype} {facts.shape}")

    arrays = read_arrays(path, ("gradients", "facts"), check)
    facts = msgspec.convert(parse(arrays["facts"].tobytes()), _Facts, strict=True)
    if not np.isfinite(arrays["gradients"]).all():
        raise ValueError("its gradients hold numbers that are not finite")
    return facts, np.ascontiguousarray(arrays["gradients"])
