"""Made-up emoji, and bases that know nothing, for the tests of the text-to-image experiments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "reproduce"))

from emoji_base import Base
from emoji_data import NEW, SMALL, read_emoji
from emoji_models import make_tokenizer
from finetune import Recipe, Tuning

COUNTS = dict.fromkeys(NEW, 1) | dict.fromkeys(NEW[:3], 4) | dict.fromkeys(SMALL, 12)
TUNED, HELD_OUT = 27, 6
"""Of the 51 emoji: all 15 new ones and 12 others are fine-tuned on."""
RECIPE = Recipe("sd3", "lora", 2, 4, 5e-3)


def write_data(path: Path, counts: Mapping[str, int] = COUNTS) -> None:
    """Each subcategory has a colour, with noise."""
    draw = np.random.default_rng(0)
    categories = [category for category, count in counts.items() for _ in range(count)]
    colours = {category: draw.integers(256, size=3) for category in counts}
    noise = draw.integers(-40, 40, size=(len(categories), 32, 32, 3))
    images = (np.stack([colours[category] for category in categories])[:, None, None] + noise).clip(0, 255)
    names = [f"{category} number {k}" for k, category in enumerate(categories)]
    np.savez(path, images=images.astype(np.uint8), names=names, subcategories=categories)


def write_base(data: Path, folder: Path, kind: str) -> Base:
    """The weights of a base that was not trained, as the training writes them."""
    emoji, _ = read_emoji(data)
    base = Base(kind, len(make_tokenizer(emoji.captions)), steps=1)
    base.export(folder / f"{kind}.safetensors")
    return base


def tiny_tuning(data: Path, bases: Path, recipe: Recipe = RECIPE) -> Tuning:
    """A recipe on the made-up emoji."""
    return Tuning(recipe, data, compiled=False, bases=bases, tuned=TUNED, held_out=HELD_OUT)
