"""The index: a graph over reduced gradients proposes candidates, and exact scores rank them.

HNSW (Malkov and Yashunin, arXiv 1603.09320) finds the C vectors with the largest inner products (`vectors` says what
they are), and `rerank` ranks their rows by the scores of the exact scan. `build` makes an index and measures its
recall; `index_files` says what its files hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, TraceError
from dmin_trace.search.deflation import Directions
from dmin_trace.search.graph import GraphError, graph_bytes, load_graph
from dmin_trace.search.index_files import (
    CHECKSUMS,
    COMMON,
    COPIES,
    EIGENVALUES,
    GRAPH,
    PRINCIPAL,
    Depth,
    Facts,
    Unavailable,
    check_file,
    index_beside,
    read_array,
    read_facts,
)
from dmin_trace.search.ranking import Ranking, check_k, check_queries, rerank
from dmin_trace.search.vectors import Reduction
from dmin_trace.store import Store

if TYPE_CHECKING:
    import hnswlib


class Index:
    """A store's index, checked and loaded; `open_index` makes one."""

    def __init__(
        self,
        store: Store,
        facts: Facts,
        reduction: Reduction,
        graph: hnswlib.Index,
        copies: NDArray[np.int64],
        checksums: NDArray[np.uint32],
    ) -> None:
        """Args: what `open_index` read; `copies` and `checksums` as `index_files` describes them."""
        self.store = store
        self.facts = facts
        self.checksums = checksums
        self._reduction = reduction
        self._graph = graph
        self._copies = copies

    def candidates(self, queries: NDArray[np.float32], depth: Depth) -> list[NDArray[np.int64]]:
        """For each of the queries (Q, T, v) the rows that may be among its best, and their copies."""
        self._graph.set_ef(depth.ef)
        try:
            labels, _ = self._graph.knn_query(self._reduction.vectors(queries), k=depth.candidates)
        except RuntimeError as error:
            raise TraceError(
                f"The index of {self.store.path} cannot be searched: {error}. Make it anew (dmin-trace index), or scan "
                "all samples (--exact)."
            ) from None
        return [self._with_copies(rows.astype(np.int64)) for rows in labels]

    def _with_copies(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        copies, originals = self._copies.T
        firsts, lasts = (np.searchsorted(originals, rows, side) for side in ("left", "right"))
        return np.concatenate([rows, *(copies[first:last] for first, last in zip(firsts, lasts, strict=True))])


def search(index: Index, queries: NDArray[np.float32], k: int, *, kind: str = "dmin") -> Ranking:
    """The k best of the rows that the graph proposes for each query, by exact scores; ties by the lowest row.

    Args:
        index: from `open_index`.
        queries: (Q, T, v), projected gradients, transformed for the score.
        k: how many rows are kept; `index.facts.depth(k, kind)` says whether so many are served.
        kind: the score that the queries are transformed for.

    Raises:
        QueryError: k is out of range or not served, or the queries are not finite or not of the store's shape.
        TraceError: the store or the graph is damaged.
    """
    check_k(index.store, k)
    check_queries(index.store, queries)
    depth = index.facts.depth(k, kind)
    if depth is None:
        raise QueryError(
            f"k is {k}, more than the index was calibrated for. Give a smaller k, or scan all samples (--exact)."
        )
    return rerank(index.store, queries, index.candidates(queries, depth), k, checksums=index.checksums)


def open_index(store: Store) -> Index | Unavailable:
    """Loads the graph of a store's index; `Unavailable` if there is none, or it does not fit the store as it is now."""
    facts = read_facts(store)
    if isinstance(facts, Unavailable):
        return facts
    if not facts.depths:
        return Unavailable(facts.unserved("dmin"))
    try:
        return _opened(store, facts)
    except GraphError as error:
        return Unavailable.because(error)
    except (OSError, ValueError) as error:
        return Unavailable.because(f"it is damaged ({error})")


def open_directions(store: Store) -> Directions | Unavailable:
    """The principal directions that a store's index keeps; `Unavailable` if it keeps none."""
    facts = read_facts(store)
    if isinstance(facts, Unavailable):
        return facts
    if not facts.principal:
        return Unavailable("")
    folder, shape = index_beside(store.path), (facts.timesteps, facts.principal)
    try:
        eigenvalues = read_array(folder, facts, EIGENVALUES, "<f8", shape)
        vectors = read_array(folder, facts, PRINCIPAL, "<f4", (*shape, facts.dimension), mapped=True)
        if not np.isfinite(eigenvalues).all() or (np.diff(eigenvalues, append=0.0) > 0).any():
            raise GraphError(f"{EIGENVALUES} holds no eigenvalues")
        if not np.allclose(np.vecdot(vectors, vectors), eigenvalues > 0, atol=1e-2):
            raise GraphError(f"{PRINCIPAL} holds no directions")
    except GraphError as error:
        return Unavailable.because(error)
    except (OSError, ValueError) as error:
        return Unavailable.because(f"it is damaged ({error})")
    return Directions(vectors, eigenvalues)


def _opened(store: Store, facts: Facts) -> Index:
    """The index that has these facts. Raises GraphError if a file of it is not what was written, or does not fit."""
    folder = index_beside(store.path)
    common = read_array(folder, facts, COMMON, "<f4", (facts.timesteps, facts.directions, facts.dimension))
    checksums = read_array(folder, facts, CHECKSUMS, "<u4", (facts.samples,))
    copies = read_array(folder, facts, COPIES, "<i8", (-1, 2)).astype(np.int64)
    if len(copies) + facts.vectors != store.valid_count:
        raise GraphError(f"{facts.vectors} vectors and {len(copies)} copies are not the rows that can be ranked")
    # A file of another size is not read.
    most = 2 * graph_bytes(facts.length, facts.vectors, facts.m) + 2**16
    file = check_file(folder, GRAPH, facts.files[GRAPH], most)
    graph, held = load_graph(file, facts.length, facts.vectors, facts.samples, facts.m)
    if len(copies):
        rows, originals = copies.T
        inside = copies.min() >= 0 and copies.max() < facts.samples
        if not inside or held[rows].any() or not held[originals].all() or (np.diff(originals) < 0).any():
            raise GraphError(f"{COPIES} names other rows than copies of rows in the graph")
        held[rows] = True
        if held.sum() != store.valid_count:
            raise GraphError(f"{COPIES} names a row twice")
    return Index(store, facts, Reduction(common, facts.fold), graph, copies, checksums)
