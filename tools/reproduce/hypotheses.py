"""Which rows and which sums of them foretell best what retrained models lose: every hypothesis on every truth.

    python tools/reproduce/gradient_file.py --truth digits --work WORK      (and sd-lora, sd3-lora)
    python tools/reproduce/hypotheses.py --work WORK

Queries are divided: one half chooses (development), the other is reported. A hypothesis is judged against the default
by the difference of their LDS, with an interval that resamples queries and models of both together. It is kept only if
it wins on every truth. WORK keeps the products of each kind of row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import row_kernels
import subsets
import torch
import typer
from ceiling import ceiling
from finetune_truth import TRUTHS, Truth
from gradient_file import BETWEEN, EVEN, Gradients, open_gradients
from numpy.typing import NDArray
from page import Page
from rich.progress import track
from row_kernels import Doubles, Kernel, Row, deflated, kernel_of, plain

from dmin_trace.audit.datamodeling import spearman
from dmin_trace.audit.intervals import Estimate

RESAMPLES = 400
MIN_TWINS = 8
"""Halves that are trained on twice, from which a ceiling is computed."""
LOW = EVEN[:5]
Passes = tuple[tuple[int, int], ...]


def once(timesteps: Iterable[int]) -> tuple[Row, ...]:
    """A row for each timestep, of one draw, with the sign."""
    return tuple(Row(((t, 0),)) for t in timesteps)


def pooled(
    timesteps: Iterable[int], draws: int = 1, transform: str = "sign", *, divided: bool = True
) -> tuple[Row, ...]:
    """One row of all timesteps."""
    return (Row(tuple((t, draw) for t in timesteps for draw in range(draws)), transform, divided),)


def summed(count: int, draws: int = 1, transform: str = "sign") -> tuple[Row, ...]:
    """So many rows of the ten timesteps' gradients as they are: of the gradient of a group's mean loss."""
    groups = np.array_split(np.array(EVEN), count)
    return tuple(row for group in groups for row in pooled(group.tolist(), draws, transform, divided=False))


def drawn(timesteps: Iterable[int], draws: int) -> tuple[Row, ...]:
    """A row for each timestep, of several draws."""
    return tuple(Row(tuple((t, draw) for draw in range(draws))) for t in timesteps)


@dataclass(frozen=True)
class Hypothesis:
    """Rows, and how scores are made from their kernels.

    group: the question that it answers.
    passes: of a sample, its cost.
    """

    group: str
    name: str
    rows: tuple[Row, ...]
    scores: Callable[[list[Kernel]], Doubles] = deflated

    @property
    def passes(self) -> int:
        """Of the model, for a sample."""
        return len({p for row in self.rows for p in row.passes})


DEFAULT = Hypothesis("default", "sign, deflated, T = 10", once(EVEN))


def _with(change: Callable[[Doubles], Doubles]) -> Callable[[list[Kernel]], Doubles]:
    return lambda kernels: change(deflated(kernels))


def _with_lengths(scores: Callable[[list[Kernel]], Doubles]) -> Callable[[list[Kernel]], Doubles]:
    return lambda kernels: row_kernels.with_lengths(scores(kernels), kernels)


def _directions(count: int) -> Callable[[list[Kernel]], Doubles]:
    return lambda kernels: deflated(kernels, count)


def hypotheses() -> list[Hypothesis]:
    """All of them, the default first."""
    every = tuple(sorted((*EVEN, *BETWEEN)))
    three_low, three_even = (50, 250, 450), (150, 450, 750)
    few = "few timesteps"
    listed = [
        DEFAULT,
        Hypothesis("default", "the paper: none, inner products, T = 10", _of("none", EVEN), plain),
        Hypothesis("default", "sign, inner products, T = 10", once(EVEN), plain),
        *(Hypothesis(few, f"t = {t}", once((t,))) for t in EVEN),
        Hypothesis(few, "t = 150, 250", once((150, 250))),
        Hypothesis(few, "t = 250, 750 (even)", once((250, 750))),
        Hypothesis(few, "t = 50, 250, 450 (low)", once(three_low)),
        Hypothesis(few, "t = 150, 450, 750", once(three_even)),
        Hypothesis(few, "t = 50, 150, 250, 350, 450 (low)", once(LOW)),
        Hypothesis(few, "t = 50, 250, 450, 650, 850", once(EVEN[::2])),
        Hypothesis(few, "t = 100, 300, 500, 700, 900 (even)", once((100, 300, 500, 700, 900))),
        Hypothesis(few, "t = 550 to 950 (high)", once(EVEN[5:])),
        Hypothesis(few, "T = 19", once(every)),
    ]
    noises = "more noises"
    listed += [
        Hypothesis(noises, "T = 10, 2 draws", drawn(EVEN, 2)),
        Hypothesis(noises, "T = 10, 4 draws", drawn(EVEN, 4)),
        Hypothesis(noises, "low five, 2 draws", drawn(LOW, 2)),
        Hypothesis(noises, "low five, 4 draws", drawn(LOW, 4)),
        Hypothesis(noises, "three even, 4 draws", drawn(three_even, 4)),
        Hypothesis(noises, "t = 250, 4 draws", drawn((250,), 4)),
    ]
    rows = "passes pooled into few rows"
    listed += [
        Hypothesis(rows, "T = 10 in one row", pooled(EVEN)),
        Hypothesis(rows, "T = 10 in two rows", (*pooled(EVEN[:5]), *pooled(EVEN[5:]))),
        Hypothesis(rows, "T = 10, 4 draws, in one row", pooled(EVEN, 4)),
        Hypothesis(rows, "T = 10, 4 draws, in two rows", (*pooled(EVEN[:5], 4), *pooled(EVEN[5:], 4))),
        Hypothesis(rows, "low five in one row", pooled(LOW)),
        Hypothesis(rows, "low five, 4 draws, in one row", pooled(LOW, 4)),
        Hypothesis(rows, "five even in one row", pooled((100, 300, 500, 700, 900))),
        Hypothesis(rows, "T = 19 in one row", pooled(every)),
    ]
    sums = "gradients as they are, summed into few rows"
    listed += [Hypothesis(sums, f"rows = {count}", summed(count)) for count in (1, 2, 3, 5)]
    listed += [
        Hypothesis(sums, "rows = 1, none", summed(1, transform="none")),
        Hypothesis(sums, "rows = 1, ridge 1", summed(1), partial(row_kernels.ridge, strength=1.0)),
        Hypothesis(sums, "rows = 1, ridge 3", summed(1), partial(row_kernels.ridge, strength=3.0)),
        *(Hypothesis(sums, f"rows = 1, {draws} draws", summed(1, draws)) for draws in (2, 4)),
        *(Hypothesis(sums, f"rows = 2, {draws} draws", summed(2, draws)) for draws in (2, 4)),
        Hypothesis(sums, "rows = 1, five of much noise", pooled(EVEN[5:], divided=False)),
        Hypothesis(sums, "rows = 1, five of little noise", pooled(LOW, divided=False)),
        Hypothesis(sums, "rows = 1, T = 19", pooled(every, divided=False)),
    ]
    white = "gradients over the roots of their second moments"
    ridge = partial(row_kernels.ridge, strength=3.0)
    every_way = (
        ("scaled", ((1, 1), (1, 4), (2, 1), (10, 1))),
        ("turned", ((1, 1),)),
        ("rotated", ((1, 1),)),
        ("whitened", ((1, 1),)),
    )
    for transform, ways in every_way:
        for count, draws in ways:
            told = f"{transform}, rows = {count}" + (f", {draws} draws" if draws > 1 else "")
            rows_of = summed(count, draws, transform)
            listed += [
                Hypothesis(white, f"{told}: inner products", rows_of, plain),
                Hypothesis(white, f"{told}: deflated", rows_of),
                Hypothesis(white, f"{told}: inner products, with lengths", rows_of, _with_lengths(plain)),
                Hypothesis(white, f"{told}: deflated, with lengths", rows_of, _with_lengths(deflated)),
                Hypothesis(white, f"{told}: ridge 3, with lengths", rows_of, _with_lengths(ridge)),
            ]
    what = "what is summed"
    squares = row_kernels.signed_squares
    listed += [
        Hypothesis(what, "signed squares", DEFAULT.rows, _with(squares)),
        *(
            Hypothesis(what, f"the strongest {share:.0%}", DEFAULT.rows, _with(_strongest(share)))
            for share in (0.05, 0.1, 0.2, 0.4)
        ),
        *(Hypothesis(what, f"shrunk by {by:g} scales", DEFAULT.rows, _with(_shrunk(by))) for by in (0.5, 1.0, 2.0)),
    ]
    directions = "directions"
    listed += [
        Hypothesis(directions, f"r = {count}", DEFAULT.rows, _directions(count))
        for count in (4, 8, 16, 32, 64, 96, 128, 192)
    ]
    listed += [
        Hypothesis(directions, f"ridge {strength:g}", DEFAULT.rows, partial(row_kernels.ridge, strength=strength))
        for strength in (0.5, 1.0, 2.0, 3.0, 10.0)
    ]
    transforms = "transform"
    for transform in row_kernels.TRANSFORMS:
        if transform != "sign" and transform not in row_kernels.MOMENTS:
            listed.append(Hypothesis(transforms, f"{transform}, low five", _of(transform, LOW)))
    listed.append(Hypothesis(transforms, "sign, low five", once(LOW)))
    return listed


def _of(transform: str, timesteps: Iterable[int]) -> tuple[Row, ...]:
    return tuple(Row(((t, 0),), transform) for t in timesteps)


def _strongest(share: float) -> Callable[[Doubles], Doubles]:
    return lambda scores: row_kernels.strongest(scores, share)


def _shrunk(by: float) -> Callable[[Doubles], Doubles]:
    return lambda scores: row_kernels.shrunk(scores, by)


# -- the truths --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """A truth that scores are held against.

    masks: (M, N) which samples each model has.
    losses: (S, M, Q), of S seeds. The truth is their mean over seeds.
    held_out: queries of this number are held out, the others generated.
    twins: (2, M', Q) of the same halves, NaN where a training is missing, for the ceiling.
    """

    name: str
    masks: NDArray[np.bool_]
    losses: Doubles
    held_out: int
    twins: Doubles

    @property
    def queries(self) -> int:
        """Q."""
        return self.losses.shape[2]

    @property
    def kinds(self) -> dict[str, NDArray[np.int64]]:
        """The reported queries: both kinds, held out, generated."""
        reported = np.arange(1, self.queries, 2)
        return {
            "reported": reported,
            "held out": reported[reported < self.held_out],
            "generated": reported[reported >= self.held_out],
        }

    @property
    def development(self) -> NDArray[np.int64]:
        """The queries that choose."""
        return np.arange(0, self.queries, 2)

    def sums(self, scores: Doubles) -> Doubles:
        """(M, Q) of the scores of each model's samples."""
        found: Doubles = self.masks.astype(np.float64) @ scores.T
        return found

    def each(self, scores: Doubles) -> Doubles:
        """(Q,) the rank correlation of each query."""
        found: Doubles = spearman(self.sums(scores), -self.losses.mean(0))
        return found

    def ceiling(self, queries: NDArray[np.int64]) -> Estimate | None:
        """What a perfect score could have on these queries: with one training, or with the mean of two.

        None where fewer than MIN_TWINS halves were trained on twice.
        """
        both = ~np.isnan(self.twins).any((0, 2))
        if len(self.twins) < 2 or both.sum() < MIN_TWINS:
            return None
        found = ceiling(self.twins[:, both][:, :, queries])
        return found.one if len(self.losses) == 1 else found.mean


def judge_digits(truths: Path = TRUTHS) -> Judge:
    """Of `subsets.py`: the models of the first seed, and for the ceiling the halves that have a second one."""
    with np.load(truths / "digits.npz", allow_pickle=False) as file:
        losses = file["losses"]
    whole = ~np.isnan(losses[0]).any(1)
    masks = np.stack([subsets.subset(number) for number in range(losses.shape[1])])
    return Judge("digits", masks[whole], losses[:1, whole], subsets.QUERIES, losses)


def judge_tuned(recipe: str, truths: Path = TRUTHS) -> Judge:
    """Of `finetune_truth.py`: the halves that were trained with every seed."""
    truth = Truth.read(truths / f"{recipe}.npz")
    whole = ~np.isnan(truth.losses).any((0, 2))
    return Judge(recipe, truth.masks[whole], truth.losses[:, whole], len(truth.queries.images) // 2, truth.losses)


def paired(judge: Judge, scores: Doubles, default: Doubles, queries: NDArray[np.int64]) -> tuple[float, float]:
    """The 95 % interval of how much the LDS of `scores` is above that of the default."""
    draws, models = np.random.default_rng(0), len(judge.masks)
    one, other, truth = (x[:, queries] for x in (judge.sums(scores), judge.sums(default), -judge.losses.mean(0)))
    found = []
    for _ in range(RESAMPLES):
        m = draws.integers(models, size=models)
        better = spearman(one[m], truth[m]) - spearman(other[m], truth[m])
        found.append(np.nanmean(draws.choice(better, len(better))))
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Found:
    """A hypothesis on a truth: its LDS on the development half and on the reported queries by kind; the interval of
    its distance from the default on the reported ones."""

    hypothesis: Hypothesis
    development: float
    reported: dict[str, float]
    interval: tuple[float, float]


def judge_all(judge: Judge, gradients: Gradients, kept: Path) -> list[Found]:
    """Every hypothesis on a truth."""
    listed = hypotheses()
    default = deflated([kernel_of(gradients, row, kept) for row in DEFAULT.rows])
    found = []
    for hypothesis in track(listed, f"hypotheses on {judge.name}"):
        scores = hypothesis.scores([kernel_of(gradients, row, kept) for row in hypothesis.rows])
        each = judge.each(scores)
        interval = paired(judge, scores, default, judge.kinds["reported"])
        reported = {kind: float(each[of].mean()) for kind, of in judge.kinds.items()}
        found.append(Found(hypothesis, float(each[judge.development].mean()), reported, interval))
    return found


def main(
    work: Annotated[Path, typer.Option(help="The folder of gradient_file.py.")],
    truths: Annotated[str, typer.Option(help="With commas between.")] = "digits,sd-lora",
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/results"),
) -> None:
    """LDS of every hypothesis on every truth, and the page."""
    began = time.monotonic()
    torch.set_num_threads(1)
    judges = [judge_digits() if t == "digits" else judge_tuned(t) for t in truths.split(",")]
    found = [judge_all(j, open_gradients(work / j.name), work / j.name / "kernels") for j in judges]
    write_page(judges, found, out / "hypotheses.md", truths, time.monotonic() - began)


def write_page(judges: list[Judge], found: list[list[Found]], path: Path, truths: str, seconds: float) -> None:
    """The tables, one for each question."""
    told = "; ".join(
        f"{j.name}: {len(j.masks)} halves of {j.masks.shape[1]} samples, {len(j.losses)} seeds" for j in judges
    )
    page = Page(
        "Which rows, and which sums of them?",
        f"python tools/reproduce/hypotheses.py --work WORK --truths {truths}",
        seconds,
        f"LDS on whole gradients, before projection ({told}). The truth is the mean of the seeds. Half of the queries "
        "is for choosing (development), the other is reported; of these some are held-out pictures and the others were "
        "generated. In brackets the 95 % interval of the distance from the default on the reported queries, which "
        "resamples queries and models of both together. Passes are the cost of a sample, rows its place in a store.",
    )
    ceilings = [{kind: j.ceiling(of) for kind, of in j.kinds.items()} for j in judges]
    page.heading("How well a perfect score could do")
    page.text(
        "From the twins: the correlation of two trainings of the same half gives the largest LDS that a score can be "
        "expected to have with the mean of both (tools/reproduce/ceiling.py)."
    )
    page.table(
        ("truth", "queries", "ceiling", "95 %"),
        [
            (j.name, kind, f"{c.value:.3f}", f"{c.low:.2f} to {c.high:.2f}") if c else (j.name, kind, "not known", "")
            for j, of in zip(judges, ceilings, strict=True)
            for kind, c in of.items()
        ],
    )
    groups = list(dict.fromkeys(f.hypothesis.group for f in found[0]))
    columns = ["hypothesis", "passes", "rows"]
    for j in judges:
        columns += [f"{j.name}: development", "reported", "of the ceiling", "held out / generated"]
    for group in groups:
        page.heading(group[0].upper() + group[1:])
        lines = []
        for each in zip(*found, strict=True):
            hypothesis = each[0].hypothesis
            if hypothesis.group != group:
                continue
            line = [hypothesis.name, f"{hypothesis.passes}", f"{len(hypothesis.rows)}"]
            for f, of in zip(each, ceilings, strict=True):
                low, high = f.interval
                kept = f.reported
                line += [
                    f"{f.development:.3f}",
                    f"{kept['reported']:.3f} [{low:+.3f} {high:+.3f}]",
                    f"{kept['reported'] / of['reported'].value:.0%}" if of["reported"] else "",
                    f"{kept['held out']:.3f} / {kept['generated']:.3f}",
                ]
            lines.append(line)
        page.table(columns, lines)
    page.write(path)


if __name__ == "__main__":
    typer.run(main)
