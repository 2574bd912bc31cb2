"""Rows in, ranked samples out.

`exact` scores every row; `deflation` takes out of queries what all samples share; `scores` names what samples are
ranked by. `build` makes an index beside a store, whose graph proposes candidates, and `index` searches it.
"""

from dmin_trace.search.build import build_index
from dmin_trace.search.deflation import Directions, Score, choose_directions, principal_directions
from dmin_trace.search.exact import exact_top_k, scores_by_chunk
from dmin_trace.search.graph import GraphError, load_graph
from dmin_trace.search.index import Index, open_directions, open_index, search
from dmin_trace.search.index_files import Depth, Facts, Unavailable, damage, index_beside, read_facts
from dmin_trace.search.ranking import Ranking, check_k, check_queries, has_direction, rerank
from dmin_trace.search.scores import MAX_QUERY_NUMBERS, DeflatedScore, DminScore, score_method

__all__ = [
    "DeflatedScore",
    "Depth",
    "Directions",
    "DminScore",
    "Facts",
    "GraphError",
    "Index",
    "MAX_QUERY_NUMBERS",
    "Ranking",
    "Score",
    "Unavailable",
    "build_index",
    "check_k",
    "check_queries",
    "choose_directions",
    "damage",
    "exact_top_k",
    "has_direction",
    "index_beside",
    "load_graph",
    "open_directions",
    "open_index",
    "principal_directions",
    "read_facts",
    "rerank",
    "score_method",
    "scores_by_chunk",
    "search",
]
