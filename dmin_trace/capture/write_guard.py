"""Keeps the run of a script on queries from changing files that were there before it.

A script may save checkpoints by its own counts, to a place that none of its known arguments names. What it makes anew
is its own to write; an older file is neither opened for writing, renamed nor removed, outside the caches of libraries.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dmin_trace.errors import ScriptError

WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND
CACHE_VARIABLES = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME", "TRITON_CACHE_DIR")
CLOCK_SECONDS = 1.0
CACHE_FOLDERS = ("~/.cache", "~/.triton", "~/.nv", "~/.config")


def protect_older_files(*free: Path) -> None:
    """From now on, writing to a file that is older than this call, by a second, raises ScriptError in this process.

    Files in the folders `free` and in caches, and locks, may be written. Python cannot take this back.
    """
    caches = [os.environ[name] for name in CACHE_VARIABLES if os.environ.get(name)]
    folders = [*map(Path, (*caches, *CACHE_FOLDERS)), *free]
    roots = tuple(f"{folder.expanduser().resolve()}{os.sep}" for folder in folders)
    # The clock of a file system may be behind.
    started = time.time() - CLOCK_SECONDS

    def check(path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            # An open file, or a number of one.
            return
        found = Path(os.fsdecode(path)).resolve()
        inside = str(found).startswith(roots) or "__pycache__" in found.parts or found.suffix == ".lock"
        if inside or not (found.is_file() or found.is_dir()) or found.stat().st_ctime >= started:
            return
        raise ScriptError(
            f"On a query the script would change {found}, which was there before. Give it another place to write to, "
            "by the argument that names it, after the images: dmin-trace query TRACE IMAGE -- SCRIPT ARGS."
        )

    def see(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(given[2], int) and given[2] & WRITING_FLAGS:
                check(given[0])
        elif event in ("os.remove", "os.truncate", "shutil.rmtree"):
            check(given[0])
        elif event == "os.rename":
            check(given[0])
            check(given[1])

    sys.addaudithook(see)
    # These write without python's open.
    for module, name, argument in ((torch, "save", "f"), (safetensors.torch, "serialize_file", "filename")):
        setattr(module, name, _checked(getattr(module, name), 1, argument, check))


def _checked(write: Callable[..., Any], place: int, name: str, check: Callable[[Any], None]) -> Callable[..., Any]:
    """A function that checks the path among its arguments before it writes."""

    @wraps(write)
    def checked(*given: Any, **named: Any) -> Any:
        check(given[place] if len(given) > place else named.get(name))
        return write(*given, **named)

    return checked
