"""What the emoji bases can draw: `python tools/reproduce/emoji_base_page.py --data emoji32.npz`.

Pictures are made from captions of the base's set, and from captions that no base has seen, of subcategories that it
knows. Classifiers (`emoji_judge.py`) say how often a picture is of its caption's subcategory, at several strengths of
guidance. `docs/results/emoji_base.md` and a sheet of pictures are written at the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from emoji_base import BASES
from emoji_data import Emoji
from emoji_judge import (
    FOLDS,
    LEAST,
    PASSES,
    Judges,
    folds_of,
    judged,
    labels_of,
    new_judge,
    subcategories,
    train_judges,
)
from finetune import RECIPES, SAMPLING_STEPS, Tuning
from numpy.typing import NDArray
from page import Page, command_line
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from dmin_trace.audit.intervals import Estimate, mean_estimate

GUIDANCES = (1.5, 2.0, 3.0, 4.0)
EACH = 2
"""Captions of each subcategory of the base's set."""
MADE = 2
"""Pictures of a caption."""
BATCH = 32
SHOWN = 24
ACROSS = 12
TILE, GAP, LEFT, NAMES = 64, 8, 70, 26
FLAG = "country-flag"
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Asked:
    """Captions of one kind, with their real pictures and the folds that these are in."""

    name: str
    emoji: Emoji
    folds: NDArray[np.int64]


@dataclass(frozen=True)
class Agreement:
    """How often a picture is taken for one of its caption's subcategory, with an interval over captions.

    source: "real", "real, through the autoencoder", or the kind of model.
    plain: without country flags, which are the easiest.
    """

    asked: str
    source: str
    guidance: float | None
    every: Estimate
    plain: Estimate


def asked_of(base: Emoji, held: Emoji, folds: NDArray[np.int64], each: int) -> list[Asked]:
    """So many captions of every subcategory of the base's set, drawn by a fixed seed; and all that are held out."""
    draw, chosen = np.random.default_rng(21), []
    for category in sorted(set(base.categories)):
        chosen += draw.permutation([k for k, of in enumerate(base.categories) if of == category])[:each].tolist()
    count = len(base.names)
    return [
        Asked("captions of the base's set", base.of(chosen), folds[chosen]),
        Asked("held-out prompts", held, folds[count:]),
    ]


def make(tuning: Tuning, captions: Sequence[str], guidance: float, made: int) -> Pictures:
    """(made, n, 32, 32, 3): the same noise at every guidance."""
    listed = list(captions) * made
    starts = range(0, len(listed), BATCH)
    parts = [
        tuning.generate(listed[k : k + BATCH], seed=1000 + k, guidance=guidance)
        for k in track(starts, f"make pictures of {tuning.recipe.kind}, guidance {guidance:g}")
    ]
    return np.concatenate(parts).reshape(made, len(captions), 32, 32, 3)


def agreement(judges: Judges, asked: Asked, pictures: Pictures, source: str, guidance: float | None) -> Agreement:
    """Of pictures (k, n, 32, 32, 3) of n captions."""
    each = np.mean([judges.agree(some, asked.emoji.categories, asked.folds) for some in pictures], axis=0)
    plain = each[np.array(asked.emoji.categories) != FLAG]
    return Agreement(asked.name, source, guidance, mean_estimate(each, 0), mean_estimate(plain, 0))


def best_guidance(found: Sequence[Agreement]) -> float:
    """That of the largest mean over kinds of model, on captions of the base's set."""
    known = [row for row in found if row.guidance is not None and row.asked.startswith("captions")]
    means: dict[float, list[float]] = {}
    for row in known:
        means.setdefault(row.guidance or 0.0, []).append(row.every.value)
    return max(means, key=lambda guidance: float(np.mean(means[guidance])))


def sheet(asked: Sequence[Asked], made: Mapping[tuple[str, str], Pictures]) -> Image.Image:
    """Real pictures above those that each kind of model made from their captions.

    made: by the kind of model and the name of what was asked: (n, 32, 32, 3).
    """
    kinds = list(dict.fromkeys(kind for kind, _ in made))
    blocks = [
        (one, chosen[k : k + ACROSS])
        for one in asked
        for chosen in [shown_of(one)]
        for k in range(0, len(chosen), ACROSS)
    ]
    tall = NAMES + (1 + len(kinds)) * (TILE + 2) + 2 * GAP
    font, small = ImageFont.load_default(13), ImageFont.load_default(9)
    picture = Image.new("RGB", (LEFT + ACROSS * (TILE + GAP), len(blocks) * tall + len(asked) * 22), "white")
    draw, y, before = ImageDraw.Draw(picture), 0, ""
    for one, chosen in blocks:
        if one.name != before:
            draw.text((4, y + 4), one.name, fill="black", font=font)
            y, before = y + 22, one.name
        rows = {"real": one.emoji.images} | {kind: made[kind, one.name] for kind in kinds}
        for column, k in enumerate(chosen):
            x = LEFT + column * (TILE + GAP)
            draw.multiline_text((x, y), _wrapped(one.emoji.names[k]), fill="black", font=small, spacing=1)
            for n, pictures in enumerate(rows.values()):
                tile = Image.fromarray(pictures[k]).resize((TILE, TILE), Image.Resampling.NEAREST)
                picture.paste(tile, (x, y + NAMES + n * (TILE + 2)))
        for n, name in enumerate(rows):
            draw.text((4, y + NAMES + n * (TILE + 2) + TILE // 2 - 8), name, fill="black", font=font)
        y += tall
    return picture.quantize(256, dither=Image.Dither.NONE)


def shown_of(asked: Asked) -> list[int]:
    """The captions that the sheet shows: drawn, and not chosen."""
    return sorted(np.random.default_rng(22).permutation(len(asked.emoji.names))[:SHOWN].tolist())


def _wrapped(name: str, width: int = 13) -> str:
    """Two lines at the most."""
    lines, line = [], ""
    for word in name.lower().split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join(one[: width + 1] for one in [*lines, line][:2])


def reproduce(
    tunings: Mapping[str, Tuning],
    out: Path,
    command: str,
    *,
    guidances: Sequence[float] = GUIDANCES,
    each: int = EACH,
    made: int = MADE,
    least: int = LEAST,
    passes: int = PASSES,
) -> Path:
    """Trains the judges, makes the pictures, and writes the page."""
    began = time.monotonic()
    first = next(iter(tunings.values()))
    division, autoencoder = first.division, first.autoencoder
    known = subcategories(division.base, least)
    base, held = judged(division, known)
    real, categories = np.concatenate([base.images, held.images]), (*base.categories, *held.categories)
    views = np.stack([real, autoencoder.decode(autoencoder.encode(real))])
    judges = train_judges(views, categories, known, passes)
    folds = folds_of(labels_of(categories, known))
    every = Asked("all real pictures", Emoji(real, (*base.names, *held.names), categories), folds)
    asked = asked_of(base, held, folds, each)
    found = [
        agreement(judges, every, views[:1], "real", None),
        agreement(judges, every, views[1:], "real, through the autoencoder", None),
    ]
    for one in asked:
        rebuilt = autoencoder.decode(autoencoder.encode(one.emoji.images))
        found.append(agreement(judges, one, one.emoji.images[None], "real", None))
        found.append(agreement(judges, one, rebuilt[None], "real, through the autoencoder", None))
    pictures = {}
    for kind, tuning in tunings.items():
        for one in asked:
            for guidance in guidances:
                pictures[kind, one.name, guidance] = make(tuning, one.emoji.captions, guidance, made)
                found.append(agreement(judges, one, pictures[kind, one.name, guidance], kind, guidance))
    best = best_guidance(found)
    drawn = {(kind, name): some[0] for (kind, name, guidance), some in pictures.items() if guidance == best}
    out.mkdir(parents=True, exist_ok=True)
    sheet(asked, drawn).save(out / "emoji_base.png", optimize=True)
    path = out / "emoji_base.md"
    _page(tunings, every, asked, found, best, len(known), made, command, time.monotonic() - began).write(path)
    return path


def _page(
    tunings: Mapping[str, Tuning],
    every: Asked,
    asked: Sequence[Asked],
    found: Sequence[Agreement],
    best: float,
    known: int,
    made: int,
    command: str,
    seconds: float,
) -> Page:
    division = next(iter(tunings.values())).division
    left_out = len(set(division.base.categories)) - known
    names = "; ".join(f"{kind}: {tuning.kind.name}" for kind, tuning in tunings.items())
    page = Page(
        "What the emoji bases can draw",
        command,
        seconds,
        f"Two text-to-image models of one to two million parameters ({names}) were trained from nothing on "
        f"{len(division.base.names)} captioned emoji of 32x32 pixels (`emoji_base.py`). The experiments of attribution "
        "fine-tune them, so their pictures must be readable: a query that shows nothing has no cause to find.",
    )
    page.heading("Pictures")
    page.text(
        "Real pictures, and below each what the models make from its caption (the first picture, guidance "
        f"{best:g}, {SAMPLING_STEPS} steps; the captions are drawn by a fixed seed, not chosen). The base was trained "
        "on the captions of the upper part. It never saw those of the lower part, only others of their subcategories; "
        "words that only they have are new to the text encoder."
    )
    page.picture(Path("emoji_base.png"), "Real emoji and what the bases make from their captions")
    page.heading("Agreement with the prompt's subcategory")
    parameters = sum(p.numel() for p in new_judge(known).parameters())
    page.text(
        f"A convolutional network of {parameters:,} parameters, trained on real pictures (mirrored, moved and "
        "recoloured a little, half of them through the autoencoder), says which subcategory a picture is of. It knows "
        f"the {known} subcategories of which the base has at least {LEAST} pictures; the other {left_out} are left "
        f"out. The real pictures of the base's set and of those held out are divided into {FOLDS} folds; a picture is "
        "judged by the network that was trained without the fold of the caption's real picture. So a copy of a "
        "training picture gains nothing, and the rows *real* say what the same judges make of the real pictures of the "
        "same captions. Many emoji are variants of each other, such as men and women of one profession, and the "
        "variants are in different folds: it is easier than new kinds of pictures would be."
    )
    flags = float(np.mean([of == FLAG for of in every.emoji.categories]))
    page.text(
        f"{made} pictures of each caption: {len(asked[0].emoji.names)} captions of the base's set, some of each "
        f"subcategory, and all {len(asked[1].emoji.names)} held-out prompts of the subcategories known. In brackets "
        "95 % intervals over captions; they say nothing of other trainings of the base or the judges. Chance is "
        f"{flags:.0%} on all real pictures, if every picture is called a flag, and {1 / known:.0%} on captions of the "
        "base's set, of which every subcategory has as many. A picture that agrees is like its subcategory; it need "
        "not show what its name says."
    )
    for name in dict.fromkeys(row.asked for row in found):
        page.table(
            (name, "guidance", "agreement", "without country flags"),
            [
                (row.source, "" if row.guidance is None else f"{row.guidance:g}", _told(row.every), _told(row.plain))
                for row in found
                if row.asked == name
            ],
        )
    page.text(
        f"Guidance {best:g} has the largest agreement on captions of the base's set, as a mean over the models, but "
        "the differences between neighbours are much smaller than their intervals. The experiments use it. The "
        "held-out prompts had no part in the choice."
    )
    return page


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.2f} to {estimate.high:.2f})"


def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    bases: Annotated[Path, typer.Option(help="The folder of the bases' weights.")] = BASES,
    out: Annotated[Path, typer.Option(help="Where emoji_base.md and its sheet are written.")] = Path("docs/results"),
    compiled: Annotated[bool, typer.Option(help="Use torch.compile, which needs a C++ compiler.")] = True,
) -> None:
    """Shows what the bases draw, and how often it is what the caption says."""
    torch.set_num_threads(1)
    # A recipe's model is the base until it is trained.
    tunings = {kind: Tuning(RECIPES[f"{kind}-full"], data, compiled=compiled, bases=bases) for kind in ("sd", "sd3")}
    print(f"written: {reproduce(tunings, out, command_line('emoji_base_page.py'))}")


if __name__ == "__main__":
    typer.run(main)
