"""How good the scores of a trace are, and whether its files are whole.

`detection` and `datamodeling` measure plain arrays, each value with a 95 % interval (`intervals`). `on_trace` measures
the scores of a trace, and `verify` compares its files with their checksums.
"""

from dmin_trace.audit.datamodeling import Datamodeling as Datamodeling
from dmin_trace.audit.datamodeling import linear_datamodeling_score as linear_datamodeling_score
from dmin_trace.audit.detection import detection_rate as detection_rate
from dmin_trace.audit.detection import duplicate_recall as duplicate_recall
from dmin_trace.audit.intervals import RESAMPLES as RESAMPLES
from dmin_trace.audit.on_trace import Measurement as Measurement
from dmin_trace.audit.on_trace import measure_column as measure_column
from dmin_trace.audit.on_trace import measure_datamodeling as measure_datamodeling
from dmin_trace.audit.on_trace import read_retrained as read_retrained
from dmin_trace.audit.verify import verify_store as verify_store
