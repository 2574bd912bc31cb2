"""The example notebook runs, and its outputs are kept as they come."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "digits.ipynb"

# Jupyter deprecates things of its own from one version to the next.
pytestmark = pytest.mark.filterwarnings("ignore")


def kinds(notebook: Any) -> list[list[str]]:
    """Of each cell with code, what its outputs are: text, or what a notebook can show."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted(kind for one in of for kind in (one.get("data") or {one.output_type: ""})) for of in outputs]


def pages(notebook: Any) -> list[str]:
    """What the outputs show as HTML."""
    outputs = [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]
    return [one.data["text/html"] for one in outputs if "text/html" in one.get("data", {})]


def test_the_notebook_runs_and_its_outputs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kept = nbformat.read(NOTEBOOK, as_version=4)
    ran = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(ran, timeout=600, kernel_name="python3").execute()
    assert kinds(ran) == kinds(kept)
    shown = pages(kept)
    assert len(shown) == 6 and len(pages(ran)) == 6
    for page in shown[:5]:
        assert 'class="dt note"' in page and "<script" not in page
    # The trace, the answer and a hit have pictures, and these are the same whatever the training gives.
    pictures = [re.findall(r"data:image/webp;base64,[\w+/=]+", page) for page in pages(ran)[:3]]
    assert [len(found) for found in pictures] == [8, 2 + 2 * 8, 1]
    assert pictures[0] == re.findall(r"data:image/webp;base64,[\w+/=]+", shown[0])
    assert NOTEBOOK.stat().st_size < 200_000
