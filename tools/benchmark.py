"""Speed and fidelity, each against a named reference in the same run: `python tools/benchmark.py --help`.

These machines are shared: read the ratios. `docs/performance.md` shows the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from dmin_trace.compress import make_plan, project
from dmin_trace.store import open_trace

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
    exact: Annotated[Path, typer.Argument(help="A store of whole gradients: projection uniform, v >= L, float32.")],
    seeds: Annotated[int, typer.Option(help="Projections to average over.")] = 3,
) -> None:
    """How far scores err when sketches are divided by the gradient's norm (the paper) or by their own (ours)."""
    trace = open_trace(exact)
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


if __name__ == "__main__":
    app()
