"""A page of results: what was asked, the tables, and how it was made."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def command_line(program: str) -> str:
    """What was called, without the folders of this machine."""
    arguments = [Path(argument).name if argument.startswith("/") else argument for argument in sys.argv[1:]]
    return shlex.join(["python", f"tools/reproduce/{program}", *arguments])


class Page:
    """Markdown that grows; tables are shown on the terminal as well."""

    def __init__(self, title: str, command: str, seconds: float, about: str) -> None:
        """Begins with the title, the command that made it, the commit, the time it took, and what it is about."""
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
        at = (commit.stdout.strip() or "unknown") + (" with changes" if dirty.stdout.strip() else "")
        self._parts = [f"# {title}", f"```\n{command}\n```"]
        self.text(
            f"Commit {at}; {seconds / 60:.0f} minutes, without what was kept from an earlier run, on a shared "
            f"{platform.machine()} machine with 2 cores. Written by the program; the numbers are as they came out."
        )
        self.text(about)

    def text(self, words: str) -> None:
        """A paragraph."""
        self._parts.append(textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False))

    def heading(self, words: str) -> None:
        """A section begins."""
        self._parts.append(f"## {words}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of words and figures."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._parts.append(
            "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        )
        shown = Table(*columns)
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)

    def picture(self, path: Path, words: str) -> None:
        """A picture that lies beside the page."""
        self._parts.append(f"![{words}]({path.name})")

    def write(self, path: Path) -> None:
        """Puts the page in its place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")
