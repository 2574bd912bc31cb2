"""The methods that the experiments on fine-tuned models compare: a list of names and functions.

A method is given the pictures and the gradients of samples and queries, and gives scores (Q, N), larger where a sample
lowers the loss of a query more. To add one, add a line to `methods`.

    deflated    DMin's default: rows of signs, of ten timesteps, deflated
    five-rows   the same with five rows, each of the mean gradient of two timesteps
    one-row     the same with one row, of the mean gradient of the ten timesteps
    scaled-row  one row of the mean gradient, scaled by second moments, deflated, times the samples' lengths
    turned-row  the same with each matrix turned before, and ridge 3 in place of deflation
    paper       the paper's: rows as they are, inner products
    sign        rows of signs, inner products
    pixels      likeness of the pictures; it knows nothing of the model
    trak        TRAK, on the mean gradient of the loss
    d-trak      D-TRAK, on the mean gradient of the squared output
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import baselines
import numpy as np
import row_kernels
import torch
import typer
from finetune import Tuning
from finetune_truth import Truth
from gradient_file import EVEN, Gradients, Objective, ask_pictures, open_gradients
from numpy.typing import NDArray
from row_kernels import Doubles, Floats, Kernel, Row, deflated, kernel_of, plain, with_lengths

TIMESTEPS = EVEN
"""Of all methods, with one draw of noise each: they cost the same passes."""
RIDGE = 1.0
"""The strength of TRAK and of D-TRAK, relative to a gradient's mean squared norm. Between 0.3 and 3 is best for both on
the development half of two fine-tuned models (finetune_lds.py)."""
PAPER = "paper"
SQUARED: Objective = "squared-output"


@dataclass(frozen=True)
class Given:
    """What a method may know.

    samples, queries: the pictures, (N, 32, 32, 3) and (Q, 32, 32, 3) uint8.
    loss: gradients of the loss, of the samples, then of the queries.
    squared: gradients of the squared output; None if `gradient_file.py --objective squared-output` was not run.
    kept: a folder for the products of rows.
    """

    samples: NDArray[np.uint8]
    queries: NDArray[np.uint8]
    loss: Gradients
    squared: Gradients | None
    kept: Path


Method = tuple[str, Callable[[Given], Doubles | None]]
"""A name, and a function to scores (Q, N); None where it lacks gradients that it needs."""


def methods(ridge: float = RIDGE) -> list[Method]:
    """All of them, the default first."""
    return [
        ("deflated", lambda given: deflated(_kernels(given, "sign"))),
        ("five-rows", lambda given: deflated(_five_rows(given))),
        ("one-row", lambda given: deflated([_one_row(given)])),
        ("scaled-row", lambda given: _with_lengths(given, "scaled", deflated)),
        ("turned-row", lambda given: _with_lengths(given, "turned", partial(row_kernels.ridge, strength=3.0))),
        (PAPER, lambda given: plain(_kernels(given, "none"))),
        ("sign", lambda given: plain(_kernels(given, "sign"))),
        ("pixels", lambda given: pixels(given.samples, given.queries)),
        ("trak", lambda given: baselines.trak(*mean_gradients(given.loss), ridge)),
        ("d-trak", lambda given: given.squared and baselines.d_trak(*mean_gradients(given.squared), ridge)),
    ]


def scores_of(given: Given, listed: list[Method], only: str = "") -> dict[str, Doubles]:
    """The scores of the methods that have what they need.

    only: names with commas between; all if empty.
    """
    names = only.split(",") if only else [name for name, _ in listed]
    known = dict(listed)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name} is none of {', '.join(known)}.", param_hint="--methods")
    found = {name: known[name](given) for name in names}
    return {name: scores for name, scores in found.items() if scores is not None}


def given_of(tuning: Tuning, truth: Truth, truths: Path, work: Path, recipe: str) -> Given:
    """What there is of a recipe's truth. The model that is asked about is in place afterwards.

    Raises typer.BadParameter where gradients are missing, or are of another model.
    """
    model = truths / f"{recipe}.safetensors"
    if not model.exists():
        raise typer.BadParameter(f"{model} is missing; run finetune_truth.py first.", param_hint="--truths")
    tuning.full(model)
    loss = opened(tuning, work / recipe, "loss")
    squared = work / f"{recipe}-{SQUARED}"
    return Given(
        tuning.division.tuning.images,
        truth.queries.images,
        loss,
        opened(tuning, squared, SQUARED) if squared.exists() else None,
        work / recipe / "kernels",
    )


def opened(tuning: Tuning, folder: Path, objective: Objective) -> Gradients:
    """The gradients of a folder, after one of them was computed again to see that they are of this model."""
    if not (folder / "gradients.json").exists():
        raise typer.BadParameter(f"{folder} has no gradients; run gradient_file.py first.", param_hint="--work")
    gradients = open_gradients(folder)
    samples = tuning.division.tuning
    asked = ask_pictures(tuning, samples.images[:1], [samples.captions[0]], 1, objective)
    k = len(gradients.passes) // 2
    row = asked.gradients(torch.zeros(1, dtype=torch.int64), *gradients.passes[k])[0].numpy()
    kept = gradients.rows[0, k].astype(np.float32)
    if gradients.samples != len(samples.images) or len(row) != len(kept) or _cosine(row, kept) < 0.99:
        raise typer.BadParameter(
            f"{folder} has gradients of another model, or of other samples; remove it and run gradient_file.py again.",
            param_hint="--work",
        )
    return gradients


def pixels(samples: NDArray[np.uint8], queries: NDArray[np.uint8]) -> Doubles:
    """(Q, N) the negative mean squared difference of the pixels, from 0 to 1."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (queries, samples))
    found: Doubles = -((a**2).mean(1)[:, None] - 2 * a @ b.T / a.shape[1] + (b**2).mean(1))
    return found


def mean_gradients(gradients: Gradients) -> tuple[Floats, Floats]:
    """(N, P) and (Q, P): gradients of samples and queries, averaged over TIMESTEPS as they are."""
    total = np.zeros((gradients.rows.shape[0], gradients.rows.shape[2]), np.float32)
    for t in TIMESTEPS:
        k = gradients.passes.index((t, 0))
        total += gradients.rows[:, k].astype(np.float32) * gradients.norms[:, k : k + 1]
    total /= len(TIMESTEPS)
    return total[: gradients.samples], total[gradients.samples :]


def _kernels(given: Given, transform: str) -> list[Kernel]:
    return [kernel_of(given.loss, Row(((t, 0),), transform), given.kept) for t in TIMESTEPS]


def _one_row(given: Given, transform: str = "sign") -> Kernel:
    return kernel_of(given.loss, Row(tuple((t, 0) for t in TIMESTEPS), transform, divided=False), given.kept)


def _five_rows(given: Given) -> list[Kernel]:
    groups = np.array_split(np.array(TIMESTEPS), min(5, len(TIMESTEPS)))
    rows = [Row(tuple((int(t), 0) for t in group), divided=False) for group in groups]
    return [kernel_of(given.loss, row, given.kept) for row in rows]


def _with_lengths(given: Given, transform: str, scores: Callable[[list[Kernel]], Doubles]) -> Doubles:
    kernels = [_one_row(given, transform)]
    return with_lengths(scores(kernels), kernels)


def _cosine(one: Floats, other: Floats) -> float:
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / lengths) if lengths else 1.0
