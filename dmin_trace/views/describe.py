"""What a store and an index hold, as names and values for a person."""

from __future__ import annotations

from collections.abc import Sequence

from dmin_trace.search import Facts, Unavailable
from dmin_trace.store import Store, UnrankedSamples, chunk_file


def store_facts(trace: Store) -> list[tuple[str, str]]:
    """What `dmin-trace info` shows of a store: names and values."""
    header = trace.header
    rows = sum(len(header.rows(chunk)) for chunk in trace.chunks_done)
    sketch: float = header.sample_bytes
    if header.codec != "none" and rows:
        files = [chunk_file(trace.path, "grad", chunk, 3) for chunk in trace.chunks_done]
        sketch = sum(file.stat().st_size for file in files if file.is_file()) / rows or sketch
    whole = len(header.timesteps) * header.projection.length * 4
    state = "complete" if trace.complete else f"unfinished: {int(trace.done.sum())} of {header.chunks} chunks are done"
    unusual = [("draws", f"{header.draws} at each timestep, whose mean a gradient is")] if header.draws != 1 else []
    shown = [
        ("samples", f"{rows:,} of {header.samples:,}; {state}"),
        ("timesteps", f"{len(header.timesteps)}: {', '.join(f'{t:g}' for t in header.timesteps)}"),
        ("gradient", f"{header.projection.length:,} numbers in {len(header.parameters.names):,} tensors"),
        ("compressed", f"to {header.dimension:,} numbers of {header.dtype}, projection {header.projection.kind}"),
        (
            "a sample",
            f"{sketch:,.0f} bytes; its gradients in float32 have {whole:,}, {whole / sketch:,.4g} times as many",
        ),
        ("the store", f"{trace.bytes:,} bytes, codec {header.codec}"),
        (
            "chunks",
            f"{header.chunks:,} of {header.chunk_rows:,} samples, {header.chunk_rows * header.sample_bytes:,} bytes",
        ),
        *unusual,
        ("transform", header.transform),
        ("seed", f"{header.projection.seed} (projection), {header.noise.seed} (noise)"),
        ("the script draws", _calls(header.noise.draws[0])),
        ("columns", ", ".join(header.columns) or "none"),
        ("weights", header.weights[:16]),
        ("script", " ".join((header.script, header.script_sha256[:16])).strip() or "not known"),
        ("data set", header.data_sha256[:16] or "not known"),
        ("id", header.id),
        ("written by", ", ".join(f"{name} {version}" for name, version in header.writers.items())),
    ]
    # A capture that has only begun has no rows to look at.
    shown[1:1] = _never_ranked(trace.unranked) if rows else []
    if header.unreached:
        names = _listed(header.unreached, 3)
        shown.insert(
            [name for name, _ in shown].index("gradient") + 1,
            ("never reached", f"{len(header.unreached):,} tensors, among them {names}; their gradients are zero"),
        )
    return shown


def _never_ranked(numbers: UnrankedSamples) -> list[tuple[str, str]]:
    """A line for each reason that samples are never ranked."""
    return [
        (name, f"{count:,} samples{more}; never ranked")
        for name, count, more in (
            ("failed to load", len(numbers.failed), f": {_listed(numbers.failed, 20)}"),
            ("not finite", numbers.infinite, " have a gradient with NaN or infinity"),
            ("zero", numbers.zero, " have a gradient that is zero"),
        )
        if count
    ]


def _listed(values: Sequence[object], most: int) -> str:
    """The first of some values."""
    shown = ", ".join(str(value)[:80] for value in values[:most])
    return shown + (f" and {len(values) - most:,} more" if len(values) > most else "")


def _calls(calls: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name}({', '.join(map(str, shape))})" for name, shape in calls)


def index_facts(facts: Facts, trace: Store) -> list[tuple[str, str]]:
    """What `dmin-trace index` shows of what it built: names and values."""
    told = [
        (
            "vectors",
            f"{facts.vectors:,} of {facts.length:,} numbers: {facts.fold:,} bins and {facts.directions} directions for "
            "each timestep",
        ),
        *(
            (depth.name, f"{depth.recall:.3f}, from {depth.candidates} candidates (ef {depth.ef})")
            for depth in facts.depths
        ),
        ("measured with", f"{facts.queries} samples that were not in the graph, and mixtures of them"),
        ("size", f"{facts.bytes:,} bytes, {facts.bytes / trace.bytes:.1%} of the store's"),
        ("serves", _served(facts)),
    ]
    if facts.principal:
        told.append(("deflated scores", f"by {facts.principal} principal directions of each timestep"))
    return [*told, ("short of", facts.short)] if facts.short else told


def _served(facts: Facts) -> str:
    most = {depth.score: depth.k for depth in facts.depths}
    served = [f"{kind} queries for up to {k} hits" for kind, k in most.items()]
    return "; ".join(served) if served else "nothing: queries scan"


def index_summary(facts: Facts | Unavailable) -> str:
    """What `dmin-trace info` says of an index, from `read_facts`."""
    if isinstance(facts, Unavailable):
        return facts.reason or "none; dmin-trace index makes one"
    kept = f"; {facts.principal} principal directions of each timestep" if facts.principal else ""
    if not facts.depths:
        return f"serves nothing, queries scan: {facts.short}{kept}"
    recalls = ", ".join(f"{depth.name} {depth.recall:.3f}" for depth in facts.depths)
    return f"{facts.vectors:,} vectors of {facts.length:,} numbers; {recalls} when calibrated{kept}"
