"""What a store, an index and a score are, in words for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmin_trace.search import Facts, Unavailable
    from dmin_trace.store import Store


def describe_score(score: str, groups: Sequence[Sequence[float]]) -> str:
    """What a score with this name is, of gradients of these groups of timesteps."""
    rows, timesteps = len(groups), sum(map(len, groups))
    if rows == timesteps:
        summed = f"summed over {timesteps} {'timestep' if timesteps == 1 else 'timesteps'}"
    elif rows == 1:
        summed = f"of {timesteps} pooled timesteps"
    else:
        summed = f"summed over {rows} groups of {timesteps} pooled timesteps"
    if score == "dmin":
        meaning = f"{rows} would be a perfect match"
        return f"score: inner product of normalised compressed gradients, {summed}; {meaning}"
    if score != "deflated":
        return f"{score} score, {summed}; compare within a query only"
    return (
        f"{score} score: inner product of compressed gradients, the query's without what all samples share, {summed}; "
        "above 0 helps, below 0 hinders; compare within a query only"
    )


def describe_concept(without: str) -> str:
    """What a query for a concept is for, by the prompt without it."""
    rest = f"'{without}'" if without else "an empty prompt"
    return f"for what the prompt has beyond {rest}"


def describe_store(store: Store) -> list[tuple[str, str]]:
    """Names and values that `dmin-trace info` shows of a store."""
    from dmin_trace.store import chunk_file

    header = store.header
    rows = sum(len(header.rows(chunk)) for chunk in store.chunks_done)
    stored: float = header.sample_bytes
    if header.codec != "none" and rows:
        files = [chunk_file(store.path, "grad", chunk) for chunk in store.chunks_done]
        stored = sum(file.stat().st_size for file in files if file.is_file()) / rows or stored
    whole = header.gradient_count * header.projection.length * 4
    state = "complete" if store.complete else f"unfinished: {int(store.done.sum())} of {header.chunks} chunks are done"
    chunk_bytes = header.chunk_rows * header.sample_bytes
    unreached = f"{len(header.unreached):,} tensors, among them {_first_values(header.unreached, 3)}"
    shapes = (f"{name}({', '.join(map(str, shape))})" for name, shape in header.noise.draws[0])
    facts = [
        ("samples", f"{rows:,} of {header.samples:,}; {state}"),
        # A capture that has only begun has no rows yet.
        *(_describe_unranked(store) if rows else ()),
        ("timesteps", f"{len(header.timesteps)}: {', '.join(f'{t:g}' for t in header.timesteps)}"),
        ("rows", _describe_rows(header.groups) if header.group_count is not None else ""),
        ("gradient", f"{header.projection.length:,} numbers in {len(header.parameters.names):,} tensors"),
        ("never reached", f"{unreached}; their gradients are zero" if header.unreached else ""),
        ("compressed", f"to {header.dimension:,} numbers of {header.dtype}, projection {header.projection.kind}"),
        ("a sample", f"{stored:,.0f} bytes; its gradients in float32: {whole:,}, {whole / stored:,.4g} times as many"),
        ("the store", f"{store.bytes:,} bytes, codec {header.codec}"),
        ("chunks", f"{header.chunks:,} of {header.chunk_rows:,} samples, {chunk_bytes:,} bytes"),
        ("draws", f"{header.draws} at each timestep; a gradient is their mean" if header.draws != 1 else ""),
        ("transform", header.transform),
        ("seed", f"{header.projection.seed} (projection), {header.noise.seed} (noise)"),
        ("the script draws", ", ".join(shapes)),
        ("frozen models", ", ".join(f"{model.name} ({model.numbers:,} numbers)" for model in header.run.models)),
        ("computed with", "; ".join(f"{name}: {value}" for name, value in header.run.conditions.items())),
        ("columns", ", ".join(header.columns) or "none"),
        ("thumbnails", _describe_thumbnails(store, rows)),
        ("weights", f"{header.weights[:16]}{'' if store.final else '; the training ended with others'}"),
        ("weights are", header.weights_of),
        ("script", f"{header.script} {header.script_sha256[:16]}".strip() or "not known"),
        ("data set", header.data_sha256[:16] or "not known"),
        ("id", header.id),
        ("written by", ", ".join(f"{name} {version}" for name, version in header.writers.items())),
    ]
    return [(name, value) for name, value in facts if value]


def describe_index(facts: Facts, store: Store) -> list[tuple[str, str]]:
    """Names and values that `dmin-trace index` shows of the index it built."""
    max_hits = {depth.score: depth.k for depth in facts.depths}
    own = store.header.gradient_of
    served = "; ".join(f"{kind} queries for up to {k} hits" for kind, k in max_hits.items())
    parts = f"{facts.fold:,} bins and {facts.directions} directions for each {own}"
    described = [
        ("vectors", f"{facts.vectors:,} of {facts.length:,} numbers: {parts}"),
        *((of.name, f"{of.recall:.3f}, from {of.candidates} candidates (ef {of.ef})") for of in facts.depths),
        ("measured with", f"{facts.queries} samples that were not in the graph, and mixtures of them"),
        ("size", f"{facts.bytes:,} bytes, {facts.bytes / store.bytes:.1%} of the store's"),
        ("serves", served or "nothing: queries scan"),
        ("deflated scores", f"by {facts.principal} principal directions of each {own}" if facts.principal else ""),
        ("short of", facts.short),
    ]
    return [(name, value) for name, value in described if value]


def summarize_index(facts: Facts | Unavailable, own: str = "timestep") -> str:
    """What `dmin-trace info` says of an index on one line, from `read_facts`; `own` is the store's `gradient_of`."""
    from dmin_trace.search import Unavailable

    if isinstance(facts, Unavailable):
        return facts.reason or "none; dmin-trace index makes one"
    directions = f"; {facts.principal} principal directions of each {own}" if facts.principal else ""
    if not facts.depths:
        return f"serves nothing, queries scan: {facts.short}{directions}"
    recalls = ", ".join(f"{depth.name} {depth.recall:.3f}" for depth in facts.depths)
    return f"{facts.vectors:,} vectors of {facts.length:,} numbers; {recalls} when calibrated{directions}"


def _describe_rows(groups: Sequence[Sequence[float]]) -> str:
    """How many gradients of a sample are kept, and of which timesteps each is the mean."""
    shown = "; ".join(", ".join(f"{t:g}" for t in group) for group in groups)
    return f"{len(groups)} of a sample, of the mean gradient at the timesteps {shown}"


def _describe_thumbnails(store: Store, rows: int) -> str:
    """How large the samples' pictures are, of what they were made, and what they take on disk."""
    from dmin_trace.store import THUMBNAILS, chunk_file

    if (facts := store.header.thumbnails) is None:
        return "none"
    files = [chunk_file(store.path, THUMBNAILS, chunk) for chunk in store.chunks_done]
    size = sum(file.stat().st_size for file in files if file.is_file())
    made = f"{facts.entry} in the batch, from {facts.low:g} to {facts.high:g}" if facts.entry else "the samples' files"
    each = f", {size / rows:,.0f} a sample" if rows else ""
    return f"of at most {facts.side} pixels, of {made}; {size:,} bytes{each}"


def _describe_unranked(store: Store) -> list[tuple[str, str]]:
    unranked = store.unranked
    pooled = "" if store.header.group_count is None else ", or one of zero among those that are pooled"
    reasons = (
        ("failed to load", len(unranked.failed), f": {_first_values(unranked.failed, 20)}"),
        ("not finite", unranked.infinite, f" have a gradient with NaN or infinity{pooled}"),
        ("zero", unranked.zero, " have a gradient that is zero"),
    )
    return [(name, f"{count:,} samples{more}; never ranked") for name, count, more in reasons if count]


def _first_values(values: Sequence[object], count: int) -> str:
    shown = ", ".join(str(value)[:80] for value in values[:count])
    return shown + (f" and {len(values) - count:,} more" if len(values) > count else "")
