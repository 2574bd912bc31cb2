"""The emoji experiment at a tiny size: its stages run, its page says what they gave, and what is done is kept."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from dmin_trace.store import open_store

pytest.importorskip("matplotlib", reason="the page has a plot; the extra bench has what draws it")

TOOLS = Path(__file__).parents[2] / "tools" / "reproduce"
CATEGORIES = ("heart", "time", "transport-ground", "flag")
EACH = 4
OPTIONS = (
    *("--kinds", "sd3", "--ways", "lora", "--transforms", "sign", "--others", "2", "--queries", "2"),
    *("--base-steps", "1", "1", "--tune-steps", "1", "1", "--sampling-steps", "1"),
    *("--timesteps", "2", "--dimension", "64"),
)


@pytest.fixture(scope="module")
def emoji() -> Any:
    """The program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield importlib.import_module("emoji")
    for name in ("emoji", "emoji_models", "emoji_page"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(emoji: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data, the work and the page of one run."""
    folder = tmp_path_factory.mktemp("emoji")
    categories = [category for category in CATEGORIES for _ in range(EACH)]
    images = np.random.default_rng(0).integers(256, size=(len(categories), 32, 32, 3), dtype=np.uint8)
    names = [f"{category} number {k}" for k, category in enumerate(categories)]
    np.savez(folder / "data.npz", images=images, names=names, subcategories=categories)
    result = run(emoji, folder)
    assert result.exit_code == 0, result.output
    return folder


def run(emoji: Any, folder: Path, *more: str) -> Result:
    """The command, with the options given last counting."""
    arguments = ["--data", folder / "data.npz", "--work", folder / "work", "--out", folder / "out", *OPTIONS, *more]
    return CliRunner().invoke(emoji.app, [str(argument) for argument in arguments])


def test_the_page_shows_the_detection_rates_of_what_was_found(folder: Path) -> None:
    stage = folder / "work" / "sd3"
    category = open_store(stage / "lora-sign" / "trace.zarr").column("category")
    assert sorted(category) == sorted([*CATEGORIES[:3] * EACH, "flag", "flag"])
    page = (folder / "out" / "emoji.md").read_text(encoding="utf-8")
    for score in ("dmin", "deflated"):
        found = np.load(stage / "lora-sign-hits" / f"{score}.npy").tolist()
        assert [sorted(row) for row in found] == [list(range(len(category)))] * 6
        shares = [
            f"{sum(category[i] == asked for row in found[2 * n : 2 * n + 2] for i in row[:k]) / (2 * k):.3f}"
            for n, asked in enumerate(CATEGORIES[:3])
            for k in (5, 10)
        ]
        assert f"| LoRA | sign, {score} | " + " | ".join(shares) + " |" in page
    assert "|  | *chance* | " + " | ".join(["0.286"] * 6) + " |" in page
    assert "|  | *most* | " + " | ".join(["0.800", "0.400"] * 3) + " |" in page
    assert all((folder / "out" / name).stat().st_size > 1000 for name in ("emoji.png", "emoji_found.png"))


def test_what_is_done_is_kept(emoji: Any, folder: Path) -> None:
    log, page = folder / "work" / "log.json", folder / "out" / "emoji.md"
    before = (log.read_text(encoding="utf-8"), page.read_text(encoding="utf-8"))
    hits = folder / "work" / "sd3" / "lora-sign-hits"
    kept = np.load(hits / "deflated.npy")
    hits.rename(hits.with_name("lora-sign-hits.unfinished"))
    result = run(emoji, folder)
    assert result.exit_code == 0, result.output
    assert np.array_equal(np.load(hits / "deflated.npy"), kept)
    again = json.loads(log.read_text(encoding="utf-8"))
    assert [name for name, row in json.loads(before[0]).items() if again[name] != row] == ["sd3/lora-sign-hits"]
    tables = [text[text.index("## Mean") : text.index("## Time")] for text in (before[1], page.read_text("utf-8"))]
    assert tables[0] == tables[1]


def test_a_folder_of_another_plan_is_refused(emoji: Any, folder: Path) -> None:
    result = run(emoji, folder, "--seed", "1")
    assert result.exit_code == 2
    assert "begun with another seed" in " ".join(result.output.replace("│", " ").split())
