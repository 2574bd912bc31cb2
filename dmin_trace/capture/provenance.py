"""Where a store's rows come from: a fingerprint of the data set, and the header that a capture writes.

The fingerprint of a data set is the SHA-256 over the batches of a few samples, spread over it, each fetched as the
capture fetches it. It changes with the number of samples, their order, their content and the transforms. A data set
that gives another batch each time, under the same seed, has no fingerprint.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from dmin_trace.capture.checks import RowChecks
from dmin_trace.capture.source import CaptureSource
from dmin_trace.capture.weights import Trainable
from dmin_trace.project import Plan
from dmin_trace.settings import Dtype, Settings
from dmin_trace.store import Header, NoiseFacts, ParameterFacts, ProjectionFacts
from dmin_trace.version import VERSION

logger = logging.getLogger(__name__)

FINGERPRINT_SAMPLES = 8
"""Samples whose batches are in the fingerprint of a data set."""


def make_header(
    settings: Settings,
    source: CaptureSource,
    trainable: Trainable,
    plan: Plan,
    checks: RowChecks,
    *,
    weights: str,
    dtype: Dtype,
    chunk_rows: int,
    of_queries: bool,
) -> Header:
    """Makes a store's header, once the first sample is recorded; `checks` holds what that sample has shown.

    `weights` is their fingerprint. A store of queries is temporary: it is not compressed, and its data has no
    fingerprint.
    """
    # Draws of one timestep make the same calls.
    calls = tuple(tuple(made) for made in checks.calls[:: settings.draws])
    packages = dict.fromkeys(("torch", *source.packages, "numpy"))
    reached = zip(trainable.names, checks.reached, strict=True)
    fetch = None if of_queries else source.fetch
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    return Header(
        id=uuid.uuid4().hex,
        samples=source.samples,
        timesteps=checks.timesteps,
        dimension=settings.dimension,
        dtype=dtype,
        chunk_rows=chunk_rows,
        projection=ProjectionFacts(
            kind=settings.projection,
            seed=settings.seed,
            length=plan.length,
            width=plan.width,
            fingerprint=plan.fingerprint,
        ),
        parameters=ParameterFacts(names=trainable.names, shapes=trainable.shapes, fingerprint=trainable.fingerprint),
        weights=weights,
        noise=NoiseFacts(seed=settings.seed, draws=calls),
        transform=settings.transform,
        draws=settings.draws,
        codec="none" if of_queries else settings.codec,
        batch=checks.batch_shapes,
        columns=source.columns.kinds,
        settings=kept,
        writers={"dmin_trace": VERSION} | {name: version(name) for name in packages},
        script=source.script.name,
        script_sha256=source.script.sha256,
        data_sha256="" if fetch is None else data_fingerprint(source.samples, fetch),
        unreached=tuple(name for name, was_reached in reached if not was_reached),
    )


def data_fingerprint(samples: int, fetch: Callable[[int], Any]) -> str:
    """Returns the fingerprint of a data set of N samples; "" if its batches vary, or hold what cannot be read.

    `fetch` gives the batch of one sample, under the same seed each time.
    """
    last = FINGERPRINT_SAMPLES - 1
    chosen = sorted({round(k * (samples - 1) / last) for k in range(FINGERPRINT_SAMPLES)})
    try:
        first, second = (_hash_batches(samples, chosen, fetch) for _ in range(2))
    except Exception:
        # A kind of tensor without bytes, for example. A capture does not end for want of a fingerprint.
        logger.debug("The data set has no fingerprint.", exc_info=True)
        return ""
    return first if first == second else ""


def _hash_batches(samples: int, chosen: list[int], fetch: Callable[[int], Any]) -> str:
    digest = hashlib.sha256(f"{samples}".encode())
    for sample in chosen:
        try:
            batch = fetch(sample)
        except Exception as error:
            # A sample that fails to load is identified by its error.
            batch = type(error).__name__
        digest.update(f" {sample} ".encode())
        _hash_value(digest.update, batch)
    return digest.hexdigest()


def _hash_value(update: Callable[[bytes], None], value: Any) -> None:
    """Adds a value's content; for an object of unknown kind, its type."""
    update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        update(f"{value.dtype} {tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        update(f"{value.dtype} {value.shape}".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for name, inside in value.items():
            update(repr(name).encode("utf-8", "replace") if isinstance(name, (str, int)) else b"")
            _hash_value(update, inside)
    elif isinstance(value, (list, tuple)):
        update(f"{len(value)}".encode())
        for inside in value:
            _hash_value(update, inside)
    elif isinstance(value, (str, bytes, int, float, type(None))):
        update(repr(value).encode("utf-8", "backslashreplace"))
    elif hasattr(value, "tobytes") and hasattr(value, "size"):
        # An image, or a numpy scalar.
        update(f"{value.size} {getattr(value, 'mode', '')}".encode())
        update(bytes(value.tobytes()))
