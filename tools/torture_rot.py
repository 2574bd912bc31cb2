"""Rot: bits flipped and files cut short, one after another, in a store, its index and its weights.

Each must be named by `verify`, at its file; and a query must then be refused, or answer as it did before.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from torture_stores import make_store

from dmin_trace import query
from dmin_trace import store as untrusted
from dmin_trace.audit import verify_store
from dmin_trace.errors import DminTraceError
from dmin_trace.query import TopK
from dmin_trace.settings import Codec, Dtype
from dmin_trace.store import open_store

console = Console()
ASKED = np.array([3, 77, 159])


def rot_command(
    faults: Annotated[int, typer.Option(help="How many, one at a time.")] = 1000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Flips bits and cuts files short: verify must name each, and no query may answer with it."""
    wrong = 0
    for dtype, codec in (("int8", "none"), ("float16", "none"), ("float32", "blosc")):
        with tempfile.TemporaryDirectory(prefix="dmin-trace-rot-") as folder:
            found = attack(Path(folder), faults, seed, dtype=dtype, codec=codec)  # type: ignore[arg-type]
        console.print(f"{dtype}, codec {codec}:", ", ".join(f"{count} {what}" for what, count in sorted(found.items())))
        wrong += sum(count for what, count in found.items() if what.startswith("WRONG"))
    raise typer.Exit(1 if wrong else 0)


def attack(folder: Path, faults: int, seed: int, *, dtype: Dtype = "int8", codec: Codec = "none") -> Counter[str]:
    """Makes a store, does it `faults` harms one at a time, each undone before the next, and counts what came of them.

    What begins with WRONG must not be: damage that is not named, or an answer that is another than without it.
    """
    trace = make_store(folder, dtype=dtype, codec=codec, dimension=1024 if codec == "blosc" else 64)
    if (found := verify_store(trace.path)).damages:
        raise ValueError(f"a new store is damaged: {found.damages}")
    queries = trace.gradients(ASKED) + np.float32(0.01)
    before = {
        exact: _hits(query.answer_queries(trace, queries, k=5, score="dmin", exact=exact)) for exact in (True, False)
    }
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    sizes = np.array([file.stat().st_size for file in files], np.float64)
    generator = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for n in track(range(faults), console=Console(stderr=True), transient=True):
        # Every other one anywhere in the bytes, and the others anywhere in the files: most of those are small.
        file = files[generator.choice(len(files), p=sizes / sizes.sum() if n % 2 else None)]
        whole = file.read_bytes()
        harmed = _harmed(whole, generator)
        file.write_bytes(harmed)
        name = file.relative_to(folder).as_posix()
        named = [damage.file for damage in verify_store(trace.path).damages]
        if name in named:
            counts["named" if len(named) == 1 else "named, and others with it"] += 1
        elif file.suffix == ".json" and _same(whole, harmed):
            counts["without a meaning"] += 1
        else:
            counts[f"WRONG: not named in {name}"] += 1
        for exact, hits in before.items():
            counts[_asked(trace.path, queries, exact, hits)] += 1
        file.write_bytes(whole)
    return counts


def _harmed(data: bytes, generator: np.random.Generator) -> bytes:
    if generator.random() < 0.1:
        return data[: generator.integers(0, len(data))]
    bit = int(generator.integers(0, 8 * len(data)))
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def _same(before: bytes, after: bytes) -> bool:
    try:
        return bool(untrusted.parse(before) == untrusted.parse(after))
    except ValueError:
        return False


def _asked(path: Path, queries: np.ndarray, exact: bool, before: list[tuple[int, float, str]]) -> str:
    try:
        hits = _hits(query.answer_queries(open_store(path), queries, k=5, score="dmin", exact=exact))
    except DminTraceError:
        return "queries refused"
    # The graph finds most of the best, the scan all of them: an index that is not used gives the scan's answer.
    return "queries answered as before" if hits == before else f"WRONG: another answer, exact {exact}"


def _hits(answer: TopK) -> list[tuple[int, float, str]]:
    return [(hit.sample, hit.score, str(hit.columns)) for hits in answer.hits for hit in hits]
