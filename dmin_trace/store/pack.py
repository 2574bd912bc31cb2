"""Rewrites a finished store with another codec, another dtype, or fewer dimensions.

A projection folds: adding bins j and j + v/2 gives the projected gradient of the plan of v/2 dimensions. Folded
gradients are normalised again, as those of a capture are. The new store has the same samples, norms, losses,
columns and thumbnails, an id of its own, and the same weights and command for queries.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dmin_trace.command import recall, remember
from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.settings import Codec, Dtype, make_settings
from dmin_trace.store.files import check_free, writing
from dmin_trace.store.header import Header, ProjectionFacts
from dmin_trace.store.layout import choose_chunk_rows, weights_beside
from dmin_trace.store.quantisation import quantise
from dmin_trace.store.reader import Store, open_store
from dmin_trace.store.writer import Writer, create

FOLDED_NUMBERS = 2**20
"""Numbers that are folded at a time."""


def pack_store(
    store: Store,
    out: Path,
    *,
    codec: Codec | None = None,
    dtype: Dtype | None = None,
    dimension: int | None = None,
    thumbnails: bool = True,
    progress: Callable[[int], object] = lambda samples: None,
) -> Store:
    """Writes a finished store anew at `out`, whole or not at all, and returns the new store.

    codec, dtype, dimension: of the new store, where they differ; the dimension is v, v/2, v/4 and so on.
    thumbnails: whether the new store has the thumbnails of the samples.
    progress: called with the number of samples of each chunk that is written.

    Raises SettingsError if a codec, dtype or dimension is invalid, the store does not fold to it, or nothing differs;
    TraceError if the store is unfinished or damaged, something is at `out`, or the disk refuses.
    """
    if not store.complete:
        raise TraceError(f"{store.path} is unfinished. Finish the capture before it is packed.")
    header = _packed_header(store, codec, dtype, dimension, thumbnails)
    check_free(out)
    # Queries need the weights.
    weights, beside = weights_beside(store.path), weights_beside(out)
    has_weights = weights.exists()
    if has_weights and (beside.exists() or beside.is_symlink()):
        raise TraceError(f"{beside} exists already, where a copy of {weights} is to lie. Give another --out.")
    partial = out.with_name(f".{out.name}.{header.id}.packing")
    try:
        with writing(out):
            writer = create(partial, header)
            for chunk in range(header.chunks):
                _write(store, writer, chunk)
                progress(len(header.rows(chunk)))
            writer.finish()
            if has_weights:
                _link(weights, beside)
            try:
                partial.rename(out)
            except OSError:
                if has_weights:
                    beside.unlink(missing_ok=True)
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if (command := recall(store.header.id)) is not None:
        remember(header.id, command)
    return open_store(out)


def _packed_header(
    store: Store, codec: Codec | None, dtype: Dtype | None, dimension: int | None, thumbnails: bool
) -> Header:
    old = store.header
    changed = {"codec": codec or old.codec, "dtype": dtype or old.dtype, "dimension": dimension or old.dimension}
    # Queries read the settings, and a store may come from anybody: they are checked.
    new = make_settings({**old.settings, **changed})
    dropped = not thumbnails and old.thumbnails is not None
    if (new.codec, new.dtype, new.dimension) == (old.codec, old.dtype, old.dimension) and not dropped:
        raise SettingsError(
            f"{store.path} has codec {old.codec}, dtype {old.dtype} and dimension {old.dimension} already. Give "
            "another --codec, --dtype or --dimension, or --no-thumbnails for a store that has some."
        )
    projection = _folded_projection(old, new.dimension)
    rows = choose_chunk_rows(old.samples, len(old.timesteps), new.dimension, new.dtype, group_count=old.group_count)
    header = replace(old, codec=new.codec, dtype=new.dtype, dimension=new.dimension, projection=projection)
    settings = {**old.settings, **changed} | ({"thumbnails": 0} if dropped else {})
    facts = None if dropped else old.thumbnails
    return replace(header, id=uuid.uuid4().hex, chunk_rows=rows, settings=settings, thumbnails=facts)


def _folded_projection(old: Header, dimension: int) -> ProjectionFacts:
    """The projection of the folded gradients. Raises SettingsError if there is none."""
    facts = old.projection
    if dimension == old.dimension:
        return facts
    if dimension > old.dimension:
        raise SettingsError(
            f"dimension is {dimension}, and the trace has {old.dimension}: what was not kept cannot be made. Give "
            f"{old.dimension // 2} or a smaller power of two, or capture again."
        )
    if facts.kind != "rotation":
        raise SettingsError(
            f"The projection is {facts.kind}, which does not fold: no query could be projected like the folded "
            "gradients. Capture again with the dimension that is wanted."
        )
    # This imports torch, which nothing else in the store needs.
    from dmin_trace.project import make_plan

    whole = make_plan(facts.length, old.dimension, facts.seed, facts.kind, facts.width)
    folded = make_plan(facts.length, dimension, facts.seed, facts.kind, whole.width)
    if whole.fingerprint != facts.fingerprint:
        raise SettingsError(
            f"The projection's fingerprint is {facts.fingerprint[:16]}, and this version's {whole.fingerprint[:16]}. "
            "Fold the trace with the version of dmin_trace that made it."
        )
    return replace(facts, width=folded.width, fingerprint=folded.fingerprint)


def _write(store: Store, writer: Writer, chunk: int) -> None:
    old, new = store.header, writer.header
    rows = new.rows(chunk)
    values = np.empty((len(rows), new.gradient_count, new.dimension), new.dtype)
    kept = store.numbers(rows)
    step = max(1, FOLDED_NUMBERS // (new.gradient_count * old.dimension))
    for number in range(rows.start // old.chunk_rows, (rows.stop - 1) // old.chunk_rows + 1):
        held = old.rows(number)
        grad = store.grad_chunk(number)
        last = min(held.stop, rows.stop)
        for start in range(max(held.start, rows.start), last, step):
            stop = min(start + step, last)
            there, here = slice(start - held.start, stop - held.start), slice(start - rows.start, stop - rows.start)
            if (old.dtype, old.dimension) == (new.dtype, new.dimension):
                values[here] = grad[there]
                continue
            with np.errstate(over="ignore", invalid="ignore"):  # numbers of a damaged store; an error below
                folded = grad[there].astype(np.float32) * kept.scale[here][:, :, None]
                if old.dimension != new.dimension:
                    folded = folded.reshape(*folded.shape[:2], -1, new.dimension).sum(axis=2)
                    norms = np.sqrt(np.square(folded, dtype=np.float64).sum(axis=2))[:, :, None]
                    folded = (folded / np.where(norms == 0, 1, norms)).astype(np.float32)  # zeros stay zeros
            if not np.isfinite(folded).all():
                raise TraceError(f"{store.path} is damaged: chunk {number} holds numbers that are not finite.")
            values[here], kept.scale[here] = quantise(folded, new.dtype)
    columns = {name: store.column_at(name, rows) for name in new.columns}
    thumbnails = store.thumbnails.stored(rows) if new.thumbnails is not None else []
    writer.write(chunk, values, kept.scale, kept.norm, kept.loss, kept.sample, columns, thumbnails)


def _link(file: Path, beside: Path) -> None:
    """Gives a file, which may have gigabytes, a second name; copies it where that is on another disk."""
    try:
        os.link(file, beside)
    except OSError:
        partial = beside.with_name(f".{beside.name}.{uuid.uuid4().hex}.partial")
        try:
            shutil.copyfile(file, partial)
            partial.replace(beside)
        finally:
            partial.unlink(missing_ok=True)
