"""Speed and fidelity, each against a named reference in the same run: `python tools/benchmark.py --help`.

These machines are shared: read the ratios. `docs/performance.md` shows the tables.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dmin_trace.compress import make_plan, project
from dmin_trace.index import build_index, open_index, search
from dmin_trace.score import exact
from dmin_trace.store import (
    Header,
    NoiseFacts,
    ParameterFacts,
    ProjectionFacts,
    Trace,
    choose_chunk_rows,
    create,
    open_trace,
)

app = typer.Typer(add_completion=False)
console = Console()


def best_of(work: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


@app.command("compress")
def compress_command(
    length: Annotated[int, typer.Option(help="L, gradient elements.")] = 2**25,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """The rotation against the published algorithm (gather by a full permutation) and a plain read of the bytes."""
    torch.set_num_threads(threads)
    gradient = torch.randn(length, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    signs = torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(2)).float() * 2 - 1
    read = best_of(lambda: gradient.sum(), 5)
    table = Table(
        title=f"compress, L = {length:,}, float32, {threads} thread(s); a plain read takes {read * 1e3:.1f} ms"
    )
    for name in ("v", "published, ms", "rotation, ms", "faster", "x plain read"):
        table.add_column(name, justify="right")
    for exponent in (12, 14, 16, 20):
        dimension = 2**exponent
        plan = make_plan(length, dimension, 0, "rotation")
        # As the published code does it: permute, multiply by the signs, sum groups of L / v.
        published = best_of(lambda v=dimension: (gradient[order] * signs).reshape(v, -1).sum(1), 1)  # type: ignore[misc]
        ours = best_of(lambda plan=plan: project([gradient], plan), 3)  # type: ignore[misc]
        table.add_row(
            f"2^{exponent}",
            f"{published * 1e3:.0f}",
            f"{ours * 1e3:.1f}",
            f"{published / ours:.0f}x",
            f"{ours / read:.1f}",
        )
    console.print(table)


@app.command("estimator")
def estimator_command(
    whole: Annotated[Path, typer.Argument(help="A store of whole gradients: projection uniform, v >= L, float32.")],
    seeds: Annotated[int, typer.Option(help="Projections to average over.")] = 3,
) -> None:
    """How far scores err when sketches are divided by the gradient's norm (the paper) or by their own (ours)."""
    trace = open_trace(whole)
    rows = trace.rows(trace.slots_done)
    truth = np.einsum("itv,jtv->ij", rows, rows, optimize=True)
    others = ~np.eye(len(rows), dtype=bool)
    table = Table(
        title=f"scores of {len(rows)} samples, T = {rows.shape[1]}; they spread by {truth[others].std():.2f} (SD)"
    )
    for name in ("v", "gradient's norm, RMS error", "sketch's norm, RMS error", "ratio"):
        table.add_column(name, justify="right")
    for exponent in (12, 14):
        errors = np.zeros((seeds, 2))
        for seed in range(seeds):
            plan = make_plan(rows.shape[2], 2**exponent, seed, "rotation")
            sketches = np.stack([[project([torch.from_numpy(g)], plan)[0].numpy() for g in row] for row in rows])
            units = sketches / np.linalg.norm(sketches, axis=2, keepdims=True)
            for k, kind in enumerate((sketches, units)):
                scores = np.einsum("itv,jtv->ij", kind, kind, optimize=True)
                errors[seed, k] = np.sqrt(np.mean((scores - truth)[others] ** 2))
        paper, ours = errors.mean(axis=0)
        table.add_row(f"2^{exponent}", f"{paper:.4f}", f"{ours:.4f}", f"{paper / ours:.2f}")
    console.print(table)


def clustered_store(path: Path, samples: int, timesteps: int, dimension: int, clusters: int = 300) -> Trace:
    """A store of made rows that share a direction at each timestep and lie in clusters, as gradients do."""
    header = Header(
        id=secrets.token_hex(16),
        samples=samples,
        timesteps=tuple(float(t) for t in range(timesteps)),
        dimension=dimension,
        dtype="int8",
        chunk_rows=choose_chunk_rows(samples, timesteps, dimension, "int8"),
        projection=ProjectionFacts(kind="rotation", seed=0, length=2**20, fingerprint="0" * 64),
        parameters=ParameterFacts(names=("made",), shapes=((2**20,),), fingerprint="0" * 64),
        weights="0" * 64,
        noise=NoiseFacts(seed=0, draws=((),) * timesteps),
        precondition="none",
        batch={},
        columns={},
        settings={},
        writers={},
    )
    generator = np.random.default_rng(0)
    shape = (timesteps, dimension)
    shared = generator.standard_normal(shape, np.float32)
    centres = generator.standard_normal((clusters, *shape), np.float32)
    writer = create(path, header)
    for chunk in track(writer.pending(), "making a store", console=Console(stderr=True), transient=True):
        rows = writer.rows(chunk)
        ones = np.ones((len(rows), timesteps), np.float32)
        grad = shared + centres[generator.integers(clusters, size=len(rows))]
        grad += 0.8 * generator.standard_normal(grad.shape, np.float32)
        grad /= np.linalg.norm(grad, axis=2, keepdims=True)
        writer.write(chunk, grad, ones, ones, np.arange(rows.start, rows.stop), {})
    writer.finish()
    return open_trace(path)


@app.command("index")
def index_command(
    store: Annotated[Path | None, typer.Argument(help="A store. Without one, a clustered one is made.")] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Compressed gradients of queries, (Q, T, v) in a .npy file. Default: made.")
    ] = None,
    count: Annotated[int, typer.Option(help="Queries to ask with.")] = 64,
    samples: Annotated[int, typer.Option(help="Of a made store.")] = 100_000,
    timesteps: Annotated[int, typer.Option(help="Of a made store.")] = 2,
    dimension: Annotated[int, typer.Option(help="Of a made store.")] = 256,
    recall: Annotated[float, typer.Option()] = 0.99,
    fold: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Queries through the index, reranked, against the exact scan of the same store: recall and time."""
    with tempfile.TemporaryDirectory() as name:
        # The index is built beside this link, so that a store's own index is left alone.
        path = Path(name) / "trace.zarr"
        if store is not None:
            path.symlink_to(store.absolute())
        trace = open_trace(path) if store is not None else clustered_store(path, samples, timesteps, dimension)
        start = time.perf_counter()
        facts = build_index(trace, recall=recall, fold=fold)
        built = time.perf_counter() - start
        start = time.perf_counter()
        index = open_index(trace)
        read = time.perf_counter() - start
        header = trace.header
        console.print(
            f"N = {header.samples:,}, T = {len(header.timesteps)}, v = {header.dimension:,}, {header.dtype}: built in "
            f"{built:.1f} s, {facts.length:,} numbers a vector (F = {facts.fold}), opened in {read:.2f} s, "
            f"{facts.bytes / trace.bytes:.1%} of the store's bytes"
        )
        if isinstance(index, str):
            console.print(index)
            return
        if queries is not None:
            asked = np.load(queries)[:count].astype(np.float32)
        else:
            # Half a stored sample, half another: near to the store, and not in it.
            pairs = np.random.default_rng(1).integers(header.samples, size=(count, 2))
            asked = trace.rows(pairs[:, 0]) + 0.7 * trace.rows(pairs[:, 1])
            asked /= np.linalg.norm(asked, axis=2, keepdims=True)
        table = Table(title=f"{len(asked)} queries, {'captured' if queries is not None else 'made'}")
        for title in (
            "k",
            "C",
            "ef",
            "calibrated",
            "recall",
            "index, ms",
            "p95",
            "CPU, ms",
            "graph",
            "scan, ms",
            "faster",
        ):
            table.add_column(title, justify="right")
        for depth in facts.depths:
            truth = exact(trace, asked, depth.k).slots
            times, busy, graph = np.empty((3, len(asked)))
            scan = np.empty(min(9, len(asked)))
            found = np.empty_like(truth)
            for q, query in enumerate(asked):
                start, used = time.perf_counter(), time.process_time()
                found[q] = search(index, query[None], depth.k).slots[0]
                times[q], busy[q] = time.perf_counter() - start, time.process_time() - used
                start = time.perf_counter()
                index.candidates(query[None], depth)
                graph[q] = time.perf_counter() - start
            for q in range(len(scan)):
                start = time.perf_counter()
                exact(trace, asked[q : q + 1], depth.k)
                scan[q] = time.perf_counter() - start
            reached = np.mean([np.isin(best, ours).mean() for ours, best in zip(found, truth, strict=True)])
            table.add_row(
                *(f"{depth.k}", f"{depth.candidates}", f"{depth.ef}", f"{depth.recall:.4f}", f"{reached:.4f}"),
                *(f"{np.median(times) * 1e3:.1f}", f"{np.percentile(times, 95) * 1e3:.1f}"),
                *(f"{np.median(value) * 1e3:.1f}" for value in (busy, graph, scan)),
                f"{np.median(scan) / np.median(times):.1f}x",
            )
        console.print(table)


if __name__ == "__main__":
    app()
