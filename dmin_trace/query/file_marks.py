"""Whether the files that a query depends on are as they were: their sizes, times and inodes are compared.

Reading every model again would take as long as the query. A file that is written anew has other times, and another
inode if it was put in the place of the old one. Only a program that sets the clock can write it and keep the time of
its last change.
"""

import os
import stat
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

PACKAGE_FOLDERS = ("site-packages", "dist-packages")
DEVICES = ("/proc", "/sys", "/dev")
READ_UNSEEN = ("*.safetensors", "*.model", "tokenizer.json")
"""Files that compiled code opens, in the folders of those that python opens."""


class FileMark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A file as it is: its full name, its size in bytes, when its content and when its inode changed, in nanoseconds,
    and the inode's number."""

    path: Annotated[str, Meta(max_length=2**12)]
    size: int
    modified: int
    changed: int
    inode: int


def mark_of(path: Path) -> FileMark | None:
    """The mark of a file, of what a link leads to; None if it is no regular file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    # What Windows gives in place of the change is when the file was made.
    return FileMark(str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def weight_marks(path: Path) -> list[FileMark]:
    """The marks of all weight files that a path to weights may stand for: the file, or those in the folder."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]
    return _marks(files)


def run_marks(
    read: Iterable[str], arguments: Sequence[str], work: Path, own: Path, others: Iterable[Path]
) -> list[FileMark]:
    """The marks of the files that a run of a script depends on.

    Args:
        read: the files that it was seen to open, and those of its modules.
        arguments: its command line, which may name files and folders with weights.
        work, own: the copy of its working directory, full of links, that it ran in, and that directory.
        others: folders whose files are left out: that which is removed after the query, with that copy and with the
            images; and the trace.

    Files of installed packages are left out: their versions count. So are devices.
    """
    values = [argument.partition("=")[2] if argument.startswith("--") else argument for argument in arguments]
    named = [own / value for value in values if value and _is_there(own / value)]
    left_out = tuple(f"{folder}{os.sep}" for folder in (*_package_folders(), *DEVICES, *others))
    paths = {_in_own_folder(Path(path), work, own) for path in read} | set(named)
    paths = {path for path in paths if not str(path).startswith(left_out)}
    folders = {path if path.is_dir() else path.parent for path in paths}
    return _marks(paths | {file for folder in folders for pattern in READ_UNSEEN for file in folder.glob(pattern)})


def package_versions() -> list[str]:
    """The installed packages with their versions, as the folders that describe them are named."""
    folders = (Path(folder) for folder in _package_folders())
    names = (file.name for folder in folders if folder.is_dir() for file in folder.iterdir())
    return sorted(name for name in names if name.endswith((".dist-info", ".egg-info")))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _marks(files: Iterable[Path]) -> list[FileMark]:
    return [mark for file in sorted(files) if (mark := mark_of(file)) is not None]


def _package_folders() -> set[str]:
    """The folders of installed packages and of python's own modules, also by the names that links have for them."""
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found = own | {path for path in sys.path if Path(path).name in PACKAGE_FOLDERS}
    return found | {str(Path(path).resolve()) for path in found}


def _in_own_folder(path: Path, work: Path, own: Path) -> Path:
    """A path in the copy of the working directory, as it is in that directory."""
    return own / path.relative_to(work) if path.is_relative_to(work) else path
