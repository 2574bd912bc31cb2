"""Runs the code on the pages of `docs/`, so that they cannot rot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def blocks_of(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.M | re.S)
    if not blocks:
        raise ValueError(f"{page} has no Python on it")
    return blocks


def run_page(page: str) -> dict[str, Any]:
    """Runs a page's blocks one after another, where the process stands; gives the names that they leave."""
    names: dict[str, Any] = {"__name__": "page"}
    for n, block in enumerate(blocks_of(page)):
        exec(compile(block, f"{page}, block {n}", "exec"), names)
    return names
