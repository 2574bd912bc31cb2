"""What samples are ranked by: how queries are changed before they are multiplied with the rows of the store."""

from dataclasses import dataclass
from typing import get_args

from dmin_trace.errors import QueryError
from dmin_trace.search.deflation import Directions, Score, principal_directions
from dmin_trace.search.exact import Floats
from dmin_trace.search.index import open_directions
from dmin_trace.search.index_files import Unavailable, read_facts
from dmin_trace.store import Store

MAX_QUERY_NUMBERS = 2**31
"""Numbers of gradients, N R v, up to which a query finds the principal directions itself: in about a minute."""


@dataclass(frozen=True)
class BuiltInScore:
    """A built-in score, fitted to a store: "dmin" leaves queries as they are, "deflated" takes directions out of them;
    `description` says in words which."""

    name: Score
    directions: Directions | None = None
    description: str = ""

    def transform(self, queries: Floats) -> Floats:
        return queries if self.directions is None else self.directions.deflate(queries)


def check_score(store: Store, name: str) -> None:
    """Raises QueryError if there is no built-in score of this name, or the store is too large for it."""
    if name not in get_args(Score):
        raise QueryError(f"score is {name!r}; expected dmin or deflated.")
    if name == "deflated" and (isinstance(facts := read_facts(store), Unavailable) or not facts.principal):
        _check_small(store, facts.reason if isinstance(facts, Unavailable) else "")


def fit_score(store: Store, name: str) -> BuiltInScore:
    """The built-in score of this name, with the directions that the store's index keeps, or that are found now. Raises
    what `check_score` does, and TraceError if the store is damaged."""
    check_score(store, name)
    if name == "dmin":
        return BuiltInScore("dmin")
    found, source = open_directions(store), "kept by the index"
    if isinstance(found, Unavailable):
        _check_small(store, found.reason)
        source = "found for this query" + (f" ({found.reason})" if found.reason else "")
        found = principal_directions(store)
    count = found.eigenvalues.shape[1]
    return BuiltInScore("deflated", found, f"{count} principal directions of each {store.header.gradient_of}, {source}")


def _check_small(store: Store, why: str) -> None:
    """Raises QueryError if the store is too large to find directions for a query; `why` says why none are kept."""
    numbers = store.valid_count * store.header.gradient_count * store.header.dimension
    if numbers <= MAX_QUERY_NUMBERS:
        return
    make = "Make them" if store.complete else "Finish the capture, then make them"
    raise QueryError(
        "Deflated scores need the principal directions of the samples, which the store's index keeps; here "
        f"{why or 'it has none'}. A query finds them in up to {MAX_QUERY_NUMBERS:,} numbers; this trace has "
        f"{numbers:,}. {make} with dmin-trace index {store.path}, or give --score dmin."
    )
