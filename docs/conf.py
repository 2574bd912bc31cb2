"""How Sphinx builds the pages of this folder: `python -m sphinx -W docs build/docs`. Nothing is fetched."""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import numpy.typing
from sphinx.application import Sphinx

from dmin_trace import __version__

Number = TypeVar("Number")


class NDArray(Generic[Number]):
    """Stands for numpy's alias, which signatures would show in full: ndarray[tuple[Any, ...], dtype[int64]]."""


project = "dmin_trace"
author = "the dmin_trace authors"
project_copyright = "the dmin_trace authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "dmin_trace"
html_show_sphinx = False
html_copy_source = False
smartquotes_action = "D"  # Dashes only: the quotes of "sign" are typed as they are.

# Docstrings put names of Python in single backticks: they link to what is on api.md, and are set as code elsewhere.
default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"

# Types are in the signature, so arguments are a list of names, several to an entry where a docstring has them so.
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Fields", "params_style")]

FIELD = re.compile(r"[a-z_]\w*(, [a-z_]\w*)*: \S")


def head_fields(lines: list[str]) -> list[str]:
    """The docstring of a class with `Fields:` over each paragraph that is a list of fields, `name: text`.

    Docstrings here list the fields of a dataclass without a heading, which reStructuredText has no form for.
    """
    headed: list[str] = []
    inside = False
    for number, line in enumerate(lines):
        if number == 0 or not lines[number - 1].strip():
            inside = FIELD.match(line) is not None
            if inside:
                headed.append("Fields:")
        headed.append(f"    {line}" if inside and line.strip() else line)
    return headed


def mark_code(lines: list[str]) -> list[str]:
    """The docstring with `::` before each indented block that a blank line sets off from a text ending in a colon.

    Docstrings here show code in this way; without the second colon it would be a quotation.
    """
    marked = list(lines)
    for number, (line, blank, block) in enumerate(zip(lines, lines[1:], lines[2:], strict=False)):
        if line.endswith(":") and not line.endswith("::") and not blank.strip() and _indent(block) > _indent(line):
            marked[number] = f"{line}:"
    return marked


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _on_docstring(app: Sphinx, what: str, name: str, documented: object, options: Any, lines: list[str]) -> None:
    if what in ("class", "exception"):
        lines[:] = head_fields(lines)
    lines[:] = mark_code(lines)
    if what in ("property", "attribute", "data"):
        # After an empty comment, napoleon does not take the text before a colon for the type.
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    """Has docstrings prepared before napoleon reads them, which is connected with the priority 500."""
    numpy.typing.NDArray = NDArray  # Before autodoc imports a module that uses it.
    app.connect("autodoc-process-docstring", _on_docstring, priority=400)
