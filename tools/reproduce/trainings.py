"""Trainings of a recipe without some of its samples, each kept in a file named by what it is of.

Two methods that choose the same samples share a training, and a method that is added later finds the others done.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import emoji_models
import numpy as np
from finetune import Queries, Tuning
from numpy.typing import NDArray

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Trained:
    """What a model does.

    losses: (Q,) on each query.
    pictures: (G, 32, 32, 3) uint8 that it makes for the captions of the generated queries, from the queries' noise.
    """

    losses: NDArray[np.float64]
    pictures: NDArray[np.uint8]


class Trainings:
    """The trainings of a recipe in a folder.

    A file's name is a hash of the recipe, the base, the data, the queries, the samples that are left out and the seed.
    If any of them changes, trainings of before are not taken for those of now.
    """

    def __init__(self, tuning: Tuning, queries: Queries, bases: Path, folder: Path) -> None:
        self.tuning, self.folder = tuning, folder
        self.latents = tuning.autoencoder.encode(queries.images)
        self.words = tuning.words_of(queries.captions)
        self.asked = queries.captions[len(queries.captions) // 2 :]
        told = f"{tuning.recipe} {tuning.fingerprint} {emoji_models.GUIDANCE} {queries.captions}"
        base = (bases / f"{tuning.recipe.kind}.safetensors").read_bytes()
        self._all = hashlib.sha256(told.encode() + base + queries.images.tobytes())

    def path(self, removed: Places, seed: int) -> Path:
        """Of the training without these samples, by this seed."""
        found = self._all.copy()
        found.update(f"{sorted(removed.tolist())} {seed}".encode())
        return self.folder / f"{found.hexdigest()[:20]}.npz"

    def train(self, removed: Places, seed: int) -> None:
        """Trains without these samples, and keeps the file."""
        self.tuning.train(np.setdiff1d(np.arange(len(self.tuning.latents)), removed), seed)
        losses = self.tuning.losses(self.latents, self.words)
        path = self.path(removed, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, losses=losses, pictures=self.tuning.generate(self.asked))
        partial.replace(path)

    def read(self, removed: Places, seed: int) -> Trained:
        """A training that is kept."""
        return _read(self.path(removed, seed))


@lru_cache(256)
def _read(path: Path) -> Trained:
    with np.load(path, allow_pickle=False) as file:
        return Trained(file["losses"], file["pictures"])
