"""Fine-tuning the bases on 400 captioned emoji: what the experiments of attribution retrain, ask and measure.

`Tuning` has one recipe's model in memory, sets it back to the base and trains it on any part of the set. The same code
trains the model that is asked about and those that tell the truth about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_base import BASES, DROPPED, encode, load_base
from emoji_data import HELD_OUT, NEW, TUNED, Division, divide, read_emoji
from emoji_models import (
    CHANNELS,
    GUIDANCE,
    SIDE,
    STEPS,
    Autoencoder,
    Words,
    add_lora,
    generate,
    losses_at,
    make_tokenizer,
    train,
)
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file, save_file

QUERIES = 64
"""Of each kind: held out, generated."""
MEASURED = 10
"""Timesteps at which the loss of a query is measured."""
SAMPLING_STEPS = 30
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a base is fine-tuned: the kind of model, with LoRA or in full, and steps of `batch` samples."""

    kind: str
    way: str
    steps: int
    batch: int
    rate: float


RECIPES = {
    "sd-lora": Recipe("sd", "lora", 200, 8, 5e-3),
    "sd-full": Recipe("sd", "full", 300, 16, 1e-3),
    "sd3-lora": Recipe("sd3", "lora", 200, 8, 5e-3),
    "sd3-full": Recipe("sd3", "full", 300, 16, 1e-3),
}


def evenly(count: int) -> tuple[int, ...]:
    """So many timesteps, each in the middle of its part of the schedule."""
    return tuple(int((k + 0.5) / count * STEPS) for k in range(count))


class Tuning:
    """A recipe, its data, and its model, whose trained weights change in place.

    latents, words: of the fine-tuning set: (N, CHANNELS, 8, 8) and its captions; the empty caption is last.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        *,
        compiled: bool = True,
        bases: Path = BASES,
        tuned: int = TUNED,
        held_out: int = HELD_OUT,
    ) -> None:
        self.recipe = recipe
        emoji, self.fingerprint = read_emoji(data)
        self.division: Division = divide(emoji, tuned, held_out)
        self.autoencoder = Autoencoder.fit(self.division.base.images)
        self.tokenizer = make_tokenizer(emoji.captions)
        self.kind, denoiser, self.encoder = load_base(recipe.kind, len(self.tokenizer), bases)
        torch.manual_seed(0)
        if recipe.way == "lora":
            add_lora(self.kind, denoiser)
        else:
            denoiser.requires_grad_(True)
        self.denoiser = denoiser.eval()
        self.called: Any = torch.compile(denoiser) if compiled else denoiser
        self.trained = {name: tensor for name, tensor in denoiser.named_parameters() if tensor.requires_grad}
        self.first = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
        self.latents = self.autoencoder.encode(self.division.tuning.images)
        self.words = self.words_of([*self.division.tuning.captions, ""])

    def words_of(self, captions: list[str]) -> Words:
        """Captions as the text encoder gives them, which stays as the base has it."""
        return encode(self.kind, self.encoder, self.tokenizer, captions)

    def load(self, weights: Weights) -> None:
        """Puts trained weights in place."""
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(weights[name])

    def reset(self, seed: int) -> None:
        """Back to the base. LoRA's A matrices are drawn again."""
        self.load(self.first)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in self.trained.items():
                if "lora_A" in name:
                    tensor.normal_(0, 1 / self.first[name].shape[0], generator=draws)

    def train(self, samples: NDArray[np.int64], seed: int, name: str | None = None) -> float:
        """Trains the base on some of the samples; the mean loss of the last steps. A name shows a bar."""
        self.reset(seed)
        last = len(self.words.tokens) - 1
        chosen = torch.from_numpy(samples)

        def words(places: torch.Tensor) -> Words:
            left_out = torch.rand(len(places)) < DROPPED
            return self.words.at(torch.where(left_out, last, chosen[places]))

        return train(
            self.kind,
            self.called,
            self.latents[chosen],
            words,
            list(self.trained.values()),
            track(range(self.recipe.steps), name) if name else range(self.recipe.steps),
            self.recipe.steps,
            learning_rate=self.recipe.rate,
            batch=self.recipe.batch,
            seed=seed,
        )

    def weights(self) -> Weights:
        """A copy of the trained weights, rounded to float16 as they are kept."""
        return {name: tensor.detach().half() for name, tensor in self.trained.items()}

    def full(self, path: Path) -> None:
        """The model that is asked about, trained on all samples, or read from the file where that was kept."""
        if not path.exists():
            self.train(np.arange(len(self.latents)), 0, f"fine-tune {path.stem}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file(self.weights(), partial)
            partial.replace(path)
        self.load(load_file(path))

    def generate(self, captions: list[str], seed: int = 3, guidance: float = GUIDANCE) -> NDArray[np.uint8]:
        """A picture (n, 32, 32, 3) for each caption, each from noise of its own."""
        words, empty = self.words_of(captions), self.words_of([""])
        made = generate(self.kind, self.called, words, empty, SAMPLING_STEPS, seed, guidance)
        return np.asarray(self.autoencoder.decode(made))

    def losses(
        self, latents: torch.Tensor, words: Words, timesteps: Sequence[int] = evenly(MEASURED)
    ) -> NDArray[np.float64]:
        """(n,) the mean loss over timesteps, by default MEASURED ones spread evenly, with the same noise for all."""
        draws, total = torch.Generator().manual_seed(7), torch.zeros(len(latents), dtype=torch.float64)
        with torch.no_grad():
            for t in timesteps:
                noise = torch.randn((1, CHANNELS, SIDE, SIDE), generator=draws).expand_as(latents)
                steps = torch.full((len(latents),), t)
                total += losses_at(self.kind, self.called, latents, words, noise, steps)
        return (total / len(timesteps)).numpy()


@dataclass(frozen=True)
class Queries:
    """Pictures (Q, 32, 32, 3) uint8 and their captions and subcategories: held out, then generated."""

    images: NDArray[np.uint8]
    captions: list[str]
    categories: list[str]


def held_out_queries(division: Division) -> Queries:
    """The held-out pictures of the new subcategories, and some of the others."""
    kept = division.held_out
    order = sorted(range(len(kept.names)), key=lambda k: kept.categories[k] not in NEW)[:QUERIES]
    chosen = kept.of(order)
    return Queries(chosen.images, list(chosen.captions), list(chosen.categories))


def prompts(division: Division) -> tuple[list[str], list[str]]:
    """Captions of the fine-tuning set to make pictures from, and their subcategories.

    A quarter is of new subcategories. A recipe's few steps do not teach the model to draw these, so their pictures are
    poor; those of the subcategories that the base knows can be read.
    """
    tuning, draw = division.tuning, np.random.default_rng(19)
    order = [
        draw.permutation([k for k, of in enumerate(tuning.categories) if (of in NEW) == new]).tolist()
        for new in (True, False)
    ]
    known = order[1][: QUERIES - QUERIES // 4]
    chosen = [*order[0][: QUERIES - len(known)], *known]
    return [tuning.captions[k] for k in chosen], [tuning.categories[k] for k in chosen]


def all_queries(tuning: Tuning) -> Queries:
    """Held out, then generated by the model that is in place."""
    held = held_out_queries(tuning.division)
    captions, categories = prompts(tuning.division)
    made = tuning.generate(captions)
    return Queries(np.concatenate([held.images, made]), [*held.captions, *captions], [*held.categories, *categories])
