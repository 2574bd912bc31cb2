"""Imports point one way. This list is the architecture: a room may import the rooms named beside it, and no other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    room: set(needs.split())
    for room, needs in {
        "errors": "",
        "version": "",
        "untrusted": "",
        "settings": "errors",
        "commands": "errors",
        "variables": "",
        "weights": "errors",
        "gradients": "",
        "columns": "errors",
        "batches": "",
        "randomness": "errors settings",
        "frozen": "randomness",
        "_rows": "",
        "compress": "_rows errors settings",
        "header": "errors settings",
        "store": "errors header settings untrusted version",
        "lock": "errors",
        "signals": "",
        "identity": "",
        "body": "randomness",
        "loop": "body errors randomness variables",
        "recorder": "batches body columns compress errors gradients header identity lock randomness "
        " settings signals store verify weights",
        "integrations.diffusers": "",
        "integrations.lightning": "columns errors frozen plain report score settings store variables",
        "score": "errors store",
        "kernel": "errors store",
        "hnsw": "",
        "index": "errors hnsw kernel score store untrusted",
        "verify": "errors header index store untrusted weights",
        "report": "errors score verify",
        "evaluate": "errors",
        "pack": "commands compress errors header settings store",
        "questions": "errors untrusted",
        "capture": "body columns commands errors frozen gradients header identity integrations loop randomness "
        "recorder settings store weights",
        "plain": "body columns errors gradients query randomness recorder report score settings store weights",
        "estimate": "capture store",
        "launch": "capture commands errors loop",
        "query": "commands errors identity index integrations kernel questions report score store",
        "examine": "errors evaluate query score store",
        "demo": "errors query report store",
        "cli": "commands demo errors estimate examine index launch pack query questions report score settings store "
        "verify version",
        "__init__": "capture errors plain query report settings store version",
    }.items()
}

WITHOUT_TORCH = (
    "__init__",
    "cli",
    "commands",
    "errors",
    "evaluate",
    "examine",
    "hnsw",
    "index",
    "kernel",
    "pack",
    "query",
    "questions",
    "report",
    "score",
    "settings",
    "store",
    "untrusted",
    "verify",
    "version",
)


def sources() -> dict[str, Path]:
    """Every module of the package by its name within it."""
    # What is compiled is there as a stub.
    rooms = {path.stem: path for path in (ROOT / "dmin_trace").glob("*.py*") if path.suffix in (".py", ".pyi")}
    hosts = {f"integrations.{p.stem}": p for p in (ROOT / "integrations").glob("*.py") if p.stem != "__init__"}
    return rooms | hosts


def imported(path: Path) -> set[str]:
    """The rooms that a module imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module or ""]
            if node.module == "dmin_trace":
                names = [f"dmin_trace.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("dmin_trace.")}
    return rooms


def test_every_room_has_its_place() -> None:
    assert set(sources()) == set(ALLOWED)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    assert imported(sources()[room]) <= ALLOWED[room]


def test_there_is_no_circle() -> None:
    below: set[str] = set()
    waiting = dict(ALLOWED)
    while waiting:
        ready = {room for room, needs in waiting.items() if {n for n in needs if n != "integrations"} <= below}
        assert ready, f"these import each other: {sorted(waiting)}"
        below |= ready
        waiting = {room: needs for room, needs in waiting.items() if room not in ready}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_the_command_line_starts_without_torch(room: str) -> None:
    name = "dmin_trace" if room == "__init__" else f"dmin_trace.{room}"
    code = f"import {name}, sys; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from dmin_trace.cli import main; code = main(['--help']); "
        "sys.exit(code or 'torch' in sys.modules or 'zarr' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ran.returncode, "query" in ran.stdout) == (0, True)


def test_only_an_index_needs_hnswlib() -> None:
    code = "import sys, dmin_trace.cli, dmin_trace.query, dmin_trace.index; sys.exit('hnswlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_examples_and_tools_are_imported_by_nobody() -> None:
    for path in sources().values():
        assert imported(path).isdisjoint({"examples", "tools"}), path
