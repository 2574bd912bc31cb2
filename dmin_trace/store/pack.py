"""Rewrites a finished store: another codec, another dtype, or fewer dimensions.

A projection folds (`compress`): adding bins j and j + v/2 gives the sketch that the plan of v/2 makes, so that a store
can be made smaller without another capture. Folded sketches are divided by their own norms, as those of a capture are.
The new store holds the same samples, norms, losses and columns, has an id of its own, and answers the same questions:
the weights are put beside it, and the command of the traced run is remembered for it.

Chunk by chunk, as a capture writes, under a name of its own until it is whole.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.command import recall, remember
from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.settings import Codec, Dtype, make_settings
from dmin_trace.store import reader as store
from dmin_trace.store.header import Header, ProjectionFacts
from dmin_trace.store.reader import Store, Writer

PART = 2**20
"""Numbers that are folded at a time."""


def pack_store(
    trace: Store,
    out: Path,
    *,
    codec: Codec | None = None,
    dtype: Dtype | None = None,
    dimension: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Store:
    """Writes a finished store anew at `out`, whole or not at all.

    What is stored is copied as it is unless the dtype or the dimension changes.

    Args:
        trace: the store.
        out: the new one.
        codec, dtype, dimension: of the new store; those of the old one where not given. The dimension is v, v/2, v/4
            and so on.
        progress: called with the number of samples of each chunk that is written.

    Returns:
        The new store.

    Raises:
        SettingsError: a codec, dtype or dimension that cannot be meant, or to which the store does not fold, or none
            that differs.
        TraceError: the store is unfinished or damaged, something is at `out`, or the disk does not take it.
    """
    if not trace.complete:
        raise TraceError(f"{trace.path} is unfinished. Finish the capture before it is packed.")
    header = _packed_header(trace, codec, dtype, dimension)
    store.check_free(out)
    # Queries need the weights.
    weights, beside = store.weights_beside(trace.path), store.weights_beside(out)
    has_weights = weights.exists()
    if has_weights and (beside.exists() or beside.is_symlink()):
        raise TraceError(f"{beside} exists already, where a copy of {weights} is to lie. Give another --out.")
    partial = out.with_name(f".{out.name}.{header.id}.packing")
    try:
        columns = {name: trace.column(name) for name in header.columns}
        writer = store.create(partial, header)
        for chunk in range(writer.chunks):
            _write(trace, writer, chunk, columns)
            if progress is not None:
                progress(len(writer.rows(chunk)))
        writer.finish()
        if has_weights:
            _link(weights, beside)
        try:
            partial.rename(out)
        except OSError:
            if has_weights:
                beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TraceError(f"{out} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if (command := recall(trace.header.id)) is not None:
        remember(header.id, command)
    return store.open_store(out)


def _packed_header(trace: Store, codec: Codec | None, dtype: Dtype | None, dimension: int | None) -> Header:
    old = trace.header
    changed = {"codec": codec or old.codec, "dtype": dtype or old.dtype, "dimension": dimension or old.dimension}
    # The settings of an old store may come from anybody; a query reads them.
    settings = make_settings({**old.settings, **changed})
    if (settings.codec, settings.dtype, settings.dimension) == (old.codec, old.dtype, old.dimension):
        raise SettingsError(
            f"{trace.path} has codec {old.codec}, dtype {old.dtype} and dimension {old.dimension} already. Give "
            "another --codec, --dtype or --dimension."
        )
    projection = old.projection
    if settings.dimension != old.dimension:
        projection = _folded_projection(old, settings.dimension)
    return replace(
        old,
        id=uuid.uuid4().hex,
        dimension=settings.dimension,
        dtype=settings.dtype,
        codec=settings.codec,
        chunk_rows=store.choose_chunk_rows(old.samples, len(old.timesteps), settings.dimension, settings.dtype),
        projection=projection,
        settings={**old.settings, **changed},
    )


def _folded_projection(old: Header, dimension: int) -> ProjectionFacts:
    """The plan that the folded sketches are of. Raises SettingsError if there is none."""
    facts = old.projection
    if dimension > old.dimension:
        raise SettingsError(
            f"dimension is {dimension}, and the trace has {old.dimension}: what was not kept cannot be made. Give "
            f"{old.dimension // 2} or a smaller power of two, or capture again."
        )
    if facts.kind != "rotation":
        raise SettingsError(
            f"The projection is {facts.kind}, whose folded sketches are those of no plan, so no query could be "
            "compared with them. Capture again with the dimension that is wanted."
        )
    # torch is imported where a plan is needed, and nowhere else.
    from dmin_trace.project import make_plan

    whole = make_plan(facts.length, old.dimension, facts.seed, facts.kind, facts.width)
    folded = make_plan(facts.length, dimension, facts.seed, facts.kind, whole.width)
    if whole.fingerprint != facts.fingerprint:
        raise SettingsError(
            f"The projection's fingerprint is {facts.fingerprint[:16]}, and this version's {whole.fingerprint[:16]}. "
            "Fold the trace with the version of dmin_trace that made it."
        )
    return replace(facts, width=folded.width, fingerprint=folded.fingerprint)


def _write(trace: Store, writer: Writer, chunk: int, columns: Mapping[str, list[Any]]) -> None:
    """Writes one chunk of the new store from those of the old one that hold its samples."""
    old, new = trace.header, writer.header
    slots = writer.rows(chunk)
    shape = (len(slots), len(new.timesteps))
    values = np.empty((*shape, new.dimension), new.dtype)
    scale = np.ones(shape, np.float32)
    for number in range(slots.start // old.chunk_rows, (slots.stop - 1) // old.chunk_rows + 1):
        held = old.rows(number)
        first, last = max(held.start, slots.start), min(held.stop, slots.stop)
        grad, own = trace.grad_chunk(number), trace.scale_chunk(number)
        rows = max(1, PART // (shape[1] * old.dimension))
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            there, here = slice(start - held.start, stop - held.start), slice(start - slots.start, stop - slots.start)
            if (old.dtype, old.dimension) == (new.dtype, new.dimension):
                values[here], scale[here] = grad[there], own[there]
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # numbers of a damaged store; an error below
                    folded = _folded(grad[there].astype(np.float32) * own[there][:, :, None], new.dimension)
                if not np.isfinite(folded).all():
                    raise TraceError(f"{trace.path} is damaged: chunk {number} holds numbers that are not finite.")
                values[here], scale[here] = store.quantise(folded, new.dtype)
    here = slice(slots.start, slots.stop)
    texts = {name: column[here] for name, column in columns.items()}
    writer.write_stored(chunk, values, scale, trace.norm[here], trace.loss[here], trace.sample[here], texts)


def _folded(sketches: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """Sketches (n, T, v) folded to fewer bins and divided by their norms; one that is zero stays so."""
    if sketches.shape[2] == dimension:
        return sketches
    folded = sketches.reshape(*sketches.shape[:2], -1, dimension).sum(axis=2)
    norms = np.sqrt(np.square(folded, dtype=np.float64).sum(axis=2))[:, :, None]
    unit: NDArray[np.float32] = (folded / np.where(norms == 0, 1, norms)).astype(np.float32)
    return unit


def _link(file: Path, beside: Path) -> None:
    """A second name for a file, which may be gigabytes; a copy where the two stores lie on different disks."""
    try:
        os.link(file, beside)
    except OSError:
        partial = beside.with_name(f".{beside.name}.{uuid.uuid4().hex}.partial")
        try:
            shutil.copyfile(file, partial)
            partial.replace(beside)
        finally:
            partial.unlink(missing_ok=True)
