"""Does the model lose what a score says it got? Digits without the samples that a score ranks first.

    python tools/reproduce/counterfactual.py --work WORK        after lds.py with the same WORK

For each query and each score the top samples are left out and the model is trained again; random ones are left out
beside it. The measure is how much the query's loss grows, and how far the picture made from the same noise moves.
Resumable: WORK keeps every model's losses.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import ddpm
import lds
import numpy as np
import subsets
import torch
import typer
from counterfactual_measure import counterfactual
from numpy.typing import NDArray
from page import Page
from rich.progress import track

REMOVED = 50
"""Of a thousand samples."""
SCORES: tuple[tuple[str, str | None], ...] = (
    ("store: loss, none: dmin", None),
    ("store: loss, sign: dmin", None),
    ("store: loss, sign: deflated", None),
    ("whole: squared output, none: D-TRAK, best", None),
    ("store: loss, sign: deflated, best r", "8"),
    ("store: loss, sign: deflated, best r", "32"),
    ("store: loss, sign: deflated, best r", "256"),
)
"""Methods of lds.py, each with the strength that lds.py chose, or one that is given."""
RANDOM = 4
"""Random sets, that every query is compared with."""


def _job(work: Path, name: str, removed: NDArray[np.int64]) -> None:
    torch.set_num_threads(1)
    kept = np.setdiff1d(np.arange(subsets.SAMPLES), removed)
    model = ddpm.train(subsets.RECIPE, subsets.digits().images[kept])
    np.savez(
        work / f".{name}.npz",
        losses=ddpm.losses(model, subsets.queries(work)),
        pictures=ddpm.generate(model, subsets.QUERIES).numpy(),
    )
    (work / f".{name}.npz").rename(work / f"counterfactual/{name}.npz")


def _name(removed: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.sort(removed).astype("<i8").tobytes()).hexdigest()[:16]


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    asked: Annotated[int, typer.Option(help="Queries; half of them held out, half generated.")] = 8,
    processes: Annotated[int, typer.Option(help="As many trainings at a time, each on one thread.")] = 2,
) -> None:
    """Trains without the top samples, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    (work / "counterfactual").mkdir(exist_ok=True)
    found = lds.run(work)
    # Odd ones alone: nothing was chosen by them.
    half = np.linspace(0, subsets.QUERIES // 2 - 1, asked // 2).astype(int) * 2 + 1
    queries = np.concatenate([half, half + subsets.QUERIES])
    at_random = [np.random.default_rng([2, n]).permutation(subsets.SAMPLES)[:REMOVED] for n in range(RANDOM)]
    strengths = [given or chosen(work, found, method) for method, given in SCORES]
    best = {
        (method, strength, query): np.argsort(-found[method][strength][query], kind="stable")[:REMOVED]
        for (method, _), strength in zip(SCORES, strengths, strict=True)
        for query in queries
    }
    # Named by what is left out: a score that changes finds no models of before, and two that agree share one.
    jobs = {_name(removed): removed for removed in (*at_random, *best.values())}
    waiting = {name: top for name, top in jobs.items() if not (work / f"counterfactual/{name}.npz").exists()}
    with ProcessPoolExecutor(processes) as pool:
        running = [pool.submit(_job, work, name, top) for name, top in waiting.items()]
        for job in track(as_completed(running), "models", total=len(running)):
            job.result()
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE)
    full, pictures = ddpm.losses(model, subsets.queries(work)), ddpm.generate(model, subsets.QUERIES).numpy()
    kept = {name: dict(np.load(work / f"counterfactual/{name}.npz")) for name in jobs}
    losses = np.stack([kept[_name(removed)]["losses"] for removed in at_random])
    moved = np.stack([_moved(kept[_name(removed)]["pictures"], pictures) for removed in at_random])
    page = Page(
        "Does the model lose what a score says it got? Retraining without the top samples",
        "python tools/reproduce/counterfactual.py --work WORK",
        time.monotonic() - began,
        f"Digits, the model of lds.md. For each of {len(queries)} queries, half of them held out, half generated, the "
        f"{REMOVED} samples of {subsets.SAMPLES:,} with the largest score are left out, the model is trained again "
        f"from the same beginning, and its loss on the query is compared with the full model's; {RANDOM} random sets "
        "of the same size are left out beside it. Pictures: how far (root of the mean square, pixels from -1 to 1) the "
        "picture that the model makes from a generated query's noise lies from the query.",
    )
    rows = []
    for (method, _), strength in zip(SCORES, strengths, strict=True):
        score = f"{method}, {strength}".rstrip(" ,")
        of = [kept[_name(best[method, strength, query])] for query in queries]
        top = np.array([one["losses"][query] for one, query in zip(of, queries, strict=True)])
        change = counterfactual(full[queries][None], top[None], losses[:, queries])
        generated = queries[queries >= subsets.QUERIES] - subsets.QUERIES
        far = np.array(
            [_moved(one["pictures"], pictures)[q] for one, q in zip(of[-len(generated) :], generated, strict=True)]
        )
        rows.append((score, change, far.mean(), moved[:, generated].mean()))
    base = rows[0][1].top.value
    page.table(
        (
            "score",
            "change of loss",
            "95 %",
            "times plain DMin",
            "random ones",
            "times random",
            "picture",
            "picture, random",
        ),
        [
            (
                score,
                f"{change.top.value:.4f}",
                f"{change.top.low:.4f} to {change.top.high:.4f}",
                f"{change.top.value / base:.2f}",
                f"{change.random.value:.4f}",
                f"{change.ratio.value:.1f}",
                f"{far:.3f}",
                f"{random:.3f}",
            )
            for score, change, far, random in rows
        ],
    )
    page.write(out / "counterfactual.md")


def chosen(work: Path, found: dict[str, dict[str, NDArray[np.float64]]], method: str) -> str:
    """The strength of a method that is best on the other half of the queries."""
    of_models, losses = subsets.truth(work, len(list((work / "subsets").glob("*.npy"))))
    return lds.best_strength(found[method], of_models, losses[0], np.arange(0, 2 * subsets.QUERIES, 2))


def _moved(pictures: NDArray[np.float32], from_these: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.sqrt(((pictures - from_these) ** 2).mean((1, 2, 3))), np.float64)


if __name__ == "__main__":
    typer.run(main)
