"""What stands out: the background of a query's scores, and how many samples lie beyond it.

The scores of one query over all samples are mostly noise around a median. z is the distance from that median, in units
of a scale that the middle half of the scores gives (that of a normal distribution with these quartiles), so that no
large score moves it.

An influence score is a sum of products of two numbers that are noise for most samples. Such sums have an exponential
tail, heavier than that of a normal distribution, and on the two sides of the median it is not the same. So chance is
taken from the same side of the scores themselves: between their quartile and their tenth, where noise still prevails,
an exponential is fitted, and continued. A sample stands out if it is among the largest number of samples of which
chance explains one in twenty (Benjamini and Hochberg, 1995). Of a query for which all scores are such noise, some
sample then stands out once in twenty times. docs/quality.md has the measurements.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

CHANCE = 0.05
"""The part of the samples that stand out which chance may explain."""
MIN_SAMPLES = 30
"""With fewer scores, quartiles say too little."""
QUARTILE, TENTH = 0.25, 0.10
"""The parts of the scores between which the tail begins: its slope is taken there."""
NORMAL_QUARTILE = 0.6744897501960817
"""Of the normal distribution with deviation 1."""
EQUAL = 1e-5
"""Scores that differ by less than this part of the largest one are equal but for rounding."""
MAX_SCORES, MIN_SCORES = 2**25, 2**12
"""Scores of all queries together that a scan keeps for their backgrounds, and of one query at the least: up to this, of
every sample."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Background:
    """The background of one query's scores.

    samples: how many samples have a score.
    scored: how many of them were looked at: all after a scan, unless there are very many; some, chosen by chance,
        if the index answered.
    median, scale: of the scores; z is (score - median) / scale. NaN if they are not known.
    limit: the score from which samples stand out, or, with `largest` False, down to which; NaN if it is not known.
    standing_out: how many stand out; None if that is not known.
    at_least: whether more may stand out than could be counted: only the best were looked at.
    unknown: why it is not known, in words; "" if it is.
    largest: whether samples stand out above the background, or below it.
    """

    samples: int
    scored: int
    median: float = math.nan
    scale: float = math.nan
    limit: float = math.nan
    standing_out: int | None = None
    at_least: bool = False
    unknown: str = ""
    largest: bool = True

    def z(self, score: float) -> float | None:
        """How far a score is from the median, in units of the scale; None if the background is not known."""
        return None if math.isnan(self.scale) else (score - self.median) / self.scale

    def stands_out(self, score: float) -> bool | None:
        """Whether a sample with this score stands out; None if that is not known."""
        if math.isnan(self.limit):
            return None
        return score >= self.limit if self.largest else score <= self.limit

    @property
    def verdict(self) -> str:
        """What is known, as a sentence."""
        if self.standing_out is None:
            return f"How many samples stand out is not known: {self.unknown}."
        against = "" if self.largest else " against the query"
        if not self.standing_out and self.at_least:
            return f"None of the samples that were found stands out{against}, of {self.samples:,}."
        if not self.standing_out:
            owed = ": the query is not owed to single samples" if self.largest else ""
            return f"No sample of {self.samples:,} stands out{against}{owed}."
        few = "At least " if self.at_least else "About " if self.scored < self.samples else ""
        stand = "stands" if self.standing_out == 1 else "stand"
        return f"{few}{self.standing_out:,} of {self.samples:,} samples {stand} out{against}."


def fit_background(
    scores: Doubles, samples: int, best: Doubles | None = None, *, index: bool = False, largest: bool = True
) -> Background:
    """The background of one query.

    Args:
        scores: (n,) finite scores of all samples, or of some that were chosen by chance.
        samples: N, how many samples have a score.
        best: the k best scores, best first; they are needed where n is less than N.
        index: whether the best were found by an index, which may have missed others.
    """
    known = Background(samples=samples, scored=len(scores), largest=largest)
    if len(scores) < MIN_SAMPLES:
        return replace(known, unknown=f"it takes {MIN_SAMPLES} samples or more to tell influence from noise")
    sign = 1 if largest else -1
    upward = sign * np.asarray(scores, np.float64)
    # From here on, samples stand out upwards.
    low, median, quartile, tenth = np.quantile(upward, (QUARTILE, 0.5, 1 - QUARTILE, 1 - TENTH))
    scale = (quartile - low) / (2 * NORMAL_QUARTILE)
    slope = (tenth - quartile) / math.log(QUARTILE / TENTH)
    least = EQUAL * np.abs(upward).max()
    if scale <= least or slope <= least:
        return replace(known, unknown="most scores are equal")
    # One standard error more, so that few samples do not give more false alarms.
    slope *= 1 + 1 / math.sqrt((QUARTILE - TENTH) * len(upward))

    def standing(ordered: Doubles, of: int) -> int:
        """How many of the first scores stand out, where chance gives `of` scores in all."""
        expected = of * TENTH * np.exp(np.minimum((tenth - ordered) / slope, 100))
        fitting = np.flatnonzero(expected <= CHANCE * np.arange(1, len(ordered) + 1))
        return int(fitting[-1]) + 1 if len(fitting) else 0

    beyond = np.sort(upward[upward > tenth])[::-1]
    among = standing(beyond, len(upward))
    count, part = among, among / len(upward)
    if len(upward) < samples and best is not None:
        found = standing(sign * np.asarray(best, np.float64), samples)
        count = found if index or not among else round(part * samples)
        part = max(part, found / samples)
    limit = tenth + slope * math.log(TENTH / (CHANCE * max(part, 1 / samples)))
    return replace(
        known,
        median=sign * float(median),
        scale=float(scale),
        limit=sign * float(limit),
        standing_out=count,
        at_least=index,
    )


class KeptScores:
    """The scores of a scan that its backgrounds are fitted to: all, or of rows that are chosen by chance."""

    def __init__(self, queries: int, samples: int) -> None:
        most = max(MAX_SCORES // queries, MIN_SCORES)
        self._samples, self._part = samples, min(1.0, most / samples)
        self._kept: list[NDArray[np.float32]] = []

    def choose(self, first_row: int, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n', Q) of a chunk's scores (n, Q), those to keep. Any thread may call it."""
        if self._part == 1:
            return scores
        return scores[np.random.default_rng(first_row).random(len(scores)) < self._part]

    def add(self, chosen: NDArray[np.float32]) -> None:
        self._kept.append(chosen)

    def backgrounds(self, best: NDArray[np.float32], *, largest: bool) -> tuple[Background, ...]:
        """Of each query, whose best scores are (Q, k)."""
        whole = np.concatenate(self._kept)
        samples = len(whole) if self._part == 1 else self._samples
        return tuple(
            fit_background(scores.astype(np.float64), samples, own.astype(np.float64), largest=largest)
            for scores, own in zip(whole.T, best, strict=True)
        )
