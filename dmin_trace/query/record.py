"""What an answer was made from, so that it can be repeated, and compared with another: `Record`."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.store import Store
from dmin_trace.version import VERSION


@dataclass(frozen=True, kw_only=True)
class Record:
    """What an answer was made from.

    made, version: when, in UTC, and by which version of dmin_trace.
    trace: the id of the trace.
    samples, searched: how many samples the trace has, and how many of them are captured.
    queries: SHA-256 of the queries' projected gradients; "" for what needs no query.
    weights, weights_of: the fingerprint of the weights that were captured; which of the run's weights these are.
    data, script, script_sha256: the fingerprint of the data set; the name and the fingerprint of the script; "" if not
        known.
    settings: the settings of the capture.
    writers: the versions of the packages that captured.
    """

    made: datetime
    version: str
    trace: str
    samples: int
    searched: int
    queries: str
    weights: str
    weights_of: str
    data: str
    script: str
    script_sha256: str
    settings: Mapping[str, Any]
    writers: Mapping[str, str]


def record_of(store: Store, gradients: NDArray[np.float32] | None = None) -> Record:
    """The record of an answer that is made now from a store, for queries with these gradients."""
    header = store.header
    return Record(
        made=datetime.now(UTC).replace(microsecond=0),
        version=VERSION,
        trace=header.id,
        samples=header.samples,
        searched=len(store.rows_done),
        queries="" if gradients is None else hashlib.sha256(np.ascontiguousarray(gradients, "<f4").data).hexdigest(),
        weights=header.weights,
        weights_of=header.weights_of,
        data=header.data_sha256,
        script=header.script,
        script_sha256=header.script_sha256,
        settings=header.settings,
        writers=header.writers,
    )
