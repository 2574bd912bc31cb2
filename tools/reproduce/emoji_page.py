"""The page of `emoji.py`: `emoji.md`, a plot of its figures, and a picture of what was found."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")

from matplotlib import pyplot

TILE = 44
SHOWN = 6
"""Samples found that the picture shows for each query and score."""
WAYS = {"lora": "LoRA", "full": "full"}


@dataclass(frozen=True)
class Rates:
    """Detection rates of one way to find samples.

    model: the recipe of fine-tuning.
    score: the transform and the score, or "pixels" for likeness of the pictures alone.
    rate: by category and k, the mean over its queries.
    error: by k, the standard error of the mean over categories, from the spread of each category's queries.
    """

    model: str
    score: str
    rate: dict[str, dict[int, float]]
    error: dict[int, float]

    def mean(self, k: int) -> float:
        """Over categories."""
        return fmean(rates[k] for rates in self.rate.values())


@dataclass(frozen=True)
class Swapped:
    """Of pictures asked about with the prompt of another category: how much of each is in the top ten."""

    model: str
    score: str
    picture: float
    prompt: float


@dataclass(frozen=True)
class Example:
    """A query and the training samples found for it, by score, best first: (32, 32, 3) uint8 each."""

    title: str
    query: np.ndarray
    found: dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Report:
    """What the page says.

    kinds, ways: of each model: what it is, and how it was fine-tuned.
    sizes: of the small categories in the fine-tuning set, of `samples` in all.
    trained: of each model, the number of parameters that were trained.
    seconds: by group of stages, of the wall and of the processor.
    commits: at which the stages ran.
    """

    command: str
    commits: Sequence[str]
    machine: str
    setup: Sequence[str]
    kinds: Mapping[str, str]
    ways: Mapping[str, str]
    sizes: Mapping[str, int]
    samples: int
    trained: Mapping[str, int]
    rates: Sequence[Rates]
    swapped: Sequence[Swapped]
    seconds: Mapping[str, tuple[float, float]]
    examples: Sequence[Example]


def write_page(report: Report, folder: Path) -> Path:
    """Writes emoji.md, emoji.png and emoji_found.png; gives the first."""
    folder.mkdir(parents=True, exist_ok=True)
    _plot(report, folder / "emoji.png")
    found_picture(report.examples).save(folder / "emoji_found.png", optimize=True)
    path = folder / "emoji.md"
    path.write_text("\n".join(_lines(report)) + "\n", encoding="utf-8")
    return path


def _prose(text: str, bullet: str = "") -> str:
    return textwrap.fill(
        text,
        120,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _lines(report: Report) -> list[str]:
    ks = list(report.rates[0].error)
    wall, cpu = (sum(taken[k] for taken in report.seconds.values()) for k in (0, 1))
    sizes = ", ".join(f"{category} {size}" for category, size in report.sizes.items())
    lines = [
        "# Small categories of emoji: detection rates",
        "",
        "Written by `tools/reproduce/emoji.py`; the numbers are as they came out.",
        "",
        "```",
        report.command,
        "```",
        "",
        _prose(
            f"Commit {', '.join(report.commits)}. {wall / 60:.0f} minutes, {cpu / 60:.0f} of the processor, on "
            f"{report.machine}."
        ),
        "",
        "## The question",
        "",
        _prose(
            "As in the paper's Table 2: a text-to-image model is fine-tuned on captioned pictures of several kinds, "
            "pictures are made from prompts of each small category, and the detection rate at k is the share of the k "
            "training samples with the largest influence that are of the query's category."
        ),
        "",
        *(_prose(line, "- ") for line in report.setup),
        _prose(
            f"Small categories, of the {report.samples} samples of the fine-tuning set: {sizes}. *Chance* is what "
            "samples found at random would give, *most* what a perfect answer would: a category smaller than k cannot "
            "fill k places.",
            "- ",
        ),
        _prose(
            "*pixels* is no attribution: training samples by the cosine of their pixels with the query's, each less "
            "the mean picture. It says what likeness of the pictures alone finds.",
            "- ",
        ),
        _prose(
            "`none, dmin` is the paper's score, `sign, deflated` the default. `sign` takes the sign of each element of "
            "a gradient before it is compressed; `dmin` adds up inner products, `deflated` frees the query first of "
            "what all samples share.",
            "- ",
        ),
        "",
        *_table(
            ("model", "type", "fine-tuning", "parameters trained, L"),
            [
                (model, report.kinds[model], WAYS[report.ways[model]], f"{count:,}")
                for model, count in report.trained.items()
            ],
        ),
        "",
        "## Mean over the three categories",
        "",
        "With the standard error over queries; it says nothing of other trainings, of which there was one each.",
        "",
        *_table(
            ("model", "found by", *(f"top {k}" for k in ks)),
            [
                *(
                    (row.model, row.score, *(f"{row.mean(k):.3f} ± {row.error[k]:.3f}" for k in ks))
                    for row in report.rates
                ),
                ("", "*chance*", *[f"{fmean(_chance(report, c) for c in report.sizes):.3f}"] * len(ks)),
                ("", "*most*", *(f"{fmean(_most(report, c, k) for c in report.sizes):.3f}" for k in ks)),
            ],
        ),
        "",
        "![Detection rates by category](emoji.png)",
    ]
    for model in report.kinds:
        lines += ["", f"## By category: {model}", ""]
        lines += _table(
            ("found by", *(f"{c}, top {k}" if k == ks[0] else str(k) for c in report.sizes for k in ks)),
            [
                *(
                    (row.score, *(f"{row.rate[c][k]:.3f}" for c in report.sizes for k in ks))
                    for row in report.rates
                    if row.model == model
                ),
                ("*chance*", *(f"{_chance(report, c):.3f}" for c in report.sizes for _ in ks)),
                ("*most*", *(f"{_most(report, c, k):.3f}" for c in report.sizes for k in ks)),
            ],
        )
    lines += [
        "",
        "## Picture or prompt?",
        "",
        _prose(
            "The same pictures, each with a prompt of the next category: how much of the top ten is of the picture's "
            "category, and how much of the prompt's."
        ),
        "",
        *_table(
            ("model", "found by", "picture's category", "prompt's category"),
            [(r.model, r.score, f"{r.picture:.3f}", f"{r.prompt:.3f}") for r in report.swapped],
        ),
        "",
        "## What was found",
        "",
        f"The first picture of each category, and the {SHOWN} samples with the largest influence by each score.",
        "",
        "![Generated emoji and the training samples found](emoji_found.png)",
        "",
        "## Time",
        "",
        *_table(
            ("stage", "seconds", "of the processor"),
            [(stage, f"{taken[0]:.0f}", f"{taken[1]:.0f}") for stage, taken in report.seconds.items()],
        ),
    ]
    return lines


def _chance(report: Report, category: str) -> float:
    return report.sizes[category] / report.samples


def _most(report: Report, category: str, k: int) -> float:
    return min(1.0, report.sizes[category] / k)


def _plot(report: Report, path: Path) -> None:
    ks = list(report.rates[0].error)
    models = list(report.kinds)
    figure, grid = pyplot.subplots(
        len(models), len(report.sizes), figsize=(10, 2.3 * len(models) + 0.6), sharex=True, sharey=True, squeeze=False
    )
    for model, line in zip(models, grid, strict=True):
        for category, axes in zip(report.sizes, line, strict=True):
            for row in report.rates:
                if row.model == model:
                    style = "--" if row.score == "pixels" else "-"
                    axes.plot(range(len(ks)), [row.rate[category][k] for k in ks], f"o{style}", label=row.score, ms=4)
            axes.plot(range(len(ks)), [_most(report, category, k) for k in ks], color="silver", label="most")
            axes.axhline(_chance(report, category), color="black", ls=":", lw=1, label="chance")
            axes.set_title(f"{model}: {category}", fontsize=9)
            axes.set_ylim(0, 1.05)
            axes.set_xticks(range(len(ks)), [str(k) for k in ks])
        line[0].set_ylabel("detection rate", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("top k", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=-(-len(labels) // 2), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (2.3 * len(models) + 0.6)))
    # No date and no version within: the same figures give the same file.
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def found_picture(examples: Sequence[Example]) -> Image.Image:
    """A row for each query: its picture, then what each score found."""
    gap, left, top = 4, 190, 26
    scores = list(examples[0].found)
    block = SHOWN * (TILE + gap) + 3 * gap
    size = (left + TILE + 3 * gap + len(scores) * block, top + len(examples) * (TILE + gap) + gap)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    draw.text((left, 6), "query", fill="black", font=font)
    starts = {score: left + TILE + 4 * gap + n * block for n, score in enumerate(scores)}
    for score, start in starts.items():
        draw.text((start, 6), f"found: {score}", fill="black", font=font)
    for n, example in enumerate(examples):
        y = top + n * (TILE + gap)
        draw.text((6, y + TILE // 2 - 8), example.title, fill="black", font=font)
        tiles = [(left, example.query)]
        for score, found in example.found.items():
            tiles += [(starts[score] + m * (TILE + gap), pixels) for m, pixels in enumerate(found[:SHOWN])]
        for x, pixels in tiles:
            picture.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline="silver")
    return picture
