"""The truth for LDS: models trained on random halves of a thousand digits, and what they lose on the queries.

    python tools/reproduce/subsets.py --work WORK [--models 64] [--seeds 2] [--processes 2]

Resumable: WORK keeps what is done. With a second seed every half is trained on again, from other first weights and in
another order, with other timesteps and noise: what the two trainings' losses do not share is chance, and no score can
foretell it (ceiling.py). The digits are scikit-learn's, 8 by 8; a thousand are trained on, and the queries
are some of the rest (validation), and pictures that the full model makes (generated).
"""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import ddpm
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track
from sklearn.datasets import load_digits

RECIPE = ddpm.Recipe(size=8, channels=(16, 32), attention=False, steps=1500, batch=32, rate=2e-3)
SAMPLES = 1000
QUERIES = 64
"""Of each kind."""
MOST_MODELS = 1024
KEPT = Path(__file__).parent / "truths"
"""The part of the checkout where truths are kept."""


@dataclass(frozen=True)
class Digits:
    """The training images (N, 1, 8, 8) in [-1, 1] and their labels, and as many others for validation."""

    images: torch.Tensor
    labels: NDArray[np.int64]
    validation: torch.Tensor
    validation_labels: NDArray[np.int64]


def digits() -> Digits:
    """Shuffled once, by a seed of its own."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    images = torch.from_numpy(found.images[order] / 8 - 1).float()[:, None]
    labels = found.target[order]
    end = SAMPLES + QUERIES
    return Digits(images[:SAMPLES], labels[:SAMPLES], images[SAMPLES:end], labels[SAMPLES:end])


def subset(number: int) -> NDArray[np.bool_]:
    """(N,): the half of the samples that model `number` is trained on."""
    chosen = np.random.default_rng([1, number]).permutation(SAMPLES)[: SAMPLES // 2]
    return np.isin(np.arange(SAMPLES), chosen)


def full_model(work: Path) -> Path:
    """Trains on all samples, if that is not done; the file of the model."""
    path = work / "full.safetensors"
    if not path.exists():
        ddpm.save(path, ddpm.train(RECIPE, digits().images))
    return path


@cache
def queries(work: Path) -> torch.Tensor:
    """(2 QUERIES, 1, 8, 8): validation, then generated."""
    model = ddpm.load(full_model(work), RECIPE)
    return torch.cat([digits().validation, ddpm.generate(model, QUERIES)])


def truth(work: Path, models: int, seeds: int = 1) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(M, N) which samples each half has, and (S, M, Q) the losses on each query of the models trained on it."""
    found = np.stack([[np.load(_losses(work, number, seed)) for number in range(models)] for seed in range(seeds)])
    return np.stack([subset(number) for number in range(models)]), found


def seeds_there(work: Path, models: int) -> int:
    """With how many seeds all the models are trained."""
    seeds = 0
    while models and all(_losses(work, number, seeds).exists() for number in range(models)):
        seeds += 1
    return seeds


def training_seed(seed: int) -> int:
    """What `ddpm.train` is given for a seed of ours.

    It takes the number itself for the first weights, timesteps and noise, and the next one for the order of the data:
    numbers two apart share nothing.
    """
    return 2 * seed


def _losses(work: Path, number: int, seed: int) -> Path:
    return work / ("subsets" if seed == 0 else f"subsets-seed-{seed}") / f"{number:04d}.npy"


def waiting(work: Path, models: int, seeds: int) -> list[tuple[int, int]]:
    """The numbers and seeds of the models that are not trained yet, all of the first seed first."""
    wanted = [(number, seed) for seed in range(seeds) for number in range(models)]
    return [one for one in wanted if not _losses(work, *one).exists()]


def train_one(work: Path, number: int, seed: int) -> None:
    """Trains a model, and keeps its losses on the queries."""
    torch.set_num_threads(1)
    model = ddpm.train(RECIPE, digits().images[subset(number)], training_seed(seed))
    path = _losses(work, number, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, ddpm.losses(model, queries(work)))
    partial.replace(path)


def unpack(kept: Path, work: Path) -> None:
    """Puts what the checkout keeps of the truth into an empty WORK: the full model, and the losses of others."""
    if (work / "full.safetensors").exists() or not (kept / "digits.npz").exists():
        return
    with np.load(kept / "digits.npz", allow_pickle=False) as file:
        losses = file["losses"]
    for seed, number in np.argwhere(~np.isnan(losses).any(2)).tolist():
        path = _losses(work, number, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, losses[seed, number])
    shutil.copyfile(kept / "digits.safetensors", work / "full.safetensors")


def pack(work: Path, kept: Path) -> None:
    """Keeps the full model and the losses (S, M, Q), NaN where a model was not trained, in the checkout."""
    paths = {(seed, number): _losses(work, number, seed) for seed in range(2) for number in range(MOST_MODELS)}
    found = {place: np.load(path) for place, path in paths.items() if path.exists()}
    if not found:
        return
    shape = (1 + max(seed for seed, _ in found), 1 + max(number for _, number in found), 2 * QUERIES)
    losses = np.full(shape, np.nan)
    for place, of_queries in found.items():
        losses[place] = of_queries
    kept.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(kept / "digits.npz", losses=losses)
    shutil.copyfile(work / "full.safetensors", kept / "digits.safetensors")


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done.")],
    models: Annotated[int, typer.Option(help="M.")] = 64,
    seeds: Annotated[int, typer.Option(help="S: trainings of each half. The second ones come after all first.")] = 1,
    processes: Annotated[int, typer.Option(help="As many trainings at a time, each on one thread.")] = 2,
    kept: Annotated[Path, typer.Option(help="What is done goes there too, and on from there.")] = KEPT,
) -> None:
    """Trains the models on random halves that are not kept yet."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    unpack(kept, work)
    full_model(work)
    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(train_one, work, *one) for one in waiting(work, models, seeds)]
        for job in track(as_completed(jobs), "models", total=len(jobs)):
            job.result()
    pack(work, kept)


if __name__ == "__main__":
    typer.run(main)
