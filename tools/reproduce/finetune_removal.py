"""Does a fine-tuned model lose what a method says it got? Retraining without the samples that a method ranks first.

    python tools/reproduce/finetune_truth.py --data emoji32.npz --recipe sd-lora
    python tools/reproduce/gradient_file.py --truth sd-lora --work WORK --data emoji32.npz
    python tools/reproduce/finetune_removal.py --data emoji32.npz --work WORK --recipe sd-lora

For each query and each method the samples with the largest scores are left out, and the recipe is trained again with
several seeds. As many random samples are left out beside it. The growth of a query's loss is measured against models of
the same seeds that were trained on all samples; for a generated query also how far the picture from its noise moves.
WORK/removal keeps every training. A run goes on from there, and a method that is added trains only what is new.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import baselines
import numpy as np
import torch
import typer
from emoji_base import BASES
from emoji_data import NEW
from finetune import RECIPES, Queries, Tuning
from finetune_truth import TRUTHS, Truth
from methods import PAPER, RIDGE, given_of, methods, scores_of
from numpy.typing import NDArray
from page import Page
from rich.progress import track
from row_kernels import Doubles
from trainings import Places, Trained, Trainings

from dmin_trace.audit.intervals import RESAMPLES, Estimate, bootstrap, mean_estimate

PERCENTS = "5,10,2"
SEEDS = "10,11,12"
RANDOM = 2
"""Random sets of each size. All queries are compared with them."""
CHANCE = "random samples"
NONE = np.empty(0, np.int64)
SECONDS = 30
"""That a training takes, about: for what is said at the start."""


# -- what is trained ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is left out.

    queries: their places in the truth.
    top: of each percentage and each method, the samples (len(queries), k) with the largest scores.
    random: of each percentage, the random sets, (RANDOM, k).
    """

    queries: Places
    top: dict[int, dict[str, Places]]
    random: dict[int, Places]
    seeds: list[int]

    def jobs(self) -> Iterator[tuple[Places, int]]:
        """Samples to leave out and a seed, a percentage after the other and in it a seed after the other."""
        for percent in self.top:
            for seed in self.seeds:
                yield NONE, seed
                for removed in self.random[percent]:
                    yield removed, seed
                for n in range(len(self.queries)):
                    for of in self.top[percent].values():
                        yield of[n], seed


def chosen_queries(queries: Queries, held_out: int, generated: int) -> Places:
    """So many of each kind, at odd places, since nothing is chosen by these; half of them of new subcategories."""
    half = len(queries.captions) // 2
    reported = np.arange(1, len(queries.captions), 2)
    new = np.array([category in NEW for category in queries.categories])[reported]
    found: list[int] = []
    for kind, count in ((reported < half, held_out), (reported >= half, generated)):
        first = _spread(reported[kind & new], count - count // 2)
        found += [*first, *_spread(reported[kind & ~new], count - len(first))]
    return np.array(sorted(found))


def _spread(places: Places, count: int) -> list[int]:
    """So many of the places, evenly; all of them where there are no more."""
    count = min(count, len(places))
    return [int(places[k]) for k in np.linspace(0, len(places) - 1, count).astype(int)] if count else []


def make_plan(scores: dict[str, Doubles], queries: Places, percents: list[int], seeds: list[int]) -> Plan:
    """What is left out for scores (Q, N)."""
    samples = next(iter(scores.values())).shape[1]
    top, random = {}, {}
    for percent in percents:
        count = max(1, round(samples * percent / 100))
        top[percent] = {name: np.argsort(-of[queries], axis=1, kind="stable")[:, :count] for name, of in scores.items()}
        random[percent] = np.stack([np.random.default_rng([4, n]).permutation(samples)[:count] for n in range(RANDOM)])
    return Plan(queries, top, random, seeds)


def kept_scores(folder: Path, names: list[str], shape: tuple[int, int]) -> dict[str, Doubles]:
    """Scores (Q, N) that finetune_lds.py keeps, by their files' names: a method and its strength."""
    found = {}
    for name in names:
        path = folder / f"{name}.npy"
        if not path.exists():
            known = ", ".join(sorted(f"'{of.stem}'" for of in folder.glob("*.npy"))) or "none; run finetune_lds.py"
            raise typer.BadParameter(f"{path} is missing; there are {known}.", param_hint="--scores")
        found[name] = np.load(path)
        if found[name].shape != shape:
            raise typer.BadParameter(f"{path} is {found[name].shape}; {shape} is expected.", param_hint="--scores")
    return found


def train_all(trainings: Trainings, plan: Plan, minutes: float, part: tuple[int, int]) -> int:
    """Trains what is missing, or as much of it as there is time for; how many were trained."""
    jobs = {trainings.path(removed, seed): (removed, seed) for removed, seed in plan.jobs()}
    missing = [job for path, job in jobs.items() if not path.exists()]
    waiting = missing[part[0] :: part[1]]
    print(
        f"{len(jobs)} different trainings are planned, of which {len(jobs) - len(missing)} are kept; this process has "
        f"{len(waiting)} to train, about {len(waiting) * SECONDS / 3600:.1f} hours on a core.",
        flush=True,
    )
    began, done = time.monotonic(), 0
    for removed, seed in track(waiting, f"train {trainings.tuning.recipe.kind} without samples"):
        if time.monotonic() - began > 60 * minutes:
            break
        trainings.train(removed, seed)
        done += 1
    return done


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What a method's removals did to the n queries that count, each a mean over seeds.

    growth: (n,) of the loss.
    moved, unlike: (n,) mean squared difference of pixels from 0 to 1, and 1 - SSIM, between the pictures; NaN for
        held-out queries.
    models: different trainings behind the figures, without those on all samples.
    """

    growth: Doubles
    moved: Doubles
    unlike: Doubles
    models: int


def measure(trainings: Trainings, plan: Plan, percent: int) -> tuple[Places, int, dict[str, Changes]]:
    """The changes by each method and by random samples.

    A query counts with a seed if all its trainings are kept, so that methods are compared by the same queries and
    seeds.

    Returns:
        The queries that count; how many pairs of query and seed; and the changes.
    """
    top, random = plan.top[percent], plan.random[percent]
    sets = {name: [[row] for row in of] for name, of in top.items()} | {CHANCE: [list(random) for _ in plan.queries]}

    def complete(n: int, seed: int) -> bool:
        needed = [NONE, *(removed for of in sets.values() for removed in of[n])]
        return all(trainings.path(removed, seed).exists() for removed in needed)

    pairs = [(n, seed) for n in range(len(plan.queries)) for seed in plan.seeds if complete(n, seed)]
    counted = sorted({n for n, _ in pairs})
    half = len(trainings.latents) // 2
    changes = {}
    for name, of in sets.items():
        each: dict[int, list[list[float]]] = {n: [] for n in counted}
        models = set()
        for n, seed in pairs:
            full = trainings.read(NONE, seed)
            models |= {trainings.path(removed, seed) for removed in of[n]}
            each[n] += [_change(full, trainings.read(removed, seed), int(plan.queries[n]), half) for removed in of[n]]
        means = np.array([np.mean(each[n], axis=0) for n in counted]).reshape(len(counted), 3)
        growth, moved, unlike = means.T
        changes[name] = Changes(growth, moved, unlike, len(models))
    return plan.queries[counted], len(pairs), changes


def _change(full: Trained, trained: Trained, query: int, half: int) -> list[float]:
    """Growth of the query's loss, and both distances of its pictures."""
    growth = float(trained.losses[query] - full.losses[query])
    if query < half:
        return [growth, np.nan, np.nan]
    before, after = (_picture(x.pictures[query - half]) for x in (full, trained))
    return [growth, float(((after - before) ** 2).mean()), 1 - float(baselines.ssim(before, after)[0, 0])]


def _picture(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(1, 3, 32, 32) from 0 to 1, as `baselines.ssim` takes it."""
    return np.asarray(pixels.transpose(2, 0, 1)[None] / 255, np.float32)


def ratio(one: Doubles, other: Doubles) -> Estimate:
    """The mean of one over that of the other, (n,) each, with an interval that resamples queries."""

    def of(places: Places) -> Doubles:
        below = other[places].mean()
        return np.array([one[places].mean() / below if below > 0 else np.nan])

    count = len(one)
    return bootstrap(of(np.arange(count)), lambda draw: of(draw.integers(count, size=count)), count, 0, RESAMPLES)[0]


# -- the page ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "queries",
    "left out by",
    "models",
    "growth",
    "95 %",
    "times the paper's",
    "times the best other",
    "picture: mean square",
    "picture: 1 - SSIM",
)


def lines_of(queries: Queries, counted: Places, changes: dict[str, Changes]) -> list[list[str]]:
    """Of the table of a percentage, a group of lines for each kind of query."""
    half = len(queries.captions) // 2
    new = np.array([queries.categories[q] in NEW for q in counted])
    kinds: dict[str, NDArray[np.bool_]] = {
        "all": np.ones(len(counted), bool),
        "held out": counted < half,
        "generated": counted >= half,
        "new": new,
        "known": ~new,
    }
    lines = []
    for kind, here in kinds.items():
        if not here.any():
            continue
        growth = {name: of.growth[here] for name, of in changes.items()}
        pictured = here & (counted >= half)
        for name, of in changes.items():
            mean = mean_estimate(growth[name], 0, RESAMPLES)
            others = [other for other in growth if other not in (name, CHANCE)]
            best = max(others, key=lambda other: float(growth[other].mean()), default=None)
            lines.append(
                [
                    f"{kind} ({here.sum()})",
                    name,
                    f"{of.models}" if kind == "all" else "",
                    f"{mean.value:.4f}",
                    f"{mean.low:.4f} to {mean.high:.4f}",
                    _told(ratio(growth[name], growth[PAPER])) if PAPER in growth and name != PAPER else "",
                    f"{_told(ratio(growth[name], growth[best]))} {best}" if best and name != CHANCE else "",
                    f"{of.moved[pictured].mean():.4f}" if pictured.any() else "",
                    f"{of.unlike[pictured].mean():.3f}" if pictured.any() else "",
                ]
            )
    return lines


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def write_page(trainings: Trainings, plan: Plan, queries: Queries, page: Page, path: Path) -> None:
    """A table for each percentage."""
    samples = len(trainings.tuning.latents)
    for percent in sorted(plan.top):
        counted, pairs, changes = measure(trainings, plan, percent)
        size = plan.random[percent].shape[1]
        page.heading(f"Without {percent} % of the samples")
        if not pairs:
            page.text("Not trained yet.")
            continue
        models = sum(of.models for of in changes.values())
        page.text(
            f"{size} of {samples} samples are left out. {len(counted)} of {len(plan.queries)} queries count, in "
            f"{pairs} of {len(plan.queries) * len(plan.seeds)} pairs of a query and a seed; a pair counts once all its "
            f"trainings are done. Behind the table are {models} trainings, where one that methods share counts for "
            f"each, and those of {len(plan.seeds)} seeds on all samples. The column models has the different trainings "
            "of a line."
        )
        page.table(COLUMNS, lines_of(queries, counted, changes))
    page.write(path)


def main(
    data: Annotated[Path, typer.Option(help="The emoji: a .npz with images, names and subcategories.")],
    work: Annotated[Path, typer.Option(help="The folder of gradient_file.py; WORK/removal keeps the trainings.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "sd-lora",
    held_out: Annotated[int, typer.Option(help="Queries that were held out.", min=0)] = 8,
    generated: Annotated[int, typer.Option(help="Queries that were generated.", min=0)] = 8,
    percents: Annotated[str, typer.Option(help="Of the samples, in the order of work.")] = PERCENTS,
    seeds: Annotated[str, typer.Option(help="Of the trainings, in the order of work.")] = SEEDS,
    only: Annotated[str, typer.Option("--methods", help="Names of methods.py; all if not given.")] = "",
    scored: Annotated[
        list[str] | None,
        typer.Option("--scores", help="Besides, scores of finetune_lds.py, as 'EK-FAC 0.1'; may be given again."),
    ] = None,
    ridge: Annotated[float, typer.Option(help="The strength of TRAK and D-TRAK.")] = RIDGE,
    minutes: Annotated[float, typer.Option(help="No training begins later than this.")] = float("inf"),
    part: Annotated[int, typer.Option(help="Which part of the trainings, from 0.", min=0)] = 0,
    parts: Annotated[int, typer.Option(help="Into how many processes the trainings are divided.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
    truths: Annotated[Path, typer.Option(help="The folder of finetune_truth.py.")] = TRUTHS,
    bases: Annotated[Path, typer.Option(help="The folder of emoji_base.py.")] = BASES,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile, which needs a C++ compiler.")] = True,
) -> None:
    """Trains without the top samples, and writes the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    if part >= parts:
        raise typer.BadParameter(f"{part} is none of 0 to {parts - 1}.", param_hint="--part")
    tuning = Tuning(RECIPES[recipe], data, compiled=compiled, bases=bases)
    truth = Truth.read(truths / f"{recipe}.npz")
    scores = scores_of(given_of(tuning, truth, truths, work, recipe), methods(ridge), only)
    scores |= kept_scores(work / recipe / "scores", scored or [], (len(truth.queries.images), truth.samples))
    queries = chosen_queries(truth.queries, held_out, generated)
    plan = make_plan(scores, queries, _numbers(percents, "--percents"), _numbers(seeds, "--seeds"))
    trainings = Trainings(tuning, truth.queries, bases, work / "removal" / recipe)
    done = train_all(trainings, plan, minutes, (part, parts))
    page = Page(
        f"Does a fine-tuned model lose what a method says it got? {recipe}",
        f"python tools/reproduce/finetune_removal.py --data emoji32.npz --work WORK --recipe {recipe} --percents "
        f"{percents} --seeds {seeds} --methods {','.join(name for name in scores if name not in (scored or []))}"
        + "".join(f" --scores '{name}'" for name in scored or []),
        time.monotonic() - began,
        f"For each of {len(queries)} queries and each method (tools/reproduce/methods.py) the samples with the largest "
        "score are left out, and the recipe is trained again with the same seeds as models that have all samples. "
        "Growth is that of the query's loss, against those models, a mean over seeds and queries; intervals resample "
        "queries. Ratios are of means. Pictures: how far the picture that a model makes for a generated query from the "
        f"query's noise lies from that of the model with all samples. {RANDOM} random sets of each size are left out "
        "beside it. New queries are of subcategories that only fine-tuning has seen. TRAK and D-TRAK have the ridge "
        f"{ridge:g}. This run trained {done} models.",
    )
    write_page(trainings, plan, truth.queries, page, out / f"finetune_removal_{recipe}.md")


def _numbers(given: str, option: str) -> list[int]:
    """Numbers with commas between, each once."""
    try:
        return list(dict.fromkeys(int(number) for number in given.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{given} has other than whole numbers.", param_hint=option) from None


if __name__ == "__main__":
    typer.run(main)
