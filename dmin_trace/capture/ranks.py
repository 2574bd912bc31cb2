"""The processes that fill one store together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """The processes that fill one store together, each its own chunks.

    rank: the number of this process, from 0. The first makes the store, and the others open it.
    count: how many there are.
    gather: waits until every process has called it, and returns the message of each, by rank.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[str], list[str]] = lambda message: [message]
