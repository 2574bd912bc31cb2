"""Notes the files that a process reads, so that an answer can be kept for as long as they stay as they are."""

import os
import sys
from pathlib import Path
from typing import Any

WRITING_FLAGS = os.O_WRONLY | os.O_RDWR
COMPILED = ".pyc"


class ReadFiles:
    """The files that this process opens for reading from now on, by their full names. Python cannot take this back.

    A file that compiled code opens, such as a safetensors file, is not seen.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._ended = False
        sys.addaudithook(self._see)

    def names(self) -> list[str]:
        """The files that were opened, and those of all modules that were imported, in the order of their names.

        No more are noted afterwards.
        """
        self._ended = True
        modules = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        return sorted(self._names | {str(Path(file).absolute()) for file in modules if isinstance(file, str)})

    def _see(self, event: str, given: tuple[Any, ...]) -> None:
        if event != "open" or self._ended or not isinstance(given[0], (str, bytes, os.PathLike)):
            return
        if isinstance(given[2], int) and given[2] & WRITING_FLAGS:
            return
        name = os.fsdecode(given[0])
        # Of a module its source counts, which python may find compiled.
        if not name.endswith(COMPILED):
            self._names.add(str(Path(name).absolute()))
