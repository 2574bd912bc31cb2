"""By what a capture's script and data set are known again: SHA-256 of the script's file, and of a few batches.

A fingerprint of the data set is of the batches of a few samples, spread over it, each fetched as the capture fetches
it: it differs if the count, the order, the content or the transforms do. A data set that gives something else each time
it is asked, under the same seed, has none.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

SAMPLED = 8
"""Samples that are looked at."""


def data_fingerprint(samples: int, fetch: Callable[[int], Any]) -> str:
    """Of a data set, by the batches of a few of its samples; "" if it gives others when it is asked again, or some that
    cannot be looked into.

    Args:
        samples: N.
        fetch: gives the batch of one sample, under the same seed each time.
    """
    chosen = sorted({round(k * (samples - 1) / (SAMPLED - 1)) for k in range(SAMPLED)})
    try:
        first, again = (_batches(samples, chosen, fetch) for _ in range(2))
    except Exception:
        # A kind of tensor without bytes, say. A capture is not to end for want of a fingerprint.
        logger.debug("The data set has no fingerprint.", exc_info=True)
        return ""
    return first if first == again else ""


def _batches(samples: int, chosen: list[int], fetch: Callable[[int], Any]) -> str:
    digest = hashlib.sha256(f"{samples}".encode())
    for sample in chosen:
        try:
            batch = fetch(sample)
        except Exception as error:
            # A sample that fails to load is told by how it fails.
            batch = type(error).__name__
        digest.update(f" {sample} ".encode())
        _add(digest.update, batch)
    return digest.hexdigest()


def _add(update: Callable[[bytes], None], value: Any) -> None:
    """Adds a value's content; of what cannot be looked into, its type."""
    # A query wants to know its script alone, and not to wait for torch.
    import torch

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
            _add(update, inside)
    elif isinstance(value, (list, tuple)):
        update(f"{len(value)}".encode())
        for inside in value:
            _add(update, inside)
    elif isinstance(value, (str, bytes, int, float, type(None))):
        update(repr(value).encode("utf-8", "backslashreplace"))
    elif hasattr(value, "tobytes") and hasattr(value, "size"):
        # An image, or a number of numpy's.
        update(f"{value.size} {getattr(value, 'mode', '')}".encode())
        update(bytes(value.tobytes()))
