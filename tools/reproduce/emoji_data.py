"""The captioned emoji of the text-to-image experiments, and how they are divided.

Six subcategories are *new*: the base has never seen them. Fine-tuning learns them, together with pictures of the other
subcategories. The division is fixed, so that every experiment speaks of the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

NEW = ("heart", "time", "transport-ground", "musical-instrument", "plant-flower", "money")
"""The subcategories that only fine-tuning sees, the largest three first. A fifth of each is held out."""
SMALL = ("country-flag", "person-role", "animal-mammal")
"""The small categories of the detection rates (the paper's Table 2). The base knows others of their pictures: a few
hundred steps of fine-tuning do not teach a model to draw what it has never seen."""
TUNED, HELD_OUT = 400, 100
"""Pictures of the fine-tuning set, and those that no training sees."""


@dataclass(frozen=True)
class Emoji:
    """Some of the emoji: (N, 32, 32, 3) uint8, their names, and their Unicode subcategories."""

    images: np.ndarray
    names: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """The words of the subcategory, and the emoji's own name."""
        return tuple(caption(category, name) for category, name in zip(self.categories, self.names, strict=True))

    def of(self, places: Iterable[int]) -> Emoji:
        """Those at some places."""
        listed = list(places)
        return Emoji(
            self.images[listed], tuple(self.names[k] for k in listed), tuple(self.categories[k] for k in listed)
        )


def caption(category: str, name: str) -> str:
    """Of an emoji."""
    return f"a {category.replace('-', ' ')} emoji: {name}"


@dataclass(frozen=True)
class Division:
    """The three parts of the emoji, none of which shares a picture with another."""

    base: Emoji
    tuning: Emoji
    held_out: Emoji


def read_emoji(path: Path) -> tuple[Emoji, str]:
    """The file's emoji, and the SHA-256 of the file."""
    try:
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        with np.load(path, allow_pickle=False) as file:
            images, names, categories = file["images"], file["names"].tolist(), file["subcategories"].tolist()
    except (OSError, ValueError, KeyError) as error:
        raise typer.BadParameter(
            f"{path} is not a file of emoji ({error}). Expected a .npz with images (N, 32, 32, 3) uint8, names and "
            "subcategories.",
            param_hint="--data",
        ) from error
    if images.dtype != np.uint8 or images.shape != (len(names), 32, 32, 3) or len(categories) != len(names):
        raise typer.BadParameter(
            f"images of {path} are {images.shape} {images.dtype}, for {len(names)} names; expected (N, 32, 32, 3) "
            "uint8.",
            param_hint="--data",
        )
    return Emoji(images, tuple(names), tuple(categories)), fingerprint


def divide(emoji: Emoji, tuned: int = TUNED, held_out: int = HELD_OUT) -> Division:
    """The base, the fine-tuning set and what is held out.

    Of each new subcategory a fifth is held out and the rest is fine-tuned on. Both parts are filled up with pictures of
    the other subcategories, drawn by a fixed seed.
    """
    draw = np.random.default_rng(18)
    tuning: list[int] = []
    kept: list[int] = []
    for category in NEW:
        places = draw.permutation([k for k, of in enumerate(emoji.categories) if of == category]).tolist()
        if not places:
            raise typer.BadParameter(f"The file has no emoji of {category}.", param_hint="--data")
        kept += places[: len(places) // 5]
        tuning += places[len(places) // 5 :]
    others = draw.permutation([k for k, of in enumerate(emoji.categories) if of not in NEW]).tolist()
    first, second = max(0, tuned - len(tuning)), max(0, held_out - len(kept))
    if first + second >= len(others):
        raise typer.BadParameter(f"{tuned} and {held_out} pictures leave none for the base.", param_hint="--tuned")
    tuning += others[:first]
    kept += others[first : first + second]
    return Division(emoji.of(sorted(others[first + second :])), emoji.of(sorted(tuning)), emoji.of(sorted(kept)))
