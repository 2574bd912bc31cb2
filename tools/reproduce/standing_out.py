"""Does what stands out mean something? Near-copies of training digits, noise, and pictures of another kind as queries.

    python tools/reproduce/standing_out.py --work WORK        WORK may be that of subsets.py

Resumable: WORK keeps what is done. The queries are held-out and generated digits; training digits with a little noise,
whose own sample should stand out; and pictures that no sample made: pure noise, and pieces of photographs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import audit_evidence
import ddpm
import numpy as np
import sketches
import subsets
import torch
import typer
from numpy.typing import NDArray
from page import Page, command_line

from dmin_trace.audit.intervals import mean_estimate
from dmin_trace.query import TopK, Trace
from dmin_trace.search import Score
from dmin_trace.store import Queries, open_store

DIMENSION = 2**14
SCORES: tuple[Score, ...] = ("deflated", "dmin")


def queries(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], NDArray[np.int64]]:
    """Pictures by kind, subsets.QUERIES of each, and the samples that the near-copies are of."""
    digits, count = subsets.digits(), subsets.QUERIES
    random = np.random.default_rng(11)
    own = random.permutation(len(digits.images))[:count]
    noise = torch.from_numpy(random.normal(0, audit_evidence.NOISE, (count, 1, 8, 8))).float()
    plain = torch.from_numpy(random.normal(0, 1, (count, 1, 8, 8))).float()
    return {
        "near-copies of samples": (digits.images[own] + noise).clamp(-1, 1),
        "held-out digits": digits.validation,
        "generated digits": ddpm.generate(model, count),
        "noise": plain.clamp(-1, 1),
        "pieces of photographs": audit_evidence.pieces(count, random),
    }, own


def answers(work: Path, dimension: int) -> tuple[dict[str, dict[Score, TopK]], NDArray[np.int64], int]:
    """The answers to each kind of query by each score, the samples of the near-copies, and N."""
    model = ddpm.load(subsets.full_model(work), subsets.RECIPE)
    asked, own = queries(model)
    digits, kind = subsets.digits(), sketches.Kind(tuple(ddpm.evenly(10)))
    folder = work / f"standing-out-v{dimension}"
    pictures = torch.cat(list(asked.values()))
    sketches.capture(folder, model, digits.images, digits.labels, pictures, kind, ("sign",), dimension)
    trace = Trace(open_store(folder / "sign.zarr"))
    rows = np.split(np.load(folder / "sign.npy"), np.cumsum([len(of) for of in asked.values()])[:-1])
    found: dict[str, dict[Score, TopK]] = {}
    for name, of_kind in zip(asked, rows, strict=True):
        names = tuple(f"{name} {n}" for n in range(len(of_kind)))
        given = Queries(of_kind, names, (None,) * len(names), trace.store.header.id)
        found[name] = {score: trace.top_k(given, len(trace), score) for score in SCORES}
    return found, own, len(trace)


def main(
    work: Annotated[Path, typer.Option(help="Folder for what is done.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    dimension: Annotated[int, typer.Option(help="v.")] = DIMENSION,
) -> None:
    """Asks all queries, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    found, own, samples = answers(work, dimension)
    page = Page(
        "What stands out: digits",
        command_line("standing_out.py"),
        time.monotonic() - began,
        f"The {samples:,} digits of lds.md, and {subsets.QUERIES} queries of each kind. Near-copies are training "
        f"digits with noise of {audit_evidence.NOISE:g} (of -1 to 1). Some: the part of the queries for which some "
        "sample stands out (95 %, over queries). Of noise and of photographs it is the rate of false alarms. Largest "
        "z: the median, over queries, of the first sample's.",
    )
    rows = []
    for name, by_score in found.items():
        for score, top in by_score.items():
            counts = np.array([background.standing_out or 0 for background in top.backgrounds])
            some = mean_estimate((counts > 0).astype(np.float64), seed=0)
            middle = np.percentile(counts, [25, 50, 75])
            rows.append(
                (
                    name,
                    score,
                    f"{some.value:.2f} ({some.low:.2f} to {some.high:.2f})",
                    f"{middle[1]:.0f} ({middle[0]:.0f} to {middle[2]:.0f})",
                    f"{np.median(top.z[:, 0]):.1f}",
                )
            )
    page.table(("queries", "score", "some (95 %)", "samples that stand out (quartiles)", "largest z"), rows)
    lines = []
    for score, top in found["near-copies of samples"].items():
        at = [int(np.flatnonzero(of_query == sample)[0]) for of_query, sample in zip(top.samples, own, strict=True)]
        hits = [hits[place] for hits, place in zip(top.hits, at, strict=True)]
        recall = mean_estimate(np.array([float(hit.stands_out or False) for hit in hits]), seed=0)
        first = mean_estimate(np.array([float(hit.rank == 1) for hit in hits]), seed=0)
        z = np.median([hit.z or 0 for hit in hits])
        cells = [f"{of.value:.2f} ({of.low:.2f} to {of.high:.2f})" for of in (recall, first)]
        lines.append((score, *cells, f"{z:.1f}"))
    page.heading("The sample that a near-copy is of")
    page.table(("score", "stands out (95 %)", "is first (95 %)", "its z, median"), lines)
    page.write(out / "standing_out.md")


if __name__ == "__main__":
    typer.run(main)
