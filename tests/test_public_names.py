"""The face of the package is a list, and this keeps it."""

from __future__ import annotations

from pathlib import Path

import dmin_trace

FACE = [
    "Audit",
    "DminTraceError",
    "Hit",
    "Queries",
    "Settings",
    "TopK",
    "Totals",
    "Trace",
    "__version__",
    "attach",
    "attribute",
    "audit_trace",
    "open_trace",
    "recording",
]


def test_the_face_is_this_list() -> None:
    assert dmin_trace.__all__ == FACE == dir(dmin_trace)
    for name in FACE:
        assert getattr(dmin_trace, name) is not None


def test_no_public_name_is_a_modules_name() -> None:
    modules = {path.stem for path in Path(dmin_trace.__file__).parent.glob("*.py")}
    assert modules.isdisjoint(FACE)


def test_every_public_name_is_documented() -> None:
    for name in FACE:
        if not name.startswith("__"):
            assert getattr(dmin_trace, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(dmin_trace, "trace")


def test_the_changelog_tells_of_this_version() -> None:
    changelog = Path(__file__).parent.parent / "CHANGELOG.md"
    assert f"## {dmin_trace.__version__}" in changelog.read_text()
