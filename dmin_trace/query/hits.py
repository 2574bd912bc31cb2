"""One training sample of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One training sample among the causes of one query.

    rank: from 1, the strongest.
    sample: the dataset index.
    score: the sum over timesteps.
    per_timestep: the inner product at each timestep.
    columns: what the store keeps of the sample for people to read: caption, label, file_name and the like.
    """

    rank: int
    sample: int
    score: float
    per_timestep: tuple[float, ...]
    columns: dict[str, str | int | float | None]
