"""Do totals of groups foretell which group's removal hurts a query most? Digits trained without whole classes.

    python tools/reproduce/groups.py --work WORK [--seeds 2] [--processes 2]

Resumable: WORK keeps what is done. A group is a digit, which the model is not told. For each, a model is trained on
all other samples; what it loses on a query more than models of all samples do is the truth. Totals of each weighting,
and of likeness of pixels, rank the groups: by their share, and by the mean of their scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, get_args

import ddpm
import numpy as np
import sketches
import subsets
import torch
import typer
from numpy.typing import NDArray
from page import Page, command_line
from rich.progress import track

from dmin_trace.audit.datamodeling import spearman
from dmin_trace.audit.intervals import mean_estimate
from dmin_trace.query import GroupTotal, Trace
from dmin_trace.query.totals import Weighting, totals_of
from dmin_trace.search import Score, fit_background
from dmin_trace.store import Queries, open_store

CLASSES = 10
DIMENSION = 2**14
ALL = -1
"""The class that is left out where none is."""

Doubles = NDArray[np.float64]


def losses_file(work: Path, left_out: int, seed: int) -> Path:
    """Of the model that is trained without a class."""
    return work / "groups" / f"{'all' if left_out == ALL else left_out}-{seed}.npy"


def train_one(work: Path, left_out: int, seed: int) -> None:
    """Trains without a class, and keeps the losses on the queries."""
    torch.set_num_threads(1)
    digits = subsets.digits()
    model = ddpm.train(
        subsets.RECIPE, digits.images[torch.from_numpy(digits.labels != left_out)], subsets.training_seed(seed)
    )
    path = losses_file(work, left_out, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, ddpm.losses(model, subsets.queries(work)))
    partial.replace(path)


def harm(work: Path, seeds: int) -> Doubles:
    """(classes, Q) how much more a query loses without each class, a mean of seeds."""

    def losses(left_out: int) -> Doubles:
        found: Doubles = np.mean([np.load(losses_file(work, left_out, seed)) for seed in range(seeds)], axis=0)
        return found

    return np.stack([losses(left_out) for left_out in range(CLASSES)]) - losses(ALL)


def predictions(work: Path, dimension: int) -> dict[str, Doubles]:
    """What each way foretells of each class, (classes, Q)."""
    digits, queries = subsets.digits(), subsets.queries(work)
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE)
    folder, kind = work / f"v{dimension}", sketches.Kind(tuple(ddpm.evenly(10)))
    sketches.capture(folder, model, digits.images, digits.labels, queries, kind, ("sign",), dimension)
    trace = Trace(open_store(folder / "sign.zarr"))
    rows, count = np.load(folder / "sign.npy"), len(queries)
    asked = Queries(rows, tuple(map(str, range(count))), (None,) * count, trace.store.header.id)
    pixels = [images.flatten(1).numpy().astype(np.float64) for images in (queries, digits.images)]
    first, second = (flat / np.linalg.norm(flat, axis=1, keepdims=True) for flat in (p - p.mean(0) for p in pixels))
    scores = {f"{score} score": trace.scores(asked, score).astype(np.float64) for score in get_args(Score)}
    scores["likeness of pixels"] = first @ second.T
    members: dict[str | None, NDArray[np.int64]] = {
        str(label): np.flatnonzero(digits.labels == label) for label in range(CLASSES)
    }
    found = {"chance": np.random.default_rng(0).standard_normal((CLASSES, count))}
    for name, of_samples in scores.items():
        known = [fit_background(own, len(own)) for own in of_samples]
        for weighting in get_args(Weighting):
            totals = totals_of(of_samples, known, members, weighting)
            found[f"{name}, {weighting}, share"] = _of_classes(totals, lambda total: total.share or 0.0)
            found[f"{name}, {weighting}, z of the mean"] = _of_classes(totals, lambda total: total.z or 0.0)
    return found


def _of_classes(totals: list[list[GroupTotal]], value: Callable[[GroupTotal], float]) -> Doubles:
    by_name = [{total.group: value(total) for total in of_query} for of_query in totals]
    return np.array([[of_query[str(label)] for of_query in by_name] for label in range(CLASSES)])


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    seeds: Annotated[int, typer.Option(help="Trainings without each class, and of all samples.")] = 2,
    processes: Annotated[int, typer.Option(help="As many trainings at a time, each on one thread.")] = 2,
    dimension: Annotated[int, typer.Option(help="v.")] = DIMENSION,
) -> None:
    """Trains without each class, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    subsets.queries(work)
    waiting = [(left_out, seed) for seed in range(seeds) for left_out in range(ALL, CLASSES)]
    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(train_one, work, *one) for one in waiting if not losses_file(work, *one).exists()]
        for job in track(as_completed(jobs), "models", total=len(jobs)):
            job.result()
    truth, foretold = harm(work, seeds), predictions(work, dimension)
    worst = truth.argmax(axis=0)
    page = Page(
        "Totals of groups: digits trained without whole classes",
        command_line("groups.py"),
        time.monotonic() - began,
        f"The {subsets.SAMPLES:,} digits of lds.md. For each of the ten digits {seeds} models are trained without it; "
        "the growth of a query's loss over that of models of all samples is the truth. Rank correlation is over the "
        "ten digits, a mean over queries; top 1 is how often the digit whose removal hurts most is named first. "
        "Intervals are 95 %, and resample queries.",
    )
    half = truth.shape[1] // 2
    for kind, here in (("validation", slice(half)), ("generated", slice(half, None))):
        page.heading(f"Queries: {kind}")
        lines = []
        for name, values in foretold.items():
            each = np.nan_to_num(spearman(values[:, here], truth[:, here]))
            first = (values[:, here].argmax(axis=0) == worst[here]).astype(np.float64)
            lines.append((name, *(_estimate(of) for of in (each, first))))
        page.table(("way", "rank correlation (95 %)", "top 1 (95 %)"), lines)
    page.write(out / "groups.md")


def _estimate(each: Doubles) -> str:
    found = mean_estimate(each, seed=0)
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


if __name__ == "__main__":
    typer.run(main)
