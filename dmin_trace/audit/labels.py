"""Whether a sample's label or caption fits: what the samples nearest by gradient have.

A value is a set of words: a label is one, a caption has several. The nearest samples vote for the words that they have,
each with its similarity. How well a value fits is the share of the votes that its own words get; of several words the
mean, in which rare words count more (by the logarithm of how rare they are).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LABEL_COLUMNS = ("label", "class", "label_name", "class_name", "caption", "text", "prompt")
"""The columns that are looked for, the first one that the trace has."""
MANY_VALUES = 0.2
"""A column of texts of which more than this part differ is of captions; its values are read word by word."""
WORD = re.compile(r"\w+(?:['’-]\w+)*")
MAX_WORDS = 200
"""Words of a caption that are read."""


@dataclass(frozen=True, eq=False)
class Fit:
    """How well the values of n samples fit.

    share: (n,) float64, from 0 to 1; NaN for a sample without a value, or of which no near sample has one.
    others: for each sample what the nearest samples have most of that it lacks; "" if nothing.
    other_share: (n,) the share of the votes that this gets.
    captions: whether values were read word by word.
    """

    share: NDArray[np.float64]
    others: list[str]
    other_share: NDArray[np.float64]
    captions: bool


def fit_of_values(values: Sequence[Any], nearest: NDArray[np.int64], similarity: NDArray[np.float32]) -> Fit:
    """How well values of n samples fit to those of the k nearest others (n, k), which are so alike (n, k)."""
    captions = _are_captions(values)
    words = [_words(value, captions) for value in values]
    counts = Counter(word for own in words for word in own)
    present = sum(map(bool, words))
    share, other_share = np.full(len(words), np.nan), np.zeros(len(words))
    others = [""] * len(words)
    for n, own in enumerate(words):
        voters = [
            (words[other], float(alike))
            for other, alike in zip(nearest[n], similarity[n], strict=True)
            if words[other] and alike > 0
        ]
        total = math.fsum(alike for _, alike in voters)
        if not own or not total:
            continue
        votes: Counter[str] = Counter()
        for voted, alike in voters:
            for word in voted:
                votes[word] += alike / total  # type: ignore[assignment]
        weights = {word: math.log(1 + present / counts[word]) for word in own}
        share[n] = math.fsum(weights[word] * votes[word] for word in own) / math.fsum(weights.values())
        rest = [(vote, word) for word, vote in votes.items() if word not in own]
        # Of equal votes, the rarest word, and then the first in the alphabet.
        other_share[n], others[n] = min(rest, key=lambda of: (-of[0], counts[of[1]], of[1]), default=(0.0, ""))
    return Fit(share, others, np.minimum(other_share, 1.0), captions)


def _are_captions(values: Sequence[Any]) -> bool:
    texts = [value for value in values if isinstance(value, str) and value]
    return len(set(texts)) > MANY_VALUES * len(texts) and any(len(WORD.findall(text[:1000])) > 1 for text in texts)


def _words(value: Any, captions: bool) -> frozenset[str]:
    if value == "" or (isinstance(value, int) and value == -1) or value != value:
        return frozenset()
    if captions:
        return frozenset(word for word in WORD.findall(str(value).lower()[: 20 * MAX_WORDS])[:MAX_WORDS])
    return frozenset([str(value)])
