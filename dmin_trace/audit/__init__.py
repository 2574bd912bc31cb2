"""How good the answers of a store are: `measures` of plain arrays, and the same of a store's scores (`on_trace`)."""

from dmin_trace.audit.measures import RESAMPLES, Datamodeling, counterfactual, detection_rate, linear_datamodeling_score
from dmin_trace.audit.on_trace import QUERIES, copies, datamodeling, detection, read_retrained, stored_gradients
from dmin_trace.audit.verify import verify_store

__all__ = [
    "Datamodeling",
    "QUERIES",
    "RESAMPLES",
    "copies",
    "counterfactual",
    "datamodeling",
    "detection",
    "detection_rate",
    "linear_datamodeling_score",
    "read_retrained",
    "stored_gradients",
    "verify_store",
]
