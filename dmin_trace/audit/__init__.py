"""How good the scores of a trace are, what of its data a person should look at, and whether its files are whole.

`detection` and `datamodeling` measure plain arrays, each value with a 95 % interval (`intervals`). `on_trace` measures
the scores of a trace, `samples` looks for near-copies, outliers and labels that do not fit, and `verify` compares the
files of a trace with their checksums.
"""

from dmin_trace.audit.datamodeling import Datamodeling, linear_datamodeling_score
from dmin_trace.audit.detection import detection_rate, duplicate_recall
from dmin_trace.audit.intervals import RESAMPLES
from dmin_trace.audit.on_trace import Measurement, measure_column, measure_datamodeling, read_retrained
from dmin_trace.audit.samples import KINDS, Audit, Finding, audit_trace
from dmin_trace.audit.verify import verify_store
