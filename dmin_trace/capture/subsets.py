"""Subsets of the data that a script draws anew in each run: its samples are then not those that it was trained on.

`datasets` draws from numpy's generator if it gets no seed, torch's `random_split` from torch's, and `random.sample`
from python's. What is drawn is the same in each run only if the script seeded that generator before.
"""

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch

from dmin_trace.errors import CaptureError

NOTED = "_noted_by_dmin_trace"
"""The attribute of a function that notes draws."""


class DrawnSubsets:
    """Notes the draws of a run that may choose a subset of its data, and that no seed repeats."""

    def __init__(self) -> None:
        # Of each draw its name, from how many it draws, and how many; None if that is not known yet.
        self._draws: list[tuple[str, int, int | None]] = []
        self._seeded: set[str] = set()
        self._torch_seed = torch.initial_seed()
        self._undo = ExitStack()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, draws are noted. Nothing about them changes."""
        with self._undo:
            for module in (random, np.random):
                self._replace(module, "seed", self._noted_seed(module.__name__, module.seed))
            split = torch.utils.data
            self._replace(random, "sample", self._noted("random.sample", random.sample))
            self._replace(split, "random_split", self._noted("random_split", split.random_split))
            yield

    def watch_datasets(self) -> None:
        """Notes the draws of `datasets` too, once the script has imported it."""
        kind = getattr(sys.modules.get("datasets"), "Dataset", None)
        for name in ("shuffle", "train_test_split") if kind is not None else ():
            if not hasattr(draw := getattr(kind, name), NOTED):
                self._replace(kind, name, self._noted(f"Dataset.{name}", draw))

    def refuse(self, samples: int) -> None:
        """Raises CaptureError if the data set, of so many samples, may be a subset that every run draws anew."""
        fits = (name for name, population, taken in self._draws if population > samples and taken in (None, samples))
        if (drawn := next(fits, None)) is not None:
            raise CaptureError(
                f"The script chose its {samples:,} samples by {drawn} without a seed, so every run has others: a "
                "capture on demand would be of samples that the model was not trained on. Give the training's seed "
                "(--seed). Or train with a seed, or capture at the end of the training (attach, dmin-trace run)."
            )

    def _noted(self, name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(draw)

        def noted_draw(*arguments: Any, **options: Any) -> Any:
            with suppress(TypeError):
                population, *_ = (given := signature.bind(*arguments, **options).arguments).values()
                if not self._is_repeated(name, given):
                    self._draws.append((name, len(population), given.get("k")))
            return draw(*arguments, **options)

        setattr(noted_draw, NOTED, True)
        return noted_draw

    def _is_repeated(self, name: str, given: Mapping[str, Any]) -> bool:
        """Whether a call draws the same in every run of the script."""
        generator = given.get("generator")
        if given.get("seed") is not None or given.get("shuffle") is False:
            return True
        if name == "random.sample":
            return "random" in self._seeded
        if generator is not None and generator is not torch.default_generator:
            return True
        return torch.initial_seed() != self._torch_seed if name == "random_split" else "numpy.random" in self._seeded

    def _noted_seed(self, name: str, seed: Callable[..., Any]) -> Callable[..., Any]:
        def noted_seed(*arguments: Any, **options: Any) -> Any:
            self._seeded.add(name)
            return seed(*arguments, **options)

        return noted_seed

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
