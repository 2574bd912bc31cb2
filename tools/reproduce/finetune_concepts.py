"""Does a query for a concept find the samples that have it, better than a query for the whole picture?

    python tools/reproduce/finetune_truth.py --data emoji32.npz --recipe sd-lora
    python tools/reproduce/gradient_file.py --truth sd-lora --work WORK --data emoji32.npz
    python tools/reproduce/finetune_concepts.py --data emoji32.npz --work WORK --recipe sd-lora

A concept is a word that several captions of the fine-tuning set have. A query for it is the difference of two gradients
on one picture: with its caption, and with the caption without the word (`dmin-trace query --concept`). What should be
found are the samples whose captions have the word. WORK/concepts keeps the gradients; a run that was interrupted goes
on from there.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from emoji_base import BASES
from emoji_page import Example, found_picture
from finetune import RECIPES, Queries, Tuning
from finetune_retrieval import joined, kept_folder
from finetune_truth import TRUTHS, Truth
from gradient_file import Asked, Gradients, Loss, ask_pictures, capture, open_gradients
from methods import TIMESTEPS, given_of
from numpy.typing import NDArray
from page import Page
from ranking import average_precision, chance_average_precision
from row_kernels import Doubles, Row, deflated, kernel_of, plain

from dmin_trace.audit.intervals import RESAMPLES, Estimate, mean_estimate
from dmin_trace.query.concept import prompt_without

LEAST, MOST = 6, 0.15
"""Samples that have a word: so many at least, and this share at most."""
NAMES_NOTHING = frozenset(("a", "an", "and", "emoji", "of", "the", "with"))
ALIKE = 0.5
"""Two words are told apart if fewer of the samples that have one of them have both."""
EACH = 10
"""Words that are listed on their own have so many queries at least."""
SHOWN = 6
"""Queries in the picture."""


@dataclass(frozen=True)
class Asking:
    """A query and a word of its caption; `other` is another word of it, "" if there is none that differs."""

    query: int
    word: str
    other: str = ""


def words_of(caption: str) -> set[str]:
    """The words of a caption that may name a concept."""
    return set(re.findall(r"[\w'’-]+", caption.lower())) - NAMES_NOTHING


def concepts_of(captions: list[str]) -> dict[str, NDArray[np.bool_]]:
    """Which of N samples have each word that neither few nor most of them have."""
    each = [words_of(caption) for caption in captions]
    found = {word: np.array([word in of for of in each]) for word in sorted(set.union(*each))}
    return {word: has for word, has in found.items() if LEAST <= has.sum() <= MOST * len(captions)}


def askings(captions: list[str], concepts: dict[str, NDArray[np.bool_]]) -> list[Asking]:
    """Every query for every concept of its caption."""
    found = []
    for n, caption in enumerate(captions):
        known = sorted(words_of(caption) & set(concepts))
        for word in known:
            others = [other for other in known if _overlap(concepts[word], concepts[other]) < ALIKE]
            found.append(Asking(n, word, others[0] if others else ""))
    return found


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def ask_differences(tuning: Tuning, queries: Queries, asked: list[Asking]) -> Asked:
    """The model in place, asked for the difference that a word makes."""
    images = queries.images[[one.query for one in asked]]
    captions = [queries.captions[one.query] for one in asked]
    whole = ask_pictures(tuning, images, captions, 0)
    less = ask_pictures(
        tuning, images, [prompt_without(told, one.word) for told, one in zip(captions, asked, strict=True)], 0
    )
    return Asked(whole.parameters, _difference(whole.loss, less.loss), 0, len(asked))


def _difference(one: Loss, other: Loss) -> Loss:
    return lambda parameters, n, t, draw: one(parameters, n, t, draw) - other(parameters, n, t, draw)


@dataclass(frozen=True)
class Precisions:
    """Average precision (n,) of the samples that have a word: by queries for it, for the whole picture, and for another
    word of the same caption, NaN where there is none."""

    concept: Doubles
    whole: Doubles
    other: Doubles


def precisions(
    asked: list[Asking], concepts: dict[str, NDArray[np.bool_]], of_words: Doubles, of_wholes: Doubles
) -> Precisions:
    """Of scores (n, N) of the queries for words, and (Q, N) of those for whole pictures."""
    places = {(one.query, one.word): n for n, one in enumerate(asked)}

    def of(scores: Doubles, word: str) -> float:
        return float(average_precision(scores[None], concepts[word])[0])

    return Precisions(
        np.array([of(of_words[n], one.word) for n, one in enumerate(asked)]),
        np.array([of(of_wholes[one.query], one.word) for one in asked]),
        np.array(
            [of(of_words[places[one.query, one.other]], one.word) if one.other else np.nan for one in asked],
        ),
    )


def lines_of(
    asked: list[Asking], concepts: dict[str, NDArray[np.bool_]], held_out: int, scored: dict[str, Precisions]
) -> list[list[str]]:
    """The table: all queries by kind, then words that many queries have."""
    words = np.array([one.word for one in asked])
    queries = np.array([one.query for one in asked])
    groups: dict[str, NDArray[np.bool_]] = {
        "all": np.ones(len(asked), bool),
        "held out": queries < held_out,
        "generated": queries >= held_out,
    }
    groups |= {f'"{word}"': words == word for word in concepts if (words == word).sum() >= EACH}
    samples = len(next(iter(concepts.values())))
    lines = []
    for told, here in groups.items():
        if not here.any():
            continue
        chance = np.mean([chance_average_precision(samples, int(concepts[word].sum())) for word in words[here]])
        for name, found in scored.items():
            told_apart = here & ~np.isnan(found.other)
            lines.append(
                [
                    f"{told} ({here.sum()})",
                    name,
                    _told(_mean(found.concept[here], queries[here])),
                    _told(_mean(found.whole[here], queries[here])),
                    _told(_mean((found.concept - found.whole)[here], queries[here])),
                    _paired(found.concept - found.other, told_apart, queries),
                    f"{chance:.3f}",
                ]
            )
    return lines


def _mean(values: Doubles, queries: NDArray[np.int64]) -> Estimate:
    """The mean over queries of the mean over a query's words; the interval resamples queries."""
    return mean_estimate(np.array([values[queries == q].mean() for q in np.unique(queries)]), 0, RESAMPLES)


def _paired(differences: Doubles, here: NDArray[np.bool_], queries: NDArray[np.int64]) -> str:
    return f"{_told(_mean(differences[here], queries[here]))}, {here.sum()}" if here.any() else ""


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.2f} to {estimate.high:.2f})"


def examples_of(
    tuning: Tuning, queries: Queries, asked: list[Asking], of_words: Doubles, of_wholes: Doubles
) -> list[Example]:
    """The first queries with two words that are told apart, each with another first word."""
    images = tuning.division.tuning.images
    found: dict[str, Example] = {}
    for n, one in enumerate(asked):
        if not one.other or one.word in found or any(one.query == asked[k].query for k in range(n) if asked[k].other):
            continue
        places = {a.word: k for k, a in enumerate(asked) if a.query == one.query}
        scores = {"whole": of_wholes[one.query], "first word": of_words[n], "second word": of_words[places[one.other]]}
        best = {name: list(images[np.argsort(-of, kind="stable")[:SHOWN]]) for name, of in scores.items()}
        found[one.word] = Example(f"{one.word}, {one.other}", queries.images[one.query], best)
    return list(found.values())[:SHOWN]


def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    work: Annotated[Path, typer.Option(help="The folder of gradient_file.py; WORK/concepts keeps the gradients.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "sd-lora",
    out: Annotated[Path, typer.Option(help="Folder for the page and its picture.")] = Path("docs/results"),
    truths: Annotated[Path, typer.Option(help="The folder of finetune_truth.py.")] = TRUTHS,
    bases: Annotated[Path, typer.Option(help="The folder of emoji_base.py.")] = BASES,
) -> None:
    """Asks for concepts, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    tuning = Tuning(RECIPES[recipe], data, compiled=False, bases=bases)
    truth = Truth.read(truths / f"{recipe}.npz")
    queries, given = truth.queries, given_of(tuning, truth, truths, work, recipe)
    concepts = concepts_of(list(tuning.division.tuning.captions))
    asked = askings(queries.captions, concepts)
    folder = kept_folder(work / "concepts", truths, recipe, tuning, repr(asked))
    capture(ask_differences(tuning, queries, asked), folder / "loss", tuple((t, 0) for t in TIMESTEPS))
    of_words = joined(given.loss, open_gradients(folder / "loss"))

    def scores(gradients: Gradients, kept: Path) -> dict[str, Doubles]:
        kernels = [kernel_of(gradients, Row(((t, 0),)), kept) for t in TIMESTEPS]
        one = kernel_of(gradients, Row(tuple((t, 0) for t in TIMESTEPS), divided=False), kept)
        return {"deflated": deflated(kernels), "dmin": plain(kernels), "deflated, rows = 1": deflated([one])}

    both = scores(of_words, folder / "kernels"), scores(given.loss, given.kept)
    scored = {name: precisions(asked, concepts, both[0][name], both[1][name]) for name in both[0]}
    page = Page(
        f"Does a query for a concept find the samples that have it? {recipe}",
        f"python tools/reproduce/finetune_concepts.py --data emoji32.npz --work WORK --recipe {recipe}",
        time.monotonic() - began,
        f"The model that is fine-tuned on {len(given.samples)} captioned emoji. A concept is one of {len(concepts)} "
        f"words that {LEAST} or more captions have, and at most {MOST:.0%} of them. A query for it is the difference "
        "of two gradients on one picture, with its caption and with the caption without the word. Average precision "
        "is of the samples whose captions have the word. It is compared with that of the query for the whole picture; "
        "with that of the query for another word of the same caption, where there is one that other samples have; and "
        "with what a random order is expected to have. Means are over "
        "queries, of which a query has the mean of its words; 95 % intervals resample queries.",
    )
    page.heading("Average precision")
    columns = (
        *("queries", "score", "for the concept", "for the whole", "less the whole's"),
        *("less another word's, of how many", "chance"),
    )
    page.table(columns, lines_of(asked, concepts, len(queries.captions) // 2, scored))
    examples = examples_of(tuning, queries, asked, both[0]["deflated"], both[1]["deflated"])
    if examples:
        page.heading("What was found")
        page.text(
            "Deflated scores: for the whole picture, and for two of the words in its caption, which stand on the left."
        )
        name = f"finetune_concepts_{recipe}.png"
        out.mkdir(parents=True, exist_ok=True)
        found_picture(examples).save(out / name)
        page.picture(out / name, "Pictures and the training samples found for their words")
    page.write(out / f"finetune_concepts_{recipe}.md")


if __name__ == "__main__":
    typer.run(main)
