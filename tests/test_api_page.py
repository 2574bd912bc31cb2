"""The API reference has each public name with an example, its examples run, and docstrings are read as meant."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pages import DOCS, blocks_of, run_page

import dmin_trace


def sections() -> dict[str, str]:
    """What the page has on each name: the text from its directive to the next one."""
    parts = re.split(r"^\.\. (?:auto|py:)\w+:: dmin_trace\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def has_example(name: str, section: str) -> bool:
    """Whether a code block of the section has the name in its code or in its output."""
    return any(re.search(rf"\b{name}\b", code) for _, code in blocks_of(section))


def test_the_page_describes_each_public_name() -> None:
    assert sorted(sections()) == sorted(dmin_trace.__all__)


def test_each_public_name_has_an_example() -> None:
    assert [name for name, text in sections().items() if not has_example(name, text)] == []


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the page imports its script
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    try:
        run_page("api.md")
    finally:
        sys.modules.pop("train", None)


def test_a_script_that_fails_fails_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pages.DOCS", tmp_path)
    script, command = (
        "```python\n# stop.py\nimport sys\nsys.exit(int(sys.argv[1]))\n```",
        "```console\n$ python stop.py {}\n```",
    )
    (tmp_path / "page.md").write_text("\n".join([script, command.format(0)]))
    run_page("page.md")
    (tmp_path / "page.md").write_text("\n".join([script, command.format(3)]))
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        run_page("page.md")


def test_an_output_that_is_not_as_the_page_has_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = ["```python\nx = 2\n```", "```pycon\n>>> y = x + 1\n>>> y\n{}\n```", "```python\nassert y == 3\n```"]
    page = tmp_path / "page.md"
    monkeypatch.setattr("pages.DOCS", tmp_path)
    page.write_text("\n".join(blocks).format(3))
    run_page("page.md")
    page.write_text("\n".join(blocks).format(4))
    with pytest.raises(AssertionError, match="Expected:\n    4\nGot:\n    3"):
        run_page("page.md")


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    """The module with Sphinx's settings."""
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fields_of_a_class_become_a_section(conf: ModuleType) -> None:
    lines = ["A point.", "", "x, y: where it is,", "    in pixels.", "z: how deep.", "", "Raises: never."]
    assert conf.head_fields(lines) == [
        "A point.",
        "",
        "Fields:",
        "    x, y: where it is,",
        "        in pixels.",
        "    z: how deep.",
        "",
        "Raises: never.",
    ]
    assert "Fields:" in conf.head_fields((inspect.getdoc(dmin_trace.Settings) or "").splitlines())


def test_an_indented_block_after_a_colon_becomes_code(conf: ModuleType) -> None:
    lines = [
        "Use it so:",
        "",
        "    with it:",
        "        run()",
        "",
        "Args:",
        "    x: a number:",
        "",
        "Then:",
        "",
        "it ends.",
    ]
    assert conf.mark_code(lines) == ["Use it so::", *lines[1:]]
