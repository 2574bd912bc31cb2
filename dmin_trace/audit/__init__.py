"""How good the scores of a trace are, and whether its files are whole.

`detection`, `datamodeling` and `counterfactuals` measure plain arrays, each value with a 95 % interval (`intervals`).
`on_trace` measures the scores of a trace, and `verify` compares its files with their checksums.
"""

from dmin_trace.audit.counterfactuals import Counterfactual, counterfactual
from dmin_trace.audit.datamodeling import Datamodeling, linear_datamodeling_score
from dmin_trace.audit.detection import TopRate, detection_rate, duplicate_recall
from dmin_trace.audit.intervals import RESAMPLES, Estimate
from dmin_trace.audit.on_trace import (
    DEFAULT_QUERIES,
    Measurement,
    Retrained,
    measure_column,
    measure_datamodeling,
    read_retrained,
)
from dmin_trace.audit.verify import verify_store

__all__ = [
    "DEFAULT_QUERIES",
    "RESAMPLES",
    "Counterfactual",
    "Datamodeling",
    "Estimate",
    "Measurement",
    "Retrained",
    "TopRate",
    "counterfactual",
    "detection_rate",
    "duplicate_recall",
    "linear_datamodeling_score",
    "measure_column",
    "measure_datamodeling",
    "read_retrained",
    "verify_store",
]
