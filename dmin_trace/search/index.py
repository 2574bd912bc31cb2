"""The index: a graph over reduced gradients proposes candidates, and exact scores rank them.

HNSW (Malkov and Yashunin, arXiv 1603.09320) finds the C vectors with the largest inner products (`Reduction`), and
`rerank` ranks their rows by the scores of the exact scan.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.search import index_files as files
from dmin_trace.search.background import fit_background
from dmin_trace.search.deflation import Directions
from dmin_trace.search.exact import Floats, Ranking, Rows, check_queries, has_direction, rerank, usable_k
from dmin_trace.search.hnsw import Graph, GraphError, graph_bytes, load_graph
from dmin_trace.search.index_files import Depth, Facts, Unavailable, check_file, index_beside, read_array, read_facts
from dmin_trace.store import Store

Loaded = TypeVar("Loaded")

COMMON_DIRECTIONS = 8  # r, those kept apart; they halve the candidates that are needed
BACKGROUND_SAMPLES, BACKGROUND_CHUNKS = 512, 64
"""The samples whose scores give the background of a query, and the chunks that they are taken from: a quarter of a
second, and an error of the scale of 6 %."""
DIRECTIONS_SAMPLES = 256  # samples, spread over the store, that the common directions are taken from


@dataclass(frozen=True)
class Reduction:
    """How projected gradients become vectors of the index, which are small.

    Folding, which adds bins j, j + F, j + 2 F and so on, leaves F numbers, whose inner products err by about the
    product of the norms over sqrt(F). An error in what all gradients share would hide what tells them apart. So each
    timestep is first split into its parts along r common directions (R, r, v), orthonormal or zero, and the rest, which
    is folded. A vector holds both for all timesteps; its inner product with that of a query estimates the score.
    """

    common: Floats
    fold: int

    @property
    def length(self) -> int:
        """The numbers of a vector."""
        return len(self.common) * (self.fold + len(self.common[0]))

    def vectors(self, gradients: Floats) -> Floats:
        """(n, R, v) to (n, R (F + r)) float32: for each timestep the parts along the directions and the folded rest."""
        along = np.matmul(gradients.transpose(1, 0, 2), self.common.transpose(0, 2, 1))  # (R, n, r)
        rest = self._folded(gradients) - np.matmul(along, self._folded_common).transpose(1, 0, 2)
        return np.concatenate([along.transpose(1, 0, 2), rest], axis=2).reshape(len(gradients), -1)

    @cached_property
    def _folded_common(self) -> Floats:
        return self._folded(self.common)

    def _folded(self, gradients: Floats) -> Floats:
        return np.asarray(gradients.reshape(*gradients.shape[:-1], -1, self.fold).sum(axis=-2))


def common_directions(store: Store, rows: Rows) -> Floats:
    """(R, r, v) float32, principal directions of some of these rows, not centred; zero where there are fewer."""
    timesteps, dimension = store.header.gradient_count, store.header.dimension
    count = min(DIRECTIONS_SAMPLES, len(rows), max(2 * COMMON_DIRECTIONS, 2**26 // dimension))
    rows = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
    scale = store.numbers(rows).scale
    found = np.zeros((timesteps, COMMON_DIRECTIONS, dimension), np.float32)
    some = np.empty((count, dimension), np.float32)
    for t in range(timesteps):
        for n, row in enumerate(rows):
            chunk, place = divmod(int(row), store.header.chunk_rows)
            some[n] = store.grad_chunk(chunk)[place, t]
        some *= scale[:, t, None]
        _, mixtures = np.linalg.eigh(some @ some.T)  # the smallest eigenvalues first
        directions = mixtures[:, : -1 - COMMON_DIRECTIONS : -1].T @ some
        norms = np.linalg.norm(directions, axis=1)
        real = norms > 1e-3 * norms.max()
        found[t, : len(norms)][real] = directions[real] / norms[real, None]
    return found


@dataclass(frozen=True, eq=False)
class Index:
    """A store's index, checked and loaded by `open_index`; `copies` and `checksums` as `index_files` describes them."""

    store: Store
    facts: Facts
    reduction: Reduction
    graph: Graph
    copies: Rows
    checksums: NDArray[np.uint32]

    def candidates(self, queries: Floats, depth: Depth) -> list[Rows]:
        """For each of the queries (Q, R, v) the rows that may be among its best, and their copies."""
        self.graph.set_ef(depth.ef)
        try:
            labels, _ = self.graph.knn_query(self.reduction.vectors(queries), k=depth.candidates)
        except RuntimeError as error:
            found = f"The index of {self.store.path} cannot be searched: {error}"
            raise TraceError(f"{found}. Make it anew (dmin-trace index), or scan all samples (--exact).") from None
        candidates, (copies, originals) = [], self.copies.T
        for rows in labels.astype(np.int64):
            firsts, lasts = (np.searchsorted(originals, rows, side) for side in ("left", "right"))
            candidates.append(np.concatenate([rows, *(copies[a:b] for a, b in zip(firsts, lasts, strict=True))]))
        return candidates


def search(index: Index, queries: Floats, k: int, *, kind: str = "dmin", background: bool = False) -> Ranking:
    """The k best of the rows that the graph proposes for each query, by exact scores; ties by the lowest row.

    The queries (Q, R, v) are transformed for the score `kind`. With `background`, the ranking has the background of
    each query too, by some samples that are chosen by chance: it then takes longer than the search itself. Raises
    QueryError if k is below 1 or not served (`Facts.depth`), or the queries are not finite or not of the store's shape;
    TraceError if something is damaged.
    """
    k = usable_k(index.store, k)
    check_queries(index.store, queries)
    depth = index.facts.depth(k, kind)
    if depth is None:
        found = f"k is {k}, more than the index was calibrated for"
        raise QueryError(f"{found}. Give a smaller k, or scan all samples (--exact).")
    ranking = rerank(index.store, queries, index.candidates(queries, depth), k, checksums=index.checksums)
    if not background:
        return ranking
    backgrounds = (
        fit_background(scores, index.store.valid_count, best.astype(np.float64), index=True)
        for scores, best in zip(_some_scores(index, queries), ranking.scores, strict=True)
    )
    return replace(ranking, backgrounds=tuple(backgrounds))


def _some_scores(index: Index, queries: Floats) -> NDArray[np.float64]:
    """(Q, n) the scores of samples that are chosen by chance, the same ones for every query."""
    store, generator = index.store, np.random.default_rng(0)
    # Rows of few chunks: the norm that tells whether a row can be ranked is read with those of its whole chunk.
    chunks = np.sort(generator.permutation(store.header.chunks)[:BACKGROUND_CHUNKS])
    each = -(-BACKGROUND_SAMPLES // len(chunks))
    of_chunks = (store.header.rows(int(chunk)) for chunk in chunks)
    rows = np.concatenate([rows.start + np.sort(generator.permutation(len(rows))[:each]) for rows in of_chunks])
    numbers = store.numbers(rows)
    scores = np.zeros((len(rows), len(queries)))
    for n, row in enumerate(rows):
        stored = store.stored_row(int(row), int(index.checksums[row]))
        scores[n] = np.vecdot(stored.astype(np.float32), queries).astype(np.float64) @ numbers.scale[n]
    scores = scores[has_direction(numbers.norm)]
    if not np.isfinite(scores).all():
        raise TraceError(f"{store.path} is damaged: it holds numbers that are not finite.")
    return scores.T


def open_index(store: Store) -> Index | Unavailable:
    """Loads the graph of a store's index; `Unavailable` if there is none, or it does not fit the store as it is now."""
    return _opened(store, _load_index)


def open_directions(store: Store) -> Directions | Unavailable:
    """The principal directions that a store's index keeps; `Unavailable` if it keeps none."""
    return _opened(store, _load_directions)


def _opened(store: Store, load: Callable[[Store, Facts], Loaded | Unavailable]) -> Loaded | Unavailable:
    facts = read_facts(store)
    if isinstance(facts, Unavailable):
        return facts
    try:
        return load(store, facts)
    except GraphError as error:
        return Unavailable.because(error)
    except (OSError, ValueError) as error:
        return Unavailable.because(f"it is damaged ({error})")


def _load_directions(store: Store, facts: Facts) -> Directions | Unavailable:
    if not facts.principal:
        return Unavailable("")
    folder, shape = index_beside(store.path), (facts.timesteps, facts.principal)
    eigenvalues = read_array(folder, facts, files.EIGENVALUES, "<f8", shape)
    vectors = read_array(folder, facts, files.PRINCIPAL, "<f4", (*shape, facts.dimension), mapped=True)
    if not np.isfinite(eigenvalues).all() or (np.diff(eigenvalues, append=0.0) > 0).any():
        raise GraphError(f"{files.EIGENVALUES} holds no eigenvalues")
    if not np.allclose(np.vecdot(vectors, vectors), eigenvalues > 0, atol=1e-2):
        raise GraphError(f"{files.PRINCIPAL} holds no directions")
    return Directions(vectors, eigenvalues)


def _load_index(store: Store, facts: Facts) -> Index | Unavailable:
    if not facts.depths:
        return Unavailable(facts.unserved("dmin"))
    folder = index_beside(store.path)
    common = read_array(folder, facts, files.COMMON, "<f4", (facts.timesteps, facts.directions, facts.dimension))
    checksums = read_array(folder, facts, files.CHECKSUMS, "<u4", (facts.samples,))
    copies = read_array(folder, facts, files.COPIES, "<i8", (-1, 2)).astype(np.int64)
    if len(copies) + facts.vectors != store.valid_count:
        raise GraphError(f"{facts.vectors} vectors and {len(copies)} copies are not the rows that can be ranked")
    # A file of another size is not read.
    most = 2 * graph_bytes(facts.length, facts.vectors, facts.m) + 2**16
    file = check_file(folder, files.GRAPH, facts.files[files.GRAPH], most)
    graph, held = load_graph(file, facts.length, facts.vectors, facts.samples, facts.m)
    if len(copies):
        rows, originals = copies.T
        inside = copies.min() >= 0 and copies.max() < facts.samples
        if not inside or held[rows].any() or not held[originals].all() or (np.diff(originals) < 0).any():
            raise GraphError(f"{files.COPIES} names other rows than copies of rows in the graph")
        held[rows] = True
        if held.sum() != store.valid_count:
            raise GraphError(f"{files.COPIES} names a row twice")
    return Index(store, facts, Reduction(common, facts.fold), graph, copies, checksums)
