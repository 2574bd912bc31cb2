"""Rows in, ranked samples out.

`exact` scores every row, `deflation` takes out of queries what all samples share, and `index` proposes candidates.
"""

from dmin_trace.search.deflation import FOUND, Directions, Score, choose_directions, principal_directions
from dmin_trace.search.exact import all_scores, exact_top_k, scores_by_chunk, self_influence
from dmin_trace.search.graph import GraphError, load_graph
from dmin_trace.search.index import (
    DIRECTIONS,
    Depth,
    Facts,
    Index,
    Unavailable,
    build_index,
    damage,
    graph_memory,
    index_beside,
    open_directions,
    open_index,
    read_facts,
    search,
)
from dmin_trace.search.ranking import Ranking, check_k, check_queries, has_direction, rerank
from dmin_trace.search.scores import DeflatedScore, DminScore, ScoreMethod, score_method

__all__ = [
    "DeflatedScore",
    "DminScore",
    "ScoreMethod",
    "score_method",
    "scores_by_chunk",
    "self_influence",
    "Depth",
    "Directions",
    "FOUND",
    "Facts",
    "GraphError",
    "Index",
    "Ranking",
    "Score",
    "Unavailable",
    "all_scores",
    "DIRECTIONS",
    "build_index",
    "graph_memory",
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
    "search",
]
