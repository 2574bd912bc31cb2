"""Runs the code on the pages of `docs/`, so that the pages stay right."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(python|pycon|console)\n(.*?)^```$", flags=re.M | re.S)


def blocks_of(text: str) -> list[tuple[str, str]]:
    """The code blocks of a page's text, in order: `python`, `pycon` (a session with its output) or `console`."""
    return BLOCK.findall(text)


def run_page(page: str) -> dict[str, Any]:
    """Runs a page's blocks one after another in the current folder; gives the names that they leave.

    In the output of a session, `...` stands for any text. A `python` block that begins with the name of a file, as in
    `# train.py`, is written to the file. A line `$ python ...` of a `console` block runs a script.

    Raises AssertionError for output that is not as the page has it, CalledProcessError for a script that fails, and
    what a `python` block raises.
    """
    blocks = blocks_of((DOCS / page).read_text())
    if not blocks:
        raise ValueError(f"{page} has no code blocks")
    names: dict[str, Any] = {"__name__": "page"}
    for n, (kind, block) in enumerate(blocks):
        if kind == "console":
            for command in re.findall(r"^\$ python (.*)$", block, flags=re.M):
                subprocess.run([sys.executable, *command.split()], check=True)
        elif kind == "python" and (file := re.match(r"# (\w+\.py)$", block, flags=re.M)):
            Path(file[1]).write_text(block)
        elif kind == "python":
            exec(compile(block, f"{page}, block {n}", "exec"), names)
        else:
            _run_session(block, f"{page}, block {n}", names)
    return names


def _run_session(block: str, name: str, names: dict[str, Any]) -> None:
    session = doctest.DocTestParser().get_doctest(block, names, name, name, 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(session, out=report.append, clear_globs=False)
    if report:
        raise AssertionError("".join(report))
    names.update(session.globs)
