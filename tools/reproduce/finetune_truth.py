"""The truth about fine-tuning: models fine-tuned on random halves of the set, each half with two seeds.

    python tools/reproduce/finetune_truth.py --data emoji32.npz --recipe sd-lora

The queries and what each model loses on them are kept in `tools/reproduce/truths/RECIPE.npz`, and the model that is
asked about in RECIPE.safetensors. Both are part of the checkout. A run goes on from the file: a training that is
missing there is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
import typer
from finetune import RECIPES, Queries, Tuning, all_queries
from numpy.typing import NDArray
from rich.progress import track

TRUTHS = Path(__file__).parent / "truths"


def half(number: int, samples: int) -> NDArray[np.int64]:
    """The samples that the models of half `number` are trained on."""
    return np.sort(np.random.default_rng([2, number]).permutation(samples)[: samples // 2])


@dataclass
class Truth:
    """What is known of a recipe.

    samples: N, of the fine-tuning set.
    losses: (S, M, Q) of the model of seed s on half m, on each query; NaN where it was not trained yet.
    """

    samples: int
    queries: Queries
    losses: NDArray[np.float64]

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file of `write`."""
        with np.load(path, allow_pickle=False) as file:
            queries = Queries(file["images"], file["captions"].tolist(), file["categories"].tolist())
            return cls(int(file["samples"]), queries, file["losses"])

    def write(self, path: Path) -> None:
        """To a file, whole or not at all."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                samples=self.samples,
                images=self.queries.images,
                captions=np.array(self.queries.captions),
                categories=np.array(self.queries.categories),
                losses=self.losses,
            )
        partial.replace(path)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(M, N) which samples each half has."""
        return np.stack([np.isin(np.arange(self.samples), half(m, self.samples)) for m in range(self.losses.shape[1])])


def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "sd-lora",
    models: Annotated[int, typer.Option(help="M, the halves.", min=1)] = 64,
    seeds: Annotated[int, typer.Option(help="S, trainings of each half.", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Where the truth is kept.")] = TRUTHS,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile, which needs a C++ compiler.")] = True,
) -> None:
    """Trains the models on random halves."""
    torch.set_num_threads(1)
    measure(Tuning(RECIPES[recipe], data, compiled=compiled), out / f"{recipe}.npz", models, seeds)


def measure(tuning: Tuning, path: Path, models: int, seeds: int) -> None:
    """Trains the models whose losses the file does not have, and writes them there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        truth = Truth.read(path)
    else:
        tuning.full(path.with_suffix(".safetensors"))
        queries = all_queries(tuning)
        truth = Truth(len(tuning.latents), queries, np.full((0, 0, len(queries.images)), np.nan))
    kept = np.full(
        (max(seeds, truth.losses.shape[0]), max(models, truth.losses.shape[1]), len(truth.queries.images)), np.nan
    )
    kept[: truth.losses.shape[0], : truth.losses.shape[1]] = truth.losses
    truth.losses = kept
    latents = tuning.autoencoder.encode(truth.queries.images)
    words = tuning.words_of(truth.queries.captions)
    waiting = [(s, m) for m in range(models) for s in range(seeds) if np.isnan(kept[s, m]).any()]
    for s, m in track(waiting, f"fine-tune {path.stem} on halves"):
        tuning.train(half(m, truth.samples), s)
        kept[s, m] = tuning.losses(latents, words)
        truth.write(path)


if __name__ == "__main__":
    typer.run(main)
