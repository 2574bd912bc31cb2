"""The pictures of a data set: the file of each, and the samples that repeat the picture of another.

A data set that reads a folder keeps a list of its files, or of the images that it opened. Some repeat that list:
`--repeats 100` makes a hundred samples of one picture. A picture is captured once, however often it is repeated.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dmin_trace.capture.dataset import hash_value

CHECKED_PICTURES = 4
"""Pictures whose first and last samples are compared before repeats are left out."""
CLASS_ENTRIES = "class_"
"""How the entries of DreamBooth's class pictures begin, which are read beside the pictures and differ in repeats."""


@dataclass
class Reading:
    """What was seen while a sample was read: the image files opened, and the texts drawn from lists, in order."""

    files: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


@contextmanager
def watch_reading() -> Iterator[Reading]:
    """Notes what PIL opens and what `choice` of `random` and of numpy draws. Nothing about the reading changes."""
    reading = Reading()

    def noted(read: Any, name: str) -> Any:
        def noted_read(*arguments: Any, **options: Any) -> Any:
            found = read(*arguments, **options)
            if name == "open" and arguments and isinstance(arguments[0], (str, os.PathLike)):
                reading.files.append(str(os.fspath(arguments[0])))
            elif name == "choice" and isinstance(found, str):
                reading.texts.append(str(found))
            return found

        return noted_read

    with ExitStack() as undo:
        for module, name in ((Image, "open"), (random, "choice"), (np.random, "choice")):
            undo.callback(setattr, module, name, own := getattr(module, name))
            setattr(module, name, noted(own, name))
        yield reading


class _Listed(NamedTuple):
    """An entry of a data set's list of pictures: what identifies the picture, and its file, "" if not known."""

    key: str | int
    file: str


class Pictures:
    """The pictures of a data set of N samples: N of them, or fewer after `leave_out_repeats`.

    indices: for each picture the data set index of its first sample.
    """

    def __init__(self, dataset: Any, image_column: str = "image") -> None:
        """`image_column` is the image's column in a `datasets.Dataset`; without it, the first column of images."""
        self._count = len(dataset)
        self.indices: Sequence[int] = range(self._count)
        self._path_of = _image_paths(dataset, image_column)
        self._listing = _find_listing(dataset, self._count) if self._path_of is None else []
        self._files = {listed.file for listed in self._listing}

    def __len__(self) -> int:
        return len(self.indices)

    def leave_out_repeats(self, read: Callable[[int], Any], declared: int = 1) -> None:
        """Keeps one sample of each picture.

        Samples repeat a picture if they are of one file and are read as the same item. `read` gives the item of a data
        set index, under the same seed each time. `declared`: how often the script's arguments say that it repeats each
        picture; then the samples of one file may differ in a crop or flip that was drawn before.
        """
        samples: dict[str | int, list[int]] = {}
        for index in range(self._count if self._listing else 0):
            samples.setdefault(self._listed(index).key, []).append(index)
        groups = list(samples.values())
        repeated = [group for group in groups if len(group) > 1]
        if not repeated:
            return
        as_declared = declared > 1 and all(len(group) == declared for group in groups)
        for k in {round(n * (len(repeated) - 1) / (CHECKED_PICTURES - 1)) for n in range(CHECKED_PICTURES)}:
            try:
                first, last = (_content(read(repeated[k][n]), images=not as_declared) for n in (0, -1))
            except Exception:
                # A sample that fails to load does not show whether it is repeated.
                return
            if first != last:
                return
        self.indices = sorted(group[0] for group in groups)

    def file(self, picture: int, opened: Sequence[str] = ()) -> str | None:
        """The file of a picture as the data set names it, if that is known; `opened` while its sample was read."""
        index = self.indices[picture]
        if self._path_of is not None:
            return self._path_of(index)
        listed = self._listed(index).file if self._listing else ""
        # If another file of the list is opened, the list is in another order than the samples.
        other = listed not in opened and any(file in self._files for file in opened)
        return (None if other else listed) or (opened[0] if opened else None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names of the listed files, in order, below their common folder; "" if they are not known."""
        if not self._listing or "" in self._files:
            return ""
        files = [Path(listed.file) for listed in self._listing]
        common = os.path.commonpath({file.parent for file in files})
        names = "\n".join(file.relative_to(common).as_posix() for file in files)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def _listed(self, index: int) -> _Listed:
        """The entry of a sample: a list that is shorter than the data set is repeated."""
        return self._listing[index % len(self._listing)]


def _find_listing(dataset: Any, count: int) -> list[_Listed]:
    """The first list of pictures among a data set's attributes: of files that exist, or of images that were opened."""
    for entries in vars(dataset).values() if hasattr(dataset, "__dict__") else ():
        if isinstance(entries, (list, tuple)) and 0 < len(entries) <= count:
            ends = _as_listed(entries[0]), _as_listed(entries[-1])
            if all(end is not None and (not end.file or _is_file(end.file)) for end in ends):
                listing = [listed for entry in entries if (listed := _as_listed(entry)) is not None]
                if len(listing) == len(entries):
                    return listing
    return []


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        # A caption, say, that is too long for a file's name.
        return False


def _as_listed(entry: Any) -> _Listed | None:
    """An entry of a list as one of pictures; None for something else. torchvision's folders list files with classes."""
    if isinstance(entry, Image.Image):
        file = str(getattr(entry, "filename", ""))
        return _Listed(file or id(entry), file)
    first = entry[0] if isinstance(entry, tuple) and entry else entry
    if isinstance(first, (str, os.PathLike)) and (file := str(os.fspath(first))):
        return _Listed(file, file)
    return None


def _image_paths(dataset: Any, image_column: str) -> Callable[[int], str | None] | None:
    """What gives the path of a row's image in a `datasets.Dataset`, without decoding it; None for other data sets."""
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "features"):
        return None
    images = [name for name, feature in dataset.features.items() if type(feature).__name__ in ("Image", "Video")]
    if not images:
        return lambda index: None
    name = image_column if image_column in images else images[0]
    rows = dataset.with_format("arrow").select_columns([name])

    def path_of(index: int) -> str | None:
        try:
            path = rows[index].column(0)[0]["path"].as_py()
        except (KeyError, TypeError, ValueError):
            # An image that is missing, or kept without a path.
            return None
        return None if path is None else str(path)

    return path_of


def _content(item: Any, *, images: bool) -> str:
    """A digest of an item without its class pictures; without `images` only of its texts and its whole numbers."""
    named = (
        item.items() if isinstance(item, Mapping) else enumerate(item if isinstance(item, (tuple, list)) else [item])
    )
    digest = hashlib.sha256()
    for name, value in named:
        is_class = isinstance(name, str) and name.startswith(CLASS_ENTRIES)
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not is_class and (
            images or isinstance(value, (str, int)) or isinstance(value, torch.Tensor) and not floating
        ):
            digest.update(str(name).encode("utf-8", "replace"))
            hash_value(digest.update, value)
    return digest.hexdigest()
