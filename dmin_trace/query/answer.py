"""The most influential training samples for each query, found by the index or by a scan of all rows: `TopK`."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dmin_trace import search
from dmin_trace.errors import brief
from dmin_trace.query.record import Record, record_of
from dmin_trace.query.tables import Column, Table, column_of, to_pandas, with_columns, write_page, write_parquet
from dmin_trace.store import Store, StoredThumbnail

if TYPE_CHECKING:
    import pandas
    from PIL.Image import Image

    from dmin_trace.query.totals import Totals
    from dmin_trace.query.trace import Trace

MAX_SHOWN_QUERIES, MAX_SHOWN_HITS = 3, 10  # in a TopK's repr


@dataclass(frozen=True, kw_only=True, repr=False)
class Hit:
    """One of the k training samples with the largest influence score for a query, or with the smallest.

    rank, sample: the place among the k, from 1; the data set index.
    score, per_timestep: the influence score, and the inner products that it is the sum of: one for each timestep, or
        one for each group of pooled timesteps.
    z, stands_out: how far the score is from the median of all samples' scores, in units of their robust scale; whether
        it is beyond what chance explains. Both are None if that is not known (`TopK.backgrounds`).
    columns: the sample's readable columns, such as its caption or label.
    stored: where its picture is in the store; None for a hit without one. `thumbnail` reads it.
    """

    rank: int
    sample: int
    score: float
    per_timestep: tuple[float, ...]
    z: float | None = None
    stands_out: bool | None = None
    columns: dict[str, str | int | float | None]
    stored: StoredThumbnail | None = field(default=None, compare=False)

    @property
    def thumbnail(self) -> "Image | None":
        """A small picture of the sample, in RGB, as the model saw it; read from the store at each call.

        None if the trace has none of the sample, or if it is damaged, which is logged.
        """
        return None if self.stored is None else self.stored.image()

    def __repr__(self) -> str:
        columns = "".join(f", {brief(name)[1:-1]}={brief(value)}" for name, value in self.columns.items())
        z = "" if self.z is None else f", z={self.z:.1f}"
        return f"Hit(rank={self.rank}, sample={self.sample}, score={self.score:.4f}{z}{columns})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from dmin_trace.views.notebook import hit_html

        return hit_html(self)


@dataclass(frozen=True)
class AnsweredBy:
    """What found the training samples of an answer.

    recall: (depth, part), the part of the true `depth` best that the index found in calibration; None after a scan.
    description: the same in words, on one line; it may hold text from the index file.
    """

    recall: tuple[int, float] | None
    description: str


@dataclass(frozen=True, eq=False, repr=False)
class TopK:
    """The k training samples with the largest influence score for each of Q queries, or with the smallest.

    samples: (Q, k) int64, data set indices; best first, which is smallest first for the smallest.
    scores: (Q, k) float32, their influence scores.
    per_timestep: (Q, k, R) float32, the inner product for each of `groups`; they add up to the score.
    hits: for each query its k samples with their readable columns.
    names, prompts: the Q names and prompts of the queries; None for a query without a prompt.
    without: of each query for a concept, the prompt without that concept; None for a query for a whole image.
    groups: for each of a sample's R rows its timesteps, as numbers of the training schedule: one, or several that are
        pooled (`Settings.rows`).
    score, deflation: the name of the score; what it took out of the queries, in words, "" if nothing.
    answered_by: whether the index or a scan of all samples found them.
    backgrounds: of each query the noise that its scores are compared with, and how many of all samples stand out.
    pictures: of each query a small picture, as a WebP file; None without.
    record: what the answer was made from.
    """

    samples: NDArray[np.int64]
    scores: NDArray[np.float32]
    per_timestep: NDArray[np.float32]
    hits: list[list[Hit]]
    names: tuple[str, ...]
    prompts: tuple[str | None, ...]
    without: tuple[str | None, ...]
    groups: tuple[tuple[float, ...], ...]
    score: str
    deflation: str
    answered_by: AnsweredBy
    backgrounds: tuple[search.Background, ...]
    pictures: tuple[bytes | None, ...]
    record: Record

    @property
    def z(self) -> NDArray[np.float64]:
        """(Q, k) how far each score is from the median of the query's scores; NaN if that is not known."""
        return np.array([[hit.z for hit in hits] for hits in self.hits], np.float64)

    @property
    def verdicts(self) -> list[str]:
        """Of each query, how many samples stand out, as a sentence."""
        return [background.verdict for background in self.backgrounds]

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The T timesteps, as numbers of the training schedule."""
        return tuple(timestep for group in self.groups for timestep in group)

    @property
    def group_names(self) -> list[str]:
        """A heading for each of `groups`: t<timestep>, or t<first>-<last> of pooled timesteps."""
        return group_names(self.groups)

    def __len__(self) -> int:
        """Q, the number of queries."""
        return len(self.hits)

    def __repr__(self) -> str:
        count = f"{len(self)} {'query' if len(self) == 1 else 'queries'}"
        lines = [f"TopK({count}, k={self.samples.shape[1]}, {self.score}, {brief(self.answered_by.description)[1:-1]})"]
        for name, without, hits, verdict in zip(
            self.names[:MAX_SHOWN_QUERIES], self.without, self.hits, self.verdicts, strict=False
        ):
            concept = "" if without is None else f", without {brief(without)}"
            lines += [f"  {name!r}{concept}: {verdict}", *(f"    {hit!r}" for hit in hits[:MAX_SHOWN_HITS])]
            lines += ["    ..."] * (len(hits) > MAX_SHOWN_HITS)
        return "\n".join(lines + ["  ..."] * (len(self) > MAX_SHOWN_QUERIES))

    @property
    def table(self) -> Table:
        """One row for each query and hit; its columns are those of `to_pandas`."""
        hits = [hit for of_query in self.hits for hit in of_query]
        each = [len(of_query) for of_query in self.hits]
        names = dict.fromkeys(name for hit in hits for name in hit.columns)
        return hits_table(
            ((self.names[n], self.prompts[n], self.without[n]) for n, count in enumerate(each) for _ in range(count)),
            {
                "rank": Column("integer", [hit.rank for hit in hits]),
                "sample": Column("integer", [hit.sample for hit in hits]),
                "score": Column("number", [hit.score for hit in hits]),
                "z": Column("number", [hit.z for hit in hits]),
                "stands_out": Column("boolean", [hit.stands_out for hit in hits]),
            },
            self.score,
            {heading: [hit.per_timestep[n] for hit in hits] for n, heading in enumerate(self.group_names)},
            {name: column_of([hit.columns.get(name) for hit in hits]) for name in names},
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """A data frame with one row for each query and hit. Raises QueryError if pandas is not installed.

        Its columns: `query` (the name), `prompt`, `without`, `rank`, `sample`, `score`, `z`, `stands_out`, `scored_by`
        (the name of the score), `t<timestep>` for each timestep or `t<first>-<last>` for each group of pooled ones, and
        the trace's readable columns, with `meta_` before a name that is taken.
        """
        return to_pandas(self.table)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes the table of `to_pandas` to a Parquet file. Raises QueryError if pyarrow is not installed or the file
        cannot be written."""
        write_parquet(path, "hits", [self.table])

    def to_html(
        self, path: str | os.PathLike[str], *, lowest: "TopK | None" = None, totals: "Totals | None" = None
    ) -> None:
        """Writes the answer as one HTML page for people, with the pictures of the samples; it needs no other file.

        Args:
            lowest: the samples that speak most against the same queries, of `Trace.top_k` with `largest=False`, to show
                beside them.
            totals: the totals of groups for the same queries, of `Trace.totals`.

        Raises QueryError if these are of other queries or by another score, or the file cannot be written.
        """
        from dmin_trace.views.page import answer_page

        write_page(path, answer_page(self, lowest, totals))

    def _repr_html_(self) -> str:
        """What a notebook shows: the first queries and their first hits."""
        from dmin_trace.views.notebook import answer_html

        return answer_html(self)


def group_names(groups: Iterable[Sequence[float]]) -> list[str]:
    """A heading for each group of timesteps."""
    return [f"t{group[0]:g}" + f"-{group[-1]:g}" * (len(group) > 1) for group in groups]


def hits_table(
    queries: Iterable[tuple[str, str | None, str | None]],
    numbers: Table,
    score: str,
    per_timestep: Mapping[str, Sequence[float]],
    columns: Mapping[str, Column],
) -> Table:
    """The table of scored samples: the name, the prompt and the prompt without a concept of each row's query, the
    numbers of the row, the name of the score, the score of each timestep, and the trace's columns."""
    asked = list(queries)
    table = {
        name: Column("string", [one[n] for one in asked]) for n, name in enumerate(("query", "prompt", "without"))
    } | numbers
    table["scored_by"] = Column("string", [score] * len(asked))
    timesteps = {name: Column("number", values) for name, values in per_timestep.items()}
    return with_columns(with_columns(table, timesteps), columns)


class ScoreMethod(Protocol):
    """A score of one's own, which `Trace.scores` and `Trace.top_k` take as `score=`.

    The inner products of the changed gradients with those of the training samples are the influence scores. All
    training samples are scanned for it.
    """

    @property
    def name(self) -> str:
        """A word for the score; none of the built-in ones."""

    def fit(self, trace: "Trace") -> None:
        """Prepares for queries of this trace. It is called once for each opened trace, before `transform`."""

    def transform(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """The changed gradients of queries, (Q, R, v) float32; those given, of the same shape, stay as they are."""


def answer_queries(
    store: Store,
    gradients: NDArray[np.float32],
    *,
    k: int,
    score: str | search.BuiltInScore | ScoreMethod = "deflated",
    names: Sequence[str] = (),
    prompts: Sequence[str | None] = (),
    without: Sequence[str | None] = (),
    pictures: Sequence[bytes | None] = (),
    largest: bool = True,
    exact: bool = False,
    index: search.Index | search.Unavailable | None = None,
) -> TopK:
    """The k training samples with the largest influence scores for queries (Q, R, v), or with the smallest.

    The index answers if it is there, matches the store, and is calibrated for k and the score. Otherwise all rows are
    scanned; those that are done, in an unfinished store. A fitted score and an `index` from `open_index` save making
    them for each call. Arguments and errors are otherwise those of `Trace.top_k`.
    """
    search.check_queries(store, gradients)
    k = search.usable_k(store, k)
    fitted = search.fit_score(store, score) if isinstance(score, str) else score
    queries = fitted.transform(gradients)
    if exact or not largest or not store.complete:
        index = search.Unavailable("")
    elif index is None:
        index = search.open_index(store)
    # Of a score of the user's own, no depth is calibrated.
    if isinstance(index, search.Unavailable) or (depth := index.facts.depth(k, fitted.name)) is None:
        ranking = search.exact_top_k(store, queries, k, largest=largest, background=True)
        reason = index.reason if isinstance(index, search.Unavailable) else index.facts.unserved(fitted.name)
        answered_by = AnsweredBy(None, _scanned(store, reason))
    else:
        ranking = search.search(index, queries, k, kind=fitted.name, background=True)
        words = f"answered by the index (recall@{depth.k} {depth.recall:.3f} when calibrated); --exact scans all"
        answered_by = AnsweredBy((depth.k, depth.recall), words)
    hits = hits_of(store, ranking)
    return TopK(
        samples=np.array([[hit.sample for hit in of_query] for of_query in hits], np.int64),
        scores=ranking.scores,
        per_timestep=ranking.per_timestep,
        hits=hits,
        names=tuple(names) or tuple(f"query {n}" for n in range(len(hits))),
        prompts=tuple(prompts) or (None,) * len(hits),
        without=tuple(without) or (None,) * len(hits),
        groups=store.header.groups,
        score=fitted.name,
        deflation=fitted.description if isinstance(fitted, search.BuiltInScore) else "",
        answered_by=answered_by,
        backgrounds=ranking.backgrounds,
        pictures=tuple(pictures) or (None,) * len(hits),
        record=record_of(store, gradients),
    )


def _scanned(store: Store, reason: str) -> str:
    """What a scan searched, and why the index did not answer."""
    count = store.header.samples
    if not store.complete:
        return f"searched {len(store.rows_done):,} of {count:,} samples; the capture is unfinished"
    return f"scanned all {count:,} samples" + (f": {reason}" if reason else "")


def hits_of(store: Store, ranking: search.Ranking) -> list[list[Hit]]:
    """The hits of each query, best first. Of the store, only the ranked rows are read."""
    (queries, k), rows = ranking.rows.shape, ranking.rows.ravel()
    samples = store.numbers(rows).sample.tolist()
    columns = {name: store.column_at(name, rows) for name in store.header.columns}
    hits = [
        Hit(
            rank=n % k + 1,
            sample=samples[n],
            score=float(ranking.scores[n // k, n % k]),
            per_timestep=tuple(ranking.per_timestep[n // k, n % k].tolist()),
            z=ranking.backgrounds[n // k].z(float(ranking.scores[n // k, n % k])),
            stands_out=ranking.backgrounds[n // k].stands_out(float(ranking.scores[n // k, n % k])),
            columns={name: values[n] for name, values in columns.items()},
            stored=StoredThumbnail(store.thumbnails, int(rows[n])) if store.header.thumbnails is not None else None,
        )
        for n in range(len(rows))
    ]
    return [hits[query * k : (query + 1) * k] for query in range(queries)]
