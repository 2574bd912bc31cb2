"""What a page costs, in bytes and seconds: `python tools/page_cost.py`.

Eight queries with 24 samples each, eight that are most against each, and the totals of groups, of a store whose
pictures are smooth, or noise, which takes nearly all of the bytes that a picture may have. The reference is the scan
that finds the samples of such a page. Machines are shared and differ: read the ratios.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from pictured_stores import Kind, pictured_store

KINDS: tuple[Kind, ...] = ("smooth", "noise")
QUERIES, HITS, AGAINST, TURNS = 8, 24, 8, 5
CAPTION = "a picture of something, in words as a model for captions writes them, number"


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row_of(kind: Kind, samples: int, folder: Path) -> tuple[str, ...]:
    """The row of the table for a store with pictures of this kind."""
    trace = pictured_store(folder / f"{kind}.zarr", [f"{CAPTION} {n}" for n in range(samples)], side=128, kind=kind)
    queries, path = trace.query_samples(range(QUERIES)), folder / "page.html"
    top, lowest = trace.top_k(queries, HITS), trace.top_k(queries, AGAINST, largest=False)
    write = partial(top.to_html, path, lowest=lowest, totals=trace.totals(queries, "artist"))
    first, again = seconds(write), min(seconds(write) for _ in range(TURNS))
    scan = min(seconds(partial(trace.top_k, queries, HITS)) for _ in range(TURNS))
    mean = sum(len(trace.thumbnails.webp(n) or b"") for n in range(64)) / 64
    sizes = f"{mean:,.0f} bytes", f"{path.stat().st_size:,} bytes"
    return kind, *sizes, f"{first:.2f}", f"{again:.2f}", f"{again / scan:.1f}"


def measure(samples: int = 1024) -> None:
    """Makes each page several times, of which the fastest counts; the first one, which compiles templates, is apart."""
    table = Table("pictures", "a picture", "the page", "first, s", "again, s", "scans", title=f"{samples:,} samples")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            table.add_row(*row_of(kind, samples, Path(folder)))
    console = Console(width=110)
    console.print(table)
    console.print("scans: the time again, over that of the scan that finds the samples.")


if __name__ == "__main__":
    typer.run(measure)
