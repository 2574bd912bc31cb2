"""What an audit finds of what was planted in digits: swapped labels, near-copies, foreign pictures.

    python tools/reproduce/audit_evidence.py --work WORK

Resumable: WORK keeps the model and the trace. Of the thousand digits of subsets.py, one in twenty gets the label of
another, which the model is not told; one in twenty is replaced by a near-copy of another one; and one in fifty by a
piece of a photograph. A model is trained on them and audited. The three measures of the audit are compared with chance,
with the training loss, and with the same measure of pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ddpm
import numpy as np
import sketches
import subsets
import torch
import typer
from numpy.typing import NDArray
from page import Page, command_line
from sklearn.datasets import load_sample_images

from dmin_trace.audit import audit_trace
from dmin_trace.audit.intervals import RESAMPLES
from dmin_trace.audit.labels import fit_of_values
from dmin_trace.audit.samples import NEIGHBOURS
from dmin_trace.query import Trace
from dmin_trace.search import find_alike
from dmin_trace.store import open_store

SWAPPED, COPIED, FOREIGN = 0.05, 0.05, 0.02
"""The parts of the samples that are planted."""
NOISE = 0.1
"""Standard deviation of what is added to a near-copy, of pixels from -1 to 1."""
DIMENSION = 2**14

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Planted:
    """Pictures (N, 1, 8, 8) and labels (N,), and which of them are planted: (N,) each. Of near-copies both are."""

    images: torch.Tensor
    labels: NDArray[np.int64]
    swapped: Bools
    copied: Bools
    foreign: Bools


def plant(seed: int = 0) -> Planted:
    """The digits with what is planted; no sample is planted twice."""
    digits, random = subsets.digits(), np.random.default_rng([8, seed])
    images, labels = digits.images.clone(), digits.labels.copy()
    count = len(images)
    order = random.permutation(count)
    swapped, copies, originals, foreign, _ = np.split(
        order, np.cumsum([round(part * count) for part in (SWAPPED, COPIED, COPIED, FOREIGN)])
    )
    labels[swapped] = (labels[swapped] + random.integers(1, 10, len(swapped))) % 10
    noise = torch.from_numpy(random.normal(0, NOISE, images[copies].shape)).float()
    images[copies] = (images[originals] + noise).clamp(-1, 1)
    labels[copies] = labels[originals]
    images[foreign] = pieces(len(foreign), random)
    both = np.concatenate([copies, originals])
    return Planted(images, labels, *(np.isin(np.arange(count), of) for of in (swapped, both, foreign)))


def pieces(count: int, random: np.random.Generator) -> torch.Tensor:
    """(count, 1, 8, 8): pieces of two photographs, in grey, each stretched over all of [-1, 1]."""
    photographs = [torch.from_numpy(image.mean(2)).float()[None, None] for image in load_sample_images().images]
    pieces = []
    for n in range(count):
        photograph = photographs[n % len(photographs)]
        y, x = (int(random.integers(0, size - 128)) for size in photograph.shape[2:])
        piece = torch.nn.functional.interpolate(photograph[:, :, y : y + 128, x : x + 128], size=8, mode="area")
        pieces.append((piece - piece.min()) / (piece.max() - piece.min()).clamp(min=1e-3) * 2 - 1)
    return torch.cat(pieces)


def measures(work: Path, planted: Planted, dimension: int) -> dict[str, list[tuple[str, Bools, Doubles]]]:
    """For each thing planted, what each way gives each sample (N,): larger where it is more likely planted."""
    path = work / "audit.safetensors"
    if not path.exists():
        ddpm.save(path, ddpm.train(subsets.RECIPE, planted.images))
    model, kind = ddpm.load(path, subsets.RECIPE), sketches.Kind(tuple(ddpm.evenly(10)))
    folder = work / f"audit-v{dimension}"
    sketches.capture(folder, model, planted.images, planted.labels, planted.images[:1], kind, ("sign",), dimension)
    found = audit_trace(Trace(open_store(folder / "sign.zarr")), "label")
    flat = planted.images.flatten(1).numpy()
    flat = flat - flat.mean(0)
    alike = find_alike(flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6), NEIGHBOURS)
    pixels = fit_of_values(planted.labels.tolist(), alike.nearest, alike.similarity).share
    nearest = alike.similarity[:, 0].astype(np.float64)
    loss, chance = ddpm.losses(model, planted.images), np.random.default_rng(9).standard_normal(len(flat))
    ways = {
        "swapped labels": (planted.swapped, 1 - np.nan_to_num(found.fit), 1 - np.nan_to_num(pixels), loss),
        "near-copies": (planted.copied, found.similarity, nearest, -loss),
        "foreign pictures": (planted.foreign, found.self_influence, -nearest, loss),
    }
    names = ("audit, by gradient", "likeness of pixels", "training loss", "chance")
    return {
        what: [(name, true, values) for name, values in zip(names, (*of, chance), strict=True)]
        for what, (true, *of) in ways.items()
    }


def area_under_curve(values: Doubles, true: Bools) -> float:
    """How often a planted sample has the larger value of two, one planted and one not; equal ones count half."""
    order = np.sort(values[~true])
    below, at_most = (np.searchsorted(order, values[true], side) for side in ("left", "right"))
    return float((below + at_most).mean() / 2 / len(order))


def precision(values: Doubles, true: Bools) -> float:
    """The part of planted samples among as many as were planted, with the largest values."""
    best = np.argsort(-values, kind="stable")[: true.sum()]
    return float(true[best].mean())


def with_intervals(values: Doubles, true: Bools, resamples: int) -> tuple[str, str]:
    """Precision and area with 95 % intervals, which draw planted samples and others anew."""
    random, cells = np.random.default_rng(0), []
    planted, others = np.flatnonzero(true), np.flatnonzero(~true)
    drawn = [
        np.concatenate([random.choice(planted, len(planted)), random.choice(others, len(others))])
        for _ in range(resamples)
    ]
    for measure in (precision, area_under_curve):
        low, high = np.percentile([measure(values[some], true[some]) for some in drawn], [2.5, 97.5])
        cells.append(f"{measure(values, true):.3f} ({low:.3f} to {high:.3f})")
    return cells[0], cells[1]


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    dimension: Annotated[int, typer.Option(help="v.")] = DIMENSION,
    resamples: Annotated[int, typer.Option(help="Of the intervals.")] = RESAMPLES,
) -> None:
    """Trains, audits, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    planted = plant()
    found = measures(work, planted, dimension)
    page = Page(
        "An audit of digits with planted faults",
        command_line("audit_evidence.py"),
        time.monotonic() - began,
        f"A model of {subsets.SAMPLES:,} digits as in lds.md, of which {SWAPPED:.0%} have the label of another digit, "
        f"{COPIED:.0%} are copies of others with noise of {NOISE:g}, and {FOREIGN:.0%} are pieces of photographs. "
        "Precision is the part of planted samples among as many as were planted; AUC is how often a planted sample is "
        "before another one. Of near-copies, both the copy and the copied are to be found. The same measures of pixels "
        "take the nearest samples by the cosine of pixels, less their mean. Intervals are 95 %, and resample samples; "
        "one model, one seed.",
    )
    for what, ways in found.items():
        page.heading(f"{what[0].upper()}{what[1:]}: {int(ways[0][1].sum())}")
        rows = [(name, *with_intervals(values, true, resamples)) for name, true, values in ways]
        page.table(("way", "precision (95 %)", "AUC (95 %)"), rows)
    page.write(out / "audit_evidence.md")


if __name__ == "__main__":
    typer.run(main)
