"""Images and prompts in, query gradients out, and the most influential training samples for them.

`trace` is the face for programs. Behind it, `capture` runs the traced script on query images, `answer` finds the
training samples, by the index or by a scan, and `hits` and `topk` say what is known of them.
"""

from dmin_trace.query.answer import answer_queries
from dmin_trace.query.capture import sample_queries
from dmin_trace.query.generate import generate_images
from dmin_trace.query.hits import Hit
from dmin_trace.query.inputs import QueryInput, read_inputs
from dmin_trace.query.topk import AnsweredBy, TopK
from dmin_trace.query.trace import ScoreMethod, Trace, attribute, open_trace

__all__ = [
    "AnsweredBy",
    "Hit",
    "QueryInput",
    "ScoreMethod",
    "TopK",
    "Trace",
    "answer_queries",
    "attribute",
    "generate_images",
    "open_trace",
    "read_inputs",
    "sample_queries",
]
