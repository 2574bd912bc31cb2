"""Rows in, ranked samples out.

`exact` scores every row; `deflation` takes out of queries what all samples share; `scores` names what samples are
ranked by; `background` says which of them stand out. `build` makes an index beside a store, whose graph proposes
candidates, and `index` searches it. `alike` compares the samples with each other.
"""

from dmin_trace.search.alike import NEAR_COPY, clusters, find_alike, near_copies, own_parts
from dmin_trace.search.background import Background, fit_background
from dmin_trace.search.build import build_index
from dmin_trace.search.deflation import Score, row_blocks
from dmin_trace.search.exact import Ranking, check_queries, exact_top_k, has_direction, scores_by_chunk, usable_k
from dmin_trace.search.index import Index, open_index, search
from dmin_trace.search.index_files import Facts, Unavailable, damage, index_beside, read_facts
from dmin_trace.search.scores import BuiltInScore, check_score, fit_score
