"""Images and prompts in, query gradients out, and the most influential training samples for them."""

from dmin_trace.query.answer import (
    Answer,
    answer_queries,
    attribute,
    capture_queries,
    check_score,
    generate_images,
    query_rows,
    query_transform,
    sample_gradients,
)
from dmin_trace.query.hits import Hit
from dmin_trace.query.inputs import QueryInput, read_inputs

__all__ = [
    "Answer",
    "Hit",
    "QueryInput",
    "answer_queries",
    "attribute",
    "capture_queries",
    "check_score",
    "generate_images",
    "query_rows",
    "query_transform",
    "read_inputs",
    "sample_gradients",
]
