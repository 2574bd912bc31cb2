"""A small classifier of emoji by subcategory: does a made picture look like what its caption says?

It knows the subcategories of which the base has at least LEAST pictures. The real pictures are divided into FOLDS, and
for each fold a classifier is trained on the others. A picture, real or made from a real one's caption, is judged by the
classifier that was not trained on the real one: a copy of a training picture gains nothing, and both have the same
judges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from emoji_data import Division, Emoji
from numpy.typing import NDArray
from rich.progress import track
from torch import nn
from torch.nn import functional

LEAST = 10
FOLDS = 5
PASSES = 30
"""Over the pictures, of training."""
BATCH = 64
RATE = 3e-3
SHIFT = 2
"""Pixels that a picture is moved by, at the most."""
JITTER = 0.1
"""Parts that each colour is changed by, at the most."""
Pictures = NDArray[np.uint8]
Labels = NDArray[np.int64]


def subcategories(base: Emoji, least: int = LEAST) -> list[str]:
    """Those that can be judged."""
    return sorted({of for of in base.categories if base.categories.count(of) >= least})


def judged(division: Division, known: list[str]) -> tuple[Emoji, Emoji]:
    """Of the base's pictures and of those held out, the ones of known subcategories."""
    base, held = division.base, division.held_out
    return (
        base.of([k for k, of in enumerate(base.categories) if of in known]),
        held.of([k for k, of in enumerate(held.categories) if of in known]),
    )


def folds_of(labels: Labels, folds: int = FOLDS) -> Labels:
    """(N,) the fold of each picture, so that every fold has its part of every subcategory."""
    draw, found = np.random.default_rng(20), np.zeros_like(labels)
    for label in np.unique(labels):
        places = draw.permutation(np.flatnonzero(labels == label))
        found[places] = (np.arange(len(places)) + draw.integers(folds)) % folds
    return found


def new_judge(classes: int) -> nn.Module:
    """A convolutional network that knows nothing."""

    def block(given: int, made: int) -> list[nn.Module]:
        return [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [nn.PixelUnshuffle(2), *block(12, 48), *block(48, 96), *block(96, 128)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 4, classes))


def train_judge(views: Pictures, labels: Labels, classes: int, passes: int = PASSES, name: str = "judge") -> nn.Module:
    """Trains with AdamW and one cycle of the rate.

    Args:
        views: (V, N, 32, 32, 3), the same pictures in several ways, of which each pass draws one.
        labels: (N,) below `classes`.
    """
    torch.manual_seed(0)
    judge, truth = new_judge(classes).train(), torch.from_numpy(labels)
    prepared = torch.stack([_prepared(view) for view in views])
    batches = -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=passes * batches)
    for _ in track(range(passes), name):
        for chosen in torch.randperm(len(labels)).tensor_split(batches):
            batch = _changed(prepared[torch.randint(0, len(views), (len(chosen),)), chosen])
            loss = functional.cross_entropy(judge(batch), truth[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return judge.eval()


def _prepared(pictures: Pictures) -> torch.Tensor:
    """(n, 3, 32, 32) float32: zero is white."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - 1


def _changed(pictures: torch.Tensor) -> torch.Tensor:
    """Mirrored or not, moved, with other colours: a mirrored picture keeps its subcategory."""
    count, side = len(pictures), pictures.shape[2]
    mirrored = torch.where(torch.rand(count, 1, 1, 1) < 0.5, pictures.flip(3), pictures)
    padded = functional.pad(mirrored, (SHIFT, SHIFT, SHIFT, SHIFT))
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count, 1))
    rows, columns = down + torch.arange(side), right + torch.arange(side)
    moved = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved * (1 + JITTER * (2 * torch.rand(count, 3, 1, 1) - 1))


@dataclass(frozen=True)
class Judges:
    """A classifier for each fold, which was trained on the other folds.

    known: the subcategories, by label.
    """

    known: list[str]
    judges: list[nn.Module]

    @torch.no_grad()
    def agree(self, pictures: Pictures, categories: tuple[str, ...], folds: Labels) -> NDArray[np.bool_]:
        """(n,) whether a picture is taken for one of its subcategory by the judge of its fold."""
        inputs, said = _prepared(pictures), np.zeros(len(pictures), np.int64)
        for fold, judge in enumerate(self.judges):
            places = np.flatnonzero(folds == fold)
            if len(places):
                said[places] = judge(inputs[torch.from_numpy(places)]).argmax(1).numpy()
        return np.asarray(said == labels_of(categories, self.known))


def labels_of(categories: tuple[str, ...], known: list[str]) -> Labels:
    """(n,) places in `known`."""
    return np.array([known.index(of) for of in categories], np.int64)


def train_judges(views: Pictures, categories: tuple[str, ...], known: list[str], passes: int = PASSES) -> Judges:
    """A judge for each fold of the real pictures (V, N, 32, 32, 3)."""
    labels = labels_of(categories, known)
    folds = folds_of(labels)
    return Judges(
        known,
        [
            train_judge(views[:, folds != k], labels[folds != k], len(known), passes, f"judge {k + 1} of {FOLDS}")
            for k in range(FOLDS)
        ],
    )
