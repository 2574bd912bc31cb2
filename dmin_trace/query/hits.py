"""A training sample in the answer to a query: `Hit`."""

from __future__ import annotations

from dataclasses import dataclass

from dmin_trace.errors import brief
from dmin_trace.search import Ranking
from dmin_trace.store import Store


@dataclass(frozen=True, kw_only=True, repr=False)
class Hit:
    """One of the k training samples with the largest influence score for a query, or with the smallest.

    rank: from 1.
    sample: the data set index.
    score: the influence score, the sum over timesteps.
    per_timestep: the T inner products that the score is the sum of.
    columns: the sample's readable columns, such as its caption or label.
    """

    rank: int
    sample: int
    score: float
    per_timestep: tuple[float, ...]
    columns: dict[str, str | int | float | None]

    def __repr__(self) -> str:
        columns = "".join(f", {brief(name)[1:-1]}={brief(value)}" for name, value in self.columns.items())
        return f"Hit(rank={self.rank}, sample={self.sample}, score={self.score:.4f}{columns})"


def hits_of(store: Store, ranking: Ranking) -> list[list[Hit]]:
    """The hits of each query, best first. Of the store, only the ranked rows are read."""
    rows = ranking.rows.ravel()
    samples = store.numbers(rows).sample.tolist()
    columns = {name: store.column_at(name, rows) for name in store.header.columns}
    count = ranking.rows.shape[1]
    return [
        [
            Hit(
                rank=place + 1,
                sample=samples[query * count + place],
                score=float(ranking.scores[query, place]),
                per_timestep=tuple(ranking.per_timestep[query, place].tolist()),
                columns={name: values[query * count + place] for name, values in columns.items()},
            )
            for place in range(count)
        ]
        for query in range(len(ranking.rows))
    ]
