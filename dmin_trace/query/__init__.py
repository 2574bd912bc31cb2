"""Images and prompts in, query gradients out, and the most influential training samples for them.

`trace` is the face for programs. Behind it, `inputs` reads query images, `capture` runs the traced script on them,
`answer` finds the training samples, by the index or by a scan, and says what is known of them.
"""

from dmin_trace.query.answer import AnsweredBy as AnsweredBy
from dmin_trace.query.answer import Hit as Hit
from dmin_trace.query.answer import ScoreMethod as ScoreMethod
from dmin_trace.query.answer import TopK as TopK
from dmin_trace.query.answer import answer_queries as answer_queries
from dmin_trace.query.capture import generate_images as generate_images
from dmin_trace.query.inputs import QueryInput as QueryInput
from dmin_trace.query.inputs import read_inputs as read_inputs
from dmin_trace.query.trace import Trace as Trace
from dmin_trace.query.trace import attribute as attribute
from dmin_trace.query.trace import open_trace as open_trace
