"""Does a method find what is known to be there? Near-copies of samples, and concepts that few samples have.

    python tools/reproduce/finetune_truth.py --data emoji32.npz --recipe sd-lora
    python tools/reproduce/gradient_file.py --truth sd-lora --work WORK --data emoji32.npz
    python tools/reproduce/finetune_retrieval.py --data emoji32.npz --work WORK --recipe sd-lora

Nothing is trained. Near-copies of pictures of the fine-tuning set are asked about: the original is known. Pictures of
the new subcategories are asked about, held out and generated: the samples of their subcategory are known.
WORK/retrieval keeps the queries and their gradients; a run that was interrupted goes on from there.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
import typer
from emoji_base import BASES
from emoji_data import NEW, Division, caption
from finetune import RECIPES, Tuning
from finetune_truth import TRUTHS, Truth
from gradient_file import Gradients, Objective, ask_pictures, capture, open_gradients
from methods import RIDGE, SQUARED, TIMESTEPS, Given, given_of, methods, scores_of
from near_copies import WAYS
from numpy.typing import NDArray
from page import Page
from ranking import average_precision, chance_average_precision, precision, ranks
from row_kernels import Doubles

from dmin_trace.audit.intervals import RESAMPLES, Estimate, mean_estimate

COPIED = 20
"""Samples of which there are near-copies."""
ASKED = 6
"""Queries of each concept and kind at most."""
OTHER = "JPEG, another caption"
"""The way of near-copies whose caption is that of another sample of the same subcategory."""
HELD_OUT, GENERATED = "held out", "generated"
GROUPS = {"2 to 3 % of the set": NEW[3:], "5 to 10 % of the set": NEW[:3]}


@dataclass(frozen=True)
class Wanted:
    """Queries, and what a method should find.

    images, captions: (Q, 32, 32, 3) uint8, and Q.
    ways: how a near-copy was made, or the kind of a concept's query, HELD_OUT or GENERATED.
    originals: (Q,) places in the fine-tuning set; -1 for a concept's query.
    concepts: the subcategory of a concept's query; empty for a near-copy.
    """

    images: NDArray[np.uint8]
    captions: list[str]
    ways: NDArray[np.str_]
    originals: NDArray[np.int64]
    concepts: NDArray[np.str_]

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file of `write`."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["images"], file["captions"].tolist(), file["ways"], file["originals"], file["concepts"])

    def write(self, path: Path) -> None:
        """To a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **{**vars(self), "captions": np.array(self.captions)})
        partial.replace(path)


@dataclass(frozen=True)
class _Query:
    image: NDArray[np.uint8]
    caption: str
    way: str
    original: int
    concept: str


def near_copies(division: Division) -> list[_Query]:
    """Of COPIED samples, each in every way; their subcategories have another sample, whose caption is lent."""
    tuning, draw = division.tuning, np.random.default_rng(23)
    places: dict[str, list[int]] = {}
    for n, category in enumerate(tuning.categories):
        places.setdefault(category, []).append(n)
    several = [n for n, category in enumerate(tuning.categories) if len(places[category]) > 1]
    found = []
    for n in draw.permutation(several)[:COPIED].tolist():
        category = tuning.categories[n]
        lent = int(draw.choice([k for k in places[category] if k != n]))
        for way, change in WAYS.items():
            found.append(_Query(change(tuning.images[n]), tuning.captions[n], way, n, ""))
        found.append(_Query(WAYS["JPEG"](tuning.images[n]), caption(category, tuning.names[lent]), OTHER, n, ""))
    return found


def of_concepts(tuning: Tuning) -> list[_Query]:
    """Held-out pictures of each new subcategory, and pictures that the model in place makes for samples' captions."""
    held, samples, draw = tuning.division.held_out, tuning.division.tuning, np.random.default_rng(29)
    found, prompts = [], []
    for concept in NEW:
        kept = [n for n, category in enumerate(held.categories) if category == concept][:ASKED]
        found += [_Query(held.images[n], held.captions[n], HELD_OUT, -1, concept) for n in kept]
        of = draw.permutation([n for n, category in enumerate(samples.categories) if category == concept])[:ASKED]
        prompts += [(samples.captions[n], concept) for n in of.tolist()]
    made = tuning.generate([told for told, _ in prompts], seed=11)
    found += [_Query(x, told, GENERATED, -1, of) for x, (told, of) in zip(made, prompts, strict=True)]
    return found


def wanted_of(tuning: Tuning, path: Path) -> Wanted:
    """All queries, made once by the model in place."""
    if not path.exists():
        found = [*near_copies(tuning.division), *of_concepts(tuning)]
        Wanted(
            np.stack([q.image for q in found]),
            [q.caption for q in found],
            np.array([q.way for q in found]),
            np.array([q.original for q in found]),
            np.array([q.concept for q in found]),
        ).write(path)
    return Wanted.read(path)


def kept_folder(work: Path, truths: Path, recipe: str, tuning: Tuning, asked: str = "") -> Path:
    """Where queries and gradients of a model are kept: of another model, other data or other queries it is another."""
    told = (truths / f"{recipe}.safetensors").read_bytes() + tuning.fingerprint.encode() + asked.encode()
    return work / f"{recipe}-{hashlib.sha256(told).hexdigest()[:12]}"


# -- gradients ---------------------------------------------------------------------------------------------------------


def joined(first: Gradients, more: Gradients) -> Gradients:
    """The samples of one file and the queries of another, at the passes of the other."""
    if first.shapes != more.shapes:
        raise typer.BadParameter("Queries and samples have gradients of other parameters.", param_hint="--work")
    places = [first.passes.index(p) for p in more.passes]
    rows, norms = (
        np.concatenate([np.asarray(one[: first.samples])[:, places], other])
        for one, other in ((first.rows, more.rows), (first.norms, more.norms))
    )
    return Gradients(rows, norms, more.passes, first.shapes, first.samples)


def given_for(tuning: Tuning, wanted: Wanted, samples: Given, folder: Path) -> Given:
    """What there is of these queries beside the samples; their gradients are computed where they are not kept."""

    def of(objective: Objective, first: Gradients) -> Gradients:
        asked = ask_pictures(tuning, wanted.images, wanted.captions, 0, objective)
        capture(asked, folder / objective, tuple((t, 0) for t in TIMESTEPS))
        return joined(first, open_gradients(folder / objective))

    return Given(
        samples.samples,
        wanted.images,
        of("loss", samples.loss),
        None if samples.squared is None else of(SQUARED, samples.squared),
        folder / "kernels",
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def copy_lines(wanted: Wanted, scores: dict[str, Doubles]) -> list[list[str]]:
    """Of the table of near-copies; intervals resample the pictures that were copied."""
    lines = []
    for way in ("all with the same caption", *WAYS, OTHER):
        asked = np.isin(wanted.ways, list(WAYS) if way.startswith("all") else [way])
        originals = wanted.originals[asked]
        for name, of in scores.items():
            rank = ranks(of[asked], originals)
            measures = [rank <= 1, rank <= 5, 1 / rank]
            lines.append(
                [
                    way,
                    name,
                    *(_told(mean_estimate(_each(m.astype(np.float64), originals), 0, RESAMPLES)) for m in measures),
                    f"{np.median(rank):g}",
                    f"{rank.max()}",
                ]
            )
    return lines


def _each(values: Doubles, originals: NDArray[np.int64]) -> Doubles:
    """The mean of each picture's near-copies."""
    return np.array([values[originals == n].mean() for n in np.unique(originals)])


def concept_lines(wanted: Wanted, scores: dict[str, Doubles], categories: tuple[str, ...]) -> list[list[str]]:
    """Of the table of concepts: groups of them, then each."""
    relevant = {concept: np.array([category == concept for category in categories]) for concept in NEW}
    lines = []
    for told, concepts in [*GROUPS.items(), *((concept, (concept,)) for concept in NEW)]:
        for kind in (HELD_OUT, GENERATED):
            here = {c: np.flatnonzero((wanted.concepts == c) & (wanted.ways == kind)) for c in concepts}
            count = sum(len(places) for places in here.values())
            if not count:
                continue
            sizes = [int(relevant[c].sum()) for c in concepts]
            label = [told, " ".join(str(size) for size in sizes), f"{kind} ({count})"]
            for name, of in scores.items():
                measured = [
                    np.concatenate([measure(of[here[c]], relevant[c]) for c in concepts if len(here[c])])
                    for measure in (precision, average_precision)
                ]
                lines.append([*label, name, *(_told(mean_estimate(each, 0, RESAMPLES)) for each in measured)])
            weights = [len(here[c]) for c in concepts]
            by_chance = [
                [size / len(categories) for size in sizes],
                [chance_average_precision(len(categories), size) for size in sizes],
            ]
            lines.append([*label, "*chance*", *(f"{np.average(each, weights=weights):.3f}" for each in by_chance)])
    return lines


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.2f} to {estimate.high:.2f})"


def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    work: Annotated[Path, typer.Option(help="The folder of gradient_file.py; WORK/retrieval keeps the queries.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "sd-lora",
    only: Annotated[str, typer.Option("--methods", help="Names of methods.py; all if not given.")] = "",
    ridge: Annotated[float, typer.Option(help="The strength of TRAK and D-TRAK.")] = RIDGE,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    truths: Annotated[Path, typer.Option(help="The folder of finetune_truth.py.")] = TRUTHS,
    bases: Annotated[Path, typer.Option(help="The folder of emoji_base.py.")] = BASES,
) -> None:
    """Asks about near-copies and concepts, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    tuning = Tuning(RECIPES[recipe], data, compiled=False, bases=bases)
    samples = given_of(tuning, Truth.read(truths / f"{recipe}.npz"), truths, work, recipe)
    folder = kept_folder(work / "retrieval", truths, recipe, tuning)
    wanted = wanted_of(tuning, folder / "queries.npz")
    scores = scores_of(given_for(tuning, wanted, samples, folder), methods(ridge), only)
    page = Page(
        f"Does a method find what is known to be there? {recipe}",
        f"python tools/reproduce/finetune_retrieval.py --data emoji32.npz --work WORK --recipe {recipe} --methods "
        f"{','.join(scores)}",
        time.monotonic() - began,
        f"The model that is fine-tuned on {len(samples.samples)} captioned emoji. Methods: "
        f"tools/reproduce/methods.py; TRAK and D-TRAK have the ridge {ridge:g}. In brackets 95 % intervals.",
    )
    page.heading("Near-copies")
    page.text(
        f"{COPIED} samples, each shifted by a pixel, with warmer colours, with noise and after a JPEG round trip, are "
        "asked about with the sample's caption; the last also with the caption of another sample of the same "
        "subcategory. Recall is the share of queries whose original is first, or among the first five, of all samples. "
        "The next is the mean of 1 / rank. Of equal scores the original is last. Intervals resample the pictures that "
        "were copied."
    )
    page.table(
        ("copies", "method", "recall@1", "recall@5", "mean of 1 / rank", "median rank", "largest rank"),
        copy_lines(wanted, scores),
    )
    page.heading("Concepts")
    page.text(
        "Queries are pictures of the subcategories that only fine-tuning has seen, held out or generated for captions "
        f"of samples, at most {ASKED} of each. What should be found are all samples of the query's subcategory; their "
        "number is the concept's size. Precision is the share of them among as many samples as the concept has. "
        "Average precision is the mean of the precisions down to each of them. Chance is what a random order is "
        "expected to have. Intervals resample queries."
    )
    page.table(
        ("concept", "size", "queries", "method", "precision at the size", "average precision"),
        concept_lines(wanted, scores, tuning.division.tuning.categories),
    )
    page.write(out / f"finetune_retrieval_{recipe}.md")


if __name__ == "__main__":
    typer.run(main)
