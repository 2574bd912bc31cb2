"""Images and prompts in, query gradients out, and the most influential training samples for them.

`trace` is the face for programs. Behind it, `inputs` reads query images, `concept` takes a concept out of their
prompts, `capture` takes their gradients from the cache or has `script_runs` run the traced script on them, `answer`
finds the training samples, by the index or by a scan, and says what is known of them. `totals` sums over groups of
samples, which `groups` finds. `tables` are results as plain columns. Of the cache, `gradient_cache` is the files,
`query_key` what names them, and `file_marks` whether what a query depends on has changed.
"""

from dmin_trace.query.answer import AnsweredBy, Hit, ScoreMethod, TopK, answer_queries
from dmin_trace.query.capture import generate_images
from dmin_trace.query.concept import with_concepts
from dmin_trace.query.groups import group_samples
from dmin_trace.query.inputs import QueryInput, read_inputs, small_picture
from dmin_trace.query.record import Record, record_of
from dmin_trace.query.scores_file import check_scores_path
from dmin_trace.query.stages import Stages
from dmin_trace.query.tables import Table
from dmin_trace.query.totals import GroupTotal, Totals
from dmin_trace.query.trace import Trace, attribute, open_trace
