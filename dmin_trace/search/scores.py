"""What samples are ranked by: how queries are changed before they are multiplied with the rows of the store.

A score method is fitted to a store once, and then changes the gradients of queries; the inner products of changed
queries with the stored rows are the influence scores.
"""

from typing import get_args

from dmin_trace.errors import QueryError
from dmin_trace.search.deflation import Directions, Score, principal_directions
from dmin_trace.search.exact import Floats
from dmin_trace.search.index import open_directions
from dmin_trace.search.index_files import Unavailable, read_facts
from dmin_trace.store import Store

MAX_QUERY_NUMBERS = 2**31
"""Numbers of gradients, N T v, up to which a query finds the principal directions itself: in about a minute."""


class DminScore:
    """The paper's score: the sum of the inner products over timesteps."""

    name = "dmin"

    def fit(self, store: Store) -> None:
        """Does nothing."""

    def transform(self, queries: Floats) -> Floats:
        """The queries as they are."""
        return queries


class DeflatedScore:
    """The score of queries without the samples' principal directions; `description` says in words which."""

    name = "deflated"

    def __init__(self) -> None:
        self.description = ""
        self._directions: Directions | None = None

    def fit(self, store: Store) -> None:
        """Opens the directions that the store's index keeps, or finds them. Raises QueryError if the store is too large
        to find them for a query, TraceError if it is damaged."""
        found, source = open_directions(store), "kept by the index"
        if isinstance(found, Unavailable):
            _check_small(store, found.reason)
            source = "found for this query" + (f" ({found.reason})" if found.reason else "")
            found = principal_directions(store)
        self._directions = found
        self.description = f"{found.eigenvalues.shape[1]} principal directions of each timestep, {source}"

    def transform(self, queries: Floats) -> Floats:
        """The queries, deflated. Raises QueryError before `fit`."""
        if self._directions is None:
            raise QueryError("The deflated score is not fitted to a store. Call fit(store) first.")
        return self._directions.deflate(queries)


def score_method(store: Store, name: str) -> DminScore | DeflatedScore:
    """The built-in score with this name; `fit` is still to be called.

    Raises QueryError, before anything is computed, if there is no such score or the store is too large for it.
    """
    if name not in get_args(Score):
        raise QueryError(f"score is {name!r}; expected dmin or deflated.")
    if name == "dmin":
        return DminScore()
    facts = read_facts(store)
    if isinstance(facts, Unavailable) or not facts.principal:
        _check_small(store, facts.reason if isinstance(facts, Unavailable) else "")
    return DeflatedScore()


def _check_small(store: Store, why: str) -> None:
    """Raises QueryError if the store is too large to find directions for a query; `why` says why none are kept."""
    numbers = store.valid_count * len(store.header.timesteps) * store.header.dimension
    if numbers <= MAX_QUERY_NUMBERS:
        return
    make = "Make them" if store.complete else "Finish the capture, then make them"
    raise QueryError(
        "Deflated scores need the principal directions of the samples, which the store's index keeps; here "
        f"{why or 'it has none'}. A query finds them in up to {MAX_QUERY_NUMBERS:,} numbers; this trace has "
        f"{numbers:,}. {make} with dmin-trace index {store.path}, or give --score dmin."
    )
