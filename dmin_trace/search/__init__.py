"""Rows in, ranked samples out.

`exact` scores every row; `deflation` takes out of queries what all samples share; `scores` names what samples are
ranked by. `build` makes an index beside a store, whose graph proposes candidates, and `index` searches it.
"""

from dmin_trace.search.build import build_index as build_index
from dmin_trace.search.deflation import Score as Score
from dmin_trace.search.deflation import row_blocks as row_blocks
from dmin_trace.search.exact import Ranking as Ranking
from dmin_trace.search.exact import check_k as check_k
from dmin_trace.search.exact import check_queries as check_queries
from dmin_trace.search.exact import exact_top_k as exact_top_k
from dmin_trace.search.exact import has_direction as has_direction
from dmin_trace.search.exact import scores_by_chunk as scores_by_chunk
from dmin_trace.search.index import Index as Index
from dmin_trace.search.index import open_index as open_index
from dmin_trace.search.index import search as search
from dmin_trace.search.index_files import Facts as Facts
from dmin_trace.search.index_files import Unavailable as Unavailable
from dmin_trace.search.index_files import damage as damage
from dmin_trace.search.index_files import index_beside as index_beside
from dmin_trace.search.index_files import read_facts as read_facts
from dmin_trace.search.scores import BuiltInScore as BuiltInScore
from dmin_trace.search.scores import check_score as check_score
from dmin_trace.search.scores import fit_score as fit_score
