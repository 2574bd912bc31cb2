"""What a capture is of, and where its rows go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmin_trace.capture.dataset import Columns
from dmin_trace.command import Script
from dmin_trace.store import Header, Store


@dataclass(frozen=True, kw_only=True)
class CaptureSource:
    """What a capture is of, besides the weights and the settings.

    samples: N, the number of training samples or of queries.
    columns: the readable columns of the data set.
    trained: whether the training moved a parameter. The loss must depend on each one that it moved.
    fetch: gives the batch of one sample as the capture fetches it, or None if the data set is not known.
    script: the script whose loop is run; an unknown one if the loop is the user's own code.
    edited_script: the script may differ from the one that began the store.
    packages: further packages whose versions are kept in the header.
    """

    samples: int
    columns: Columns
    trained: Callable[[torch.nn.Parameter], bool]
    fetch: Callable[[int], Any] | None = None
    script: Script = Script()
    edited_script: bool = False
    packages: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class CaptureTarget:
    """Where the rows of a capture go.

    out: the path of the store.
    resume: whether to continue an unfinished store at `out`.
    like: the finished store that the queries are for; None for a capture of training samples.
    reserve: bytes that must stay free on the disk for what the script saves at its end; None for no such limit.
    trial: capture two samples, check them, and write nothing.
    created: called with the header of a new store.
    """

    out: Path
    resume: bool = True
    like: Store | None = None
    reserve: int | None = None
    trial: bool = False
    created: Callable[[Header], None] = lambda header: None
