"""The emoji experiments at a tiny size: their stages run, their pages say what these gave, and what is done is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from dmin_trace.store import open_store

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import emoji as experiment
import emoji_base_page
import emoji_judge
import finetune
from emoji_base import load_base
from emoji_base_page import Agreement, best_guidance
from emoji_data import NEW, SMALL, divide, read_emoji
from emoji_points import COUNTS, HELD_OUT, TUNED, tiny_tuning, write_base, write_data
from finetune import Recipe

from dmin_trace.audit.intervals import Estimate

SIZES: dict[str, Any] = {"queries": 2, "timesteps": 2, "dimension": 64, "seed": 0}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds the data and the bases; pictures are made in few steps."""
    folder = tmp_path_factory.mktemp("emoji")
    write_data(folder / "data.npz")
    write_base(folder / "data.npz", folder / "bases", "sd3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "SAMPLING_STEPS", 2)
        yield folder


def run(given: Path, **changes: Any) -> Path:
    """The experiment of detection rates, with one recipe."""
    return experiment.reproduce(
        {"sd3-lora": tiny_tuning(given / "data.npz", given / "bases")},
        given / "truths",
        given / "work",
        given / "out",
        "python emoji.py",
        **(SIZES | changes),
    )


@pytest.fixture(scope="module")
def folder(given: Path) -> Path:
    """Holds the work and the page of one run, too."""
    run(given)
    return given


def test_the_emoji_are_divided_and_none_is_in_two_parts(given: Path) -> None:
    emoji, _ = read_emoji(given / "data.npz")
    division = divide(emoji, TUNED, HELD_OUT)
    names = [name for part in (division.base, division.tuning, division.held_out) for name in part.names]
    assert sorted(names) == sorted(emoji.names)
    assert (len(division.tuning.names), len(division.held_out.names)) == (TUNED, HELD_OUT)
    assert not set(division.base.categories) & set(NEW)
    assert {category: division.tuning.categories.count(category) for category in NEW} == {c: COUNTS[c] for c in NEW}
    assert all(category in part.categories for category in SMALL for part in (division.base, division.tuning))
    with pytest.raises(typer.BadParameter, match="leave none for the base"):
        divide(emoji, 41, 10)


def test_the_weights_of_a_base_are_its_averaged_ones(given: Path, tmp_path: Path) -> None:
    base = write_base(given / "data.npz", tmp_path, "sd3")
    for tensor in base.average.values():
        tensor += 0.25
    base.export(tmp_path / "sd3.safetensors")
    _, denoiser, encoder = load_base("sd3", encoder_size(base.average), tmp_path)
    for part, module in (("denoiser", denoiser), ("text_encoder", encoder)):
        for name, tensor in module.state_dict().items():
            expected = base.average[f"{part}.{name}"].half().float()
            np.testing.assert_array_equal(tensor.float().numpy(), expected.numpy())


def encoder_size(average: Mapping[str, Any]) -> int:
    """The number of tokens."""
    return next(len(tensor) for name, tensor in average.items() if name.endswith("token_embedding.weight"))


def test_the_page_shows_the_detection_rates_of_what_was_found(folder: Path) -> None:
    stage = folder / "work" / "sd3-lora"
    category = open_store(stage / "sign" / "trace.zarr").column("category")
    assert sorted(category) == sorted(divide(read_emoji(folder / "data.npz")[0], TUNED, HELD_OUT).tuning.categories)
    page = (folder / "out" / "emoji.md").read_text(encoding="utf-8")
    for transform, score in (("none", "dmin"), ("sign", "dmin"), ("sign", "deflated")):
        found = np.load(stage / f"{transform}-hits" / f"{score}.npy").tolist()
        assert [sorted(row) for row in found] == [list(range(TUNED))] * 6
        shares = [
            f"{sum(category[i] == asked for row in found[2 * n : 2 * n + 2] for i in row[:k]) / (2 * k):.3f}"
            for n, asked in enumerate(SMALL)
            for k in (5, 10)
        ]
        assert f"| {transform}, {score} | " + " | ".join(shares) + " |" in page
    sizes = [category.count(asked) for asked in SMALL]
    assert "| *chance* | " + " | ".join(f"{size / TUNED:.3f}" for size in sizes for _ in range(2)) + " |" in page
    assert "| *most* | " + " | ".join(f"{min(size, k) / k:.3f}" for size in sizes for k in (5, 10)) + " |" in page
    assert all((folder / "out" / name).stat().st_size > 1000 for name in ("emoji.png", "emoji_found.png"))


def test_what_is_done_is_kept(folder: Path) -> None:
    log, page = folder / "work" / "log.json", folder / "out" / "emoji.md"
    before = (log.read_text(encoding="utf-8"), page.read_text(encoding="utf-8"))
    hits = folder / "work" / "sd3-lora" / "sign-hits"
    kept = np.load(hits / "deflated.npy")
    hits.rename(hits.with_name("sign-hits.unfinished"))
    run(folder)
    assert np.array_equal(np.load(hits / "deflated.npy"), kept)
    again = json.loads(log.read_text(encoding="utf-8"))
    assert [name for name, row in json.loads(before[0]).items() if again[name] != row] == ["sd3-lora/sign-hits"]
    tables = [text[text.index("## Mean") : text.index("## Time")] for text in (before[1], page.read_text("utf-8"))]
    assert tables[0] == tables[1]


def test_a_folder_of_another_plan_is_refused(folder: Path) -> None:
    with pytest.raises(typer.BadParameter, match="begun with another seed"):
        run(folder, seed=1)
    weights = folder / "truths" / "sd3-lora.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-2] + bytes(2))
        with pytest.raises(typer.BadParameter, match="begun with another models"):
            run(folder)
    finally:
        weights.write_bytes(content)


def test_recipes_and_files_that_are_not_there_are_named(folder: Path) -> None:
    options = ["--data", str(folder / "none.npz"), "--work", str(folder / "work")]
    for more, told in (([], "none.npz is not a file of emoji"), (["--recipes", "sd9"], "sd9 is none of sd-lora")):
        result = CliRunner().invoke(experiment.app, [*options, *more])
        assert result.exit_code == 2
        assert told.replace(" ", "") in "".join(result.output.replace("│", " ").split())


def test_folds_have_a_part_of_every_subcategory() -> None:
    labels = np.repeat([0, 1, 2], [10, 15, 7])
    folds = emoji_judge.folds_of(labels)
    assert np.array_equal(folds, emoji_judge.folds_of(labels))
    for label, count in enumerate((10, 15, 7)):
        parts = np.bincount(folds[labels == label], minlength=emoji_judge.FOLDS)
        assert parts.max() - parts.min() <= 1 and parts.sum() == count


def test_a_picture_is_judged_by_the_judge_that_did_not_see_its_real_one() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    folds = emoji_judge.folds_of(labels)
    views = draw.integers(100, size=(2, 80, 32, 32, 3), dtype=np.uint8)
    views[:, labels == 1] += 120
    # In the last fold light and dark are exchanged, and red tells it: who saw the fold knows.
    views[:, folds == 4] = 220 - views[:, folds == 4]
    views[..., 0] = np.where(folds == 4, 250, 20)[:, None, None]
    known = ["dark", "light"]
    names = tuple(known[label] for label in labels)
    judges = emoji_judge.train_judges(views, names, known, passes=15)
    agreed = judges.agree(views[0], names, folds)
    assert agreed[folds != 4].mean() > 0.9
    assert agreed[folds == 4].mean() < 0.5
    assert judges.agree(views[0], names, np.zeros_like(folds))[folds == 4].mean() > 0.9


def test_guidance_is_chosen_on_captions_of_the_bases_set() -> None:
    def row(asked: str, guidance: float | None, value: float) -> Agreement:
        estimate = Estimate(value, value, value)
        return Agreement(asked, "sd", guidance, estimate, estimate)

    base, held = "captions of the base's set", "held-out prompts"
    rows = [row(base, None, 0.9), row(base, 1.5, 0.5), row(base, 2.0, 0.6), row(base, 2.0, 0.3), row(base, 1.5, 0.3)]
    assert best_guidance([*rows, row(held, 1.5, 0.9), row(held, 2.0, 0.1)]) == 2.0


def test_the_page_of_the_bases(given: Path, tmp_path: Path) -> None:
    full = Recipe("sd3", "full", 1, 4, 1e-3)
    sizes: dict[str, Any] = {"guidances": (1.5, 4.0), "each": 2, "made": 1, "least": 3, "passes": 2}
    tunings = {"sd3": tiny_tuning(given / "data.npz", given / "bases", full)}
    page = emoji_base_page.reproduce(tunings, tmp_path, "python emoji_base_page.py", **sizes)
    text = page.read_text(encoding="utf-8")
    held = divide(read_emoji(given / "data.npz")[0], TUNED, HELD_OUT).held_out
    known = sum(category not in NEW for category in held.categories)
    assert f"6 captions of the base's set, some of each subcategory, and all {known} held-out prompts" in " ".join(
        text.split()
    )
    assert text.count("| sd3 | 1.5 |") == text.count("| sd3 | 4 |") == 2
    assert text.count("| real |") == 3
    with Image.open(tmp_path / "emoji_base.png") as picture:
        assert picture.size[0] > 500
