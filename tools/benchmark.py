"""Speed, memory and fidelity, each against a named reference in the same run: `python tools/benchmark.py --help`.

Machines are shared and differ: read the ratios. Every command writes its table as JSON too, with `--json FILE`, and
`all` runs every part that needs no trained model. `docs/performance.md` shows the tables.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import threadpool_limits

import dmin_trace
from dmin_trace import store
from dmin_trace.audit import verify_store
from dmin_trace.capture import encoder_cache as frozen
from dmin_trace.capture import recorder
from dmin_trace.capture.chunk_queue import ChunkQueue
from dmin_trace.capture.recorder import Recorder
from dmin_trace.capture.step import StepGuard
from dmin_trace.cli import app as cli
from dmin_trace.project import make_plan, project
from dmin_trace.query import open_trace
from dmin_trace.search import Unavailable, build_index, exact_top_k, open_index, search
from dmin_trace.search.exact import rerank
from dmin_trace.settings import Dtype
from dmin_trace.store import Header, NoiseFacts, ParameterFacts, ProjectionFacts, RunFacts, Store, create, open_store

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()
if not console.is_terminal:
    console = Console(width=150)
CORES = os.cpu_count() or 1

Json = Annotated[Path | None, typer.Option("--json", help="Write the table to this file too.")]
Folder = Annotated[Path | None, typer.Option(help="Where stores are made. Default: the system's temporary folder.")]
Threads = Annotated[int, typer.Option(help="Of BLAS and of the scan.")]


@dataclass
class Result:
    """A table: its name, what it says above and below, and its rows of numbers or words."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *values: Any) -> None:
        """Another row."""
        self.rows.append(values)

    def show(self, path: Path | None) -> None:
        """Prints the table, and adds it to a file of tables."""
        table = Table(title=self.title, caption="\n".join(self.notes) or None, caption_justify="left")
        for name in self.columns:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*(_shown(value) for value in row))
        console.print(table)
        if path is None:
            return
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": machine(), "tables": {}}
        kept["tables"][self.name] = {
            "title": self.title,
            "columns": self.columns,
            "rows": self.rows,
            "notes": self.notes,
        }
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    versions = {name: version(name) for name in ("dmin_trace", "numpy", "torch", "zarr", "numcodecs")}
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()} | {
        "versions": versions
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


# -- time and memory ---------------------------------------------------------------------------------------------------


def best_of(work: Callable[[], object], times: int, *, warm: bool = True) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    if warm:
        work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def in_turn(
    works: dict[str, Callable[[], object]], times: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of the fastest run of each: one after the other, again and again: all meet the same neighbours."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(times + 1):
        for name, work in works.items():
            start = clock()
            work()
            if turn:
                taken[name].append(clock() - start)
    return {name: min(found) for name, found in taken.items()}


def anonymous() -> int:
    """Bytes of this process's memory that no file backs: what it has allocated, maps of a store left out."""
    return next((int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("RssAnon")), 0)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Appends, at the end, by how many bytes the process grew at most while entered."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        # What was freed and not given back would hide what is allocated now.
        ctypes.CDLL(None).malloc_trim(0)
    before, largest, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            largest[0] = max(largest[0], anonymous())
            time.sleep(0.0005)

    found: list[int] = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        found.append(max(0, max(largest[0], anonymous()) - before))


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dmin-trace-benchmark-", dir=folder) as name:
        yield Path(name)


# -- compress ----------------------------------------------------------------------------------------------------------

CUT = (921_600, 320, 409_600, 1280, 245_760, 3_686_400, 640, 1_638_400, 12_288, 77)
"""Sizes of tensors as a UNet has them, over and over."""


@app.command("compress")
def compress_command(
    length: Annotated[int, typer.Option(help="L, gradient elements.")] = 2**25,
    batch: Annotated[int, typer.Option(help="Gradients in the batch.")] = 2,
    threads: Threads = 1,
    path: Json = None,
) -> None:
    """The rotation against the published algorithm, `index_add`, and a plain read of the same bytes."""
    torch.set_num_threads(threads)
    # Of one thread its own time, which other processes on the machine lengthen less.
    clock = time.thread_time if threads == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(length, generator=generator)
    order = torch.randperm(length, generator=generator)
    signs = torch.randint(0, 2, (length,), generator=generator).to(torch.int8) * 2 - 1
    result = Result(
        "compress",
        f"compress, L = {length:,}, {threads} thread(s)",
        (
            *("gradient", "v", "published, ms", "index_add, ms", "read, ms", "rotation, ms"),
            *("x published", "x index_add", "reads", "memory, %", "its memory, %"),
        ),
        notes=[
            "published: gather by a full int64 permutation, multiply by the signs, sum groups of L / v.",
            "x published, x index_add: how many times faster the rotation is; reads: its time over that of `sum`.",
            "signs: the signs of the numbers are projected, as by default; the references take the numbers.",
            "memory: of a first call, its plan with it, beyond the gradient, in %; its memory: the published code's.",
        ],
    )
    with peak_memory():
        # What a process loads and keeps once is no part of a call.
        project([gradient[:1000]], make_plan(1000, 16, 0, "rotation"))

    def add(name: str, parts: Sequence[torch.Tensor], dimension: int, as_signs: bool = False) -> None:
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        bins = torch.randint(0, dimension, (length,), generator=generator, dtype=torch.int32)

        def published() -> torch.Tensor:
            return (whole[order] * signs).reshape(dimension, -1).sum(1)

        def index_add() -> torch.Tensor:
            return torch.zeros(dimension).index_add_(0, bins, whole.float() * signs)

        with peak_memory() as ours:
            # Several, since one is over before its memory is looked at.
            plan = make_plan(length, dimension, 0, "rotation")
            for _ in range(5):
                project(parts, plan, signs=as_signs)
        with peak_memory() as theirs:
            published()
        slow = in_turn({"published": published, "index_add": index_add}, 1, clock)
        ways = {
            "read": lambda: [part.sum() for part in parts],
            "ours": lambda: project(parts, plan, signs=as_signs),
        }
        fast = in_turn(ways, 9, clock)
        size = whole.numel() * whole.element_size()
        permutation = order.numel() * (order.element_size() + signs.element_size())
        result.add(
            *(name, f"2^{dimension.bit_length() - 1}"),
            *(1e3 * seconds for seconds in (*slow.values(), fast["read"], fast["ours"])),
            *(slow["published"] / fast["ours"], slow["index_add"] / fast["ours"], fast["ours"] / fast["read"]),
            *(100 * ours[0] / size, 100 * (theirs[0] + permutation) / size),
        )

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for exponent in (12, 14, 16, 20):
            add(name, [gradient.to(dtype)], 2**exponent)
        add(f"{name}, signs", [gradient.to(dtype)], 2**14, as_signs=True)
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(CUT[len(sizes) % len(CUT)], length - sum(sizes)))
    add(f"float32, {len(sizes)} tensors", gradient.split(sizes), 2**14)
    _add_batch(result, length, batch, order, signs, clock)
    result.show(path)


def _add_batch(
    result: Result, length: int, count: int, order: torch.Tensor, signs: torch.Tensor, clock: Callable[[], float]
) -> None:
    """A row for a batch of gradients: the published code gathers them together, ours takes them one by one."""
    gradients = torch.randn(count, length, generator=torch.Generator().manual_seed(1))
    plan = make_plan(length, 2**14, 0, "rotation")

    def published() -> torch.Tensor:
        return (gradients[:, order] * signs).reshape(count, 2**14, -1).sum(2)

    def ours() -> list[torch.Tensor]:
        return [project([gradient], plan)[0] for gradient in gradients]

    slow = in_turn({"published": published}, 1, clock)["published"]
    fast = in_turn({"read": gradients.sum, "ours": ours}, 5, clock)
    result.add(
        *(f"float32, {count} gradients", "2^14", 1e3 * slow, None, 1e3 * fast["read"], 1e3 * fast["ours"]),
        *(slow / fast["ours"], None, fast["ours"] / fast["read"], None, None),
    )


@app.command("estimator")
def estimator_command(
    exact_store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A store of whole gradients: projection uniform, v >= L, float32.")
    ],
    seeds: Annotated[int, typer.Option(help="Projections to average over.")] = 3,
    path: Json = None,
) -> None:
    """How far scores err when sketches are divided by the gradient's norm (the paper) or by their own (ours)."""
    trace = open_store(exact_store)
    rows = trace.gradients(trace.rows_done)
    truth = np.einsum("itv,jtv->ij", rows, rows, optimize=True)
    others = ~np.eye(len(rows), dtype=bool)
    result = Result(
        "estimator",
        f"scores of {len(rows)} samples, T = {rows.shape[1]}; they spread by {truth[others].std():.2f} (SD)",
        ("v", "gradient's norm, RMS error", "sketch's norm, RMS error", "ratio"),
    )
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
        result.add(f"2^{exponent}", float(paper), float(ours), float(paper / ours))
    result.show(path)


# -- stores ------------------------------------------------------------------------------------------------------------


def make_header(samples: int, timesteps: int, dimension: int, dtype: Dtype, rows: int | None = None) -> Header:
    """The header of a store of random numbers."""
    return Header(
        id=f"{samples:032x}",
        samples=samples,
        timesteps=tuple(float(t) for t in range(timesteps)),
        dimension=dimension,
        dtype=dtype,
        chunk_rows=rows or store.choose_chunk_rows(samples, timesteps, dimension, dtype),
        projection=ProjectionFacts(kind="rotation", seed=0, length=2**25, width=2**17, fingerprint="0" * 64),
        parameters=ParameterFacts(names=("w",), shapes=((2**25,),), fingerprint="0" * 64),
        weights="0" * 64,
        noise=NoiseFacts(
            seed=0,
            draws=((),) * timesteps,
            digests=("0" * 64,) * timesteps,
            first_sample=0,
            losses=(1.0,) * timesteps,
            norms=(1.0,) * timesteps,
        ),
        transform="none",
        batch={},
        columns={"label": "integer"},
        settings={},
        writers={},
        codec="none",
        draws=1,
        script="",
        script_sha256="",
        data_sha256="",
        unreached=(),
        run=RunFacts(conditions={}, models=()),
    )


def write_random(path: Path, header: Header) -> Store:
    """A finished store of random sketches; every chunk holds the same numbers, turned by another shift."""
    generator = np.random.default_rng(0)
    shape = (header.chunk_rows, len(header.timesteps), header.dimension)
    sketches = generator.standard_normal(shape, np.float32) / np.float32(header.dimension**0.5)
    values, scale = store.quantise(sketches, header.dtype)
    ones = np.ones(shape[:2], np.float32)
    writer = create(path, header)
    for chunk in range(writer.header.chunks):
        rows = writer.header.rows(chunk)
        n = len(rows)
        turned = np.roll(values[:n], int(generator.integers(header.dimension)), axis=2)
        number = np.arange(rows.start, rows.stop)
        writer.write(chunk, turned, scale[:n], ones[:n], ones[:n], number, {"label": number.tolist()})
    writer.finish()
    return open_store(path)


def queries_for(header: Header, count: int) -> np.ndarray:
    """(Q, T, v) float32 of norm one or so."""
    shape = (count, len(header.timesteps), header.dimension)
    drawn = np.random.default_rng(1).standard_normal(shape, np.float32)
    drawn /= np.float32(header.dimension**0.5)
    return drawn


def clustered_store(path: Path, header: Header) -> Store:
    """A finished store of rows that share a direction at each timestep and lie in clusters, as gradients do.

    Thirty samples to a cluster, so that a sample has neighbours however many there are.
    """
    generator = np.random.default_rng(0)
    shape = (len(header.timesteps), header.dimension)
    shared = generator.standard_normal(shape, np.float32)
    centres = generator.standard_normal((max(1, header.samples // 30), *shape), np.float32)
    writer = create(path, header)
    for chunk in track(writer.pending(), "making a store", console=Console(stderr=True), transient=True):
        rows = writer.header.rows(chunk)
        number = np.arange(rows.start, rows.stop)
        ones = np.ones((len(rows), len(header.timesteps)), np.float32)
        grad = shared + centres[generator.integers(len(centres), size=len(rows))]
        grad += 0.8 * generator.standard_normal(grad.shape, np.float32)
        grad /= np.linalg.norm(grad, axis=2, keepdims=True)
        columns = {
            name: number.tolist() if kind != "string" else [f"{name} {n}" for n in number]
            for name, kind in header.columns.items()
        }
        writer.write(chunk, *store.quantise(grad, header.dtype), ones, ones, number, columns)
    writer.finish()
    return open_store(path)


def mixed_queries(trace: Store, count: int) -> np.ndarray:
    """(Q, T, v) float32 of norm one: half a stored sample, half another, so near to the store, and not in it."""
    pairs = np.random.default_rng(1).integers(trace.header.samples, size=(count, 2))
    asked: np.ndarray = trace.gradients(pairs[:, 0]) + 0.7 * trace.gradients(pairs[:, 1])
    return asked / np.linalg.norm(asked, axis=2, keepdims=True)


def evict(path: Path) -> None:
    """Asks the system to forget what it holds of the files; a virtual machine's host may hold them still."""
    for file in path.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def read_all(trace: Store) -> int:
    """A plain read of the chunks, one after another, into the same memory."""
    memory = bytearray(2**20)
    total = 0
    for chunk in trace.chunks_done:
        with store.chunk_file(trace.path, "grad", chunk).open("rb", buffering=0) as file:
            while read := file.readinto(memory):
                total += read
    return total


@app.command("score")
def score_command(
    samples: Annotated[int, typer.Option(help="N.")] = 9288,
    timesteps: Annotated[int, typer.Option(help="T.")] = 10,
    dimension: Annotated[int, typer.Option(help="v.")] = 2**12,
    large: Annotated[bool, typer.Option(help="Also v = 2^16 in int8: 6 GB of disk, if it has room.")] = False,
    threads: Threads = CORES,
    folder: Folder = None,
    path: Json = None,
) -> None:
    """Exact scores of all samples against a BLAS product over the same numbers as float32 in memory."""
    result = Result(
        "score",
        f"score, N = {samples:,}, T = {timesteps}, {threads} thread(s)",
        (
            *("dtype", "v", "numbers, 10^6", "BLAS, ms", "first, ms", "again, ms", "x BLAS"),
            *("64, ms each", "cheaper", "64, x BLAS", "memory, MB", "cold, ms", "x read"),
        ),
        notes=[
            "BLAS: a product with as many float32 numbers in memory; x BLAS: rate of numbers over its.",
            "first, again: one query, the store in the system's cache, by a process that asks once or many times.",
            "64: queries together; cheaper: than one; memory: beyond files and those queries, at its largest.",
            "cold: a first query, the system's cache emptied before; x read: rate over a plain read, as cold.",
        ],
    )
    cases: list[tuple[Dtype, int]] = [("int8", dimension), ("float16", dimension), ("float32", dimension)]
    if large:
        cases.append(("int8", 2**16))
    in_memory = np.empty((samples, timesteps * dimension), np.float32)
    in_memory[:] = np.random.default_rng(2).standard_normal(timesteps * dimension, np.float32)
    with threadpool_limits(threads, "blas"), scratch(folder) as made:
        for dtype, v in cases:
            header = make_header(samples, timesteps, v, dtype)
            if shutil.disk_usage(made).free < 1.1 * samples * header.sample_bytes:
                console.print(f"v = {v:,}, {dtype}: skipped, the disk has no room for it.")
                continue
            trace = write_random(made / f"{dtype}-{v}.zarr", header)
            result.add(*_scored(trace, in_memory, threads))
            shutil.rmtree(trace.path)
    result.show(path)


def _scored(trace: Store, in_memory: np.ndarray, threads: int) -> tuple[str | int | float, ...]:
    """A row of the table: a store against a BLAS product with an array in memory, in turn with it."""
    header = trace.header
    numbers = header.samples * len(header.timesteps) * header.dimension
    many = queries_for(header, 64)
    dense = np.random.default_rng(3).standard_normal((in_memory.shape[1], 64), np.float32)
    # A process that asks once: of a trace opened anew, whose norms have been looked at.
    opened: Store | None = open_store(trace.path)
    assert opened is not None and opened.valid.any()
    first = best_of(lambda: exact_top_k(opened, many[:1], 10, threads=threads), 1, warm=False)
    seconds = {}
    for count in (1, 64):
        asked, columns = many[:count], dense[:, :count].copy()
        works: dict[str, Callable[[], object]] = {
            "blas": lambda columns=columns: in_memory @ columns,  # type: ignore[misc]
            "ours": lambda asked=asked: exact_top_k(opened, asked, 10, threads=threads),  # type: ignore[misc]
        }
        seconds[count] = in_turn(works, 5 if count == 1 and numbers <= in_memory.size else 1)
    with peak_memory() as memory:
        exact_top_k(opened, many, 10, threads=threads)
    # Its maps would hold the files in the system's cache.
    opened = None
    cold = _cold_seconds(trace, many[:1], threads)
    blas = {count: found["blas"] * numbers / in_memory.size for count, found in seconds.items()}
    one, together = seconds[1]["ours"], seconds[64]["ours"] / 64
    return (
        *(header.dtype, f"2^{header.dimension.bit_length() - 1}", round(numbers / 1e6), 1e3 * blas[1]),
        *(1e3 * first, 1e3 * one, blas[1] / one, 1e3 * together, one / together, blas[64] / 64 / together),
        *(memory[0] / 1e6, 1e3 * cold["ours"], cold["read"] / cold["ours"]),
    )


def _cold_seconds(trace: Store, query: np.ndarray, threads: int) -> dict[str, float]:
    """Seconds of a plain read and of a first query, each with the system's cache emptied before."""
    taken = {}
    for name in ("read", "ours"):
        opened = open_store(trace.path)
        opened.valid  # noqa: B018
        evict(trace.path)
        start = time.perf_counter()
        if name == "read":
            read_all(opened)
        else:
            exact_top_k(opened, query, 10, threads=threads)
        taken[name] = time.perf_counter() - start
    return taken


@app.command("check")
def check_command(
    samples: Annotated[int, typer.Option(help="N.")] = 9288,
    timesteps: Annotated[int, typer.Option(help="T.")] = 10,
    dimension: Annotated[int, typer.Option(help="v.")] = 2**12,
    turns: Annotated[int, typer.Option(help="Of which the fastest counts.")] = 5,
    threads: Threads = CORES,
    folder: Folder = None,
    path: Json = None,
) -> None:
    """What it costs to compare checksums before what they are of is used, and how fast `verify` reads."""
    result = Result(
        "check",
        f"checksums, N = {samples:,}, T = {timesteps}, v = {dimension:,}, {threads} thread(s)",
        ("dtype", "what", "unchecked, ms", "checked, ms", "x", "unchecked, ms of processor", "checked", "x "),
        notes=[
            "first, again, cold: one query that scans, as in score; unchecked: the same code, its checksums not taken.",
            "50 rows: those that an index proposes, scored exactly, by a process that has read nothing before.",
            "verify: against a plain read of the gradients' files, the store in the system's cache.",
        ],
    )
    with threadpool_limits(threads, "blas"), scratch(folder) as made:
        for dtype in get_args(Dtype):
            trace = write_random(made / f"{dtype}.zarr", make_header(samples, timesteps, dimension, dtype))
            for what, (unchecked, checked) in _checked(trace, turns, threads).items():
                pairs = zip(unchecked, checked, strict=True)
                result.add(
                    dtype, what, *(n for before, after in pairs for n in (1e3 * before, 1e3 * after, after / before))
                )
            shutil.rmtree(trace.path)
    result.show(path)


def _checked(trace: Store, turns: int, threads: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Seconds, and those of the processor, without checksums and with them, of each way to read."""
    query = queries_for(trace.header, 1)
    candidates = [np.random.default_rng(4).choice(trace.header.samples, 50, replace=False)]
    known = np.array([store.row_checksum(trace.stored_row(slot)) for slot in range(trace.header.samples)], np.uint32)
    nothing = SimpleNamespace(value=lambda data: 0, extend=lambda crc, data: 0)
    off = [(store, "google_crc32c", nothing), (Store, "_check", lambda *given: None)]
    taken: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}

    def timed(what: str, checks: bool, work: Callable[..., object], *given: Any, **named: Any) -> None:
        start, used = time.perf_counter(), time.process_time()
        work(*given, **named)
        found = time.perf_counter() - start, time.process_time() - used
        taken.setdefault(what, ([], []))[checks].append(found)

    def fresh() -> Store:
        opened = open_store(trace.path)
        assert opened.valid.any() and len(opened.loss)
        return opened

    for turn in range(turns):
        for checks in (False, True):
            with replaced([] if checks else off):
                opened = fresh()
                timed("first", checks, exact_top_k, opened, query, 10, threads=threads)
                exact_top_k(opened, query, 10, threads=threads)
                timed("again", checks, exact_top_k, opened, query, 10, threads=threads)
                checksums = known if checks else np.zeros_like(known)
                timed("50 rows", checks, rerank, fresh(), query, candidates, 10, checksums=checksums)
                if turn < 2:
                    opened = fresh()
                    evict(trace.path)
                    timed("cold", checks, exact_top_k, opened, query, 10, threads=threads)
                    read_all(trace)
        timed("verify", False, read_all, trace)
        timed("verify", True, verify_store, trace.path)
    return {what: tuple(np.array(found).min(axis=0) for found in pair) for what, pair in taken.items()}  # type: ignore[misc]


@app.command("scale")
def scale_command(
    sizes: Annotated[str, typer.Option(help="Numbers of samples, N.")] = "10000,50000,1000000",
    timesteps: Annotated[int, typer.Option(help="T.")] = 2,
    dimension: Annotated[int, typer.Option(help="v.")] = 2**6,
    threads: Threads = CORES,
    indexed: Annotated[int, typer.Option(help="Samples up to which an index is built; a million take long.")] = 50_000,
    ef_construction: Annotated[int, typer.Option(help="HNSW's, of the indexes.")] = 200,
    folder: Folder = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture to this PNG file; needs matplotlib.")] = None,
    path: Json = None,
) -> None:
    """Time and memory against the number of samples: a scan's time is to grow with it, and nothing else."""
    result = Result(
        "scale",
        f"scale, T = {timesteps}, v = {dimension:,}, int8, {threads} thread(s); milliseconds a query, k = 10",
        ("N", "store, MB", SCAN, SCAN_MEMORY, INDEX, "recall@10", "built, s", INDEX_SIZE),
        notes=["memory: beyond the store's files, at its largest, the N norms and marks of the store with it."],
    )
    for samples in (int(size) for size in sizes.split(",")):
        with scratch(folder) as made:
            trace = clustered_store(made / "trace.zarr", make_header(samples, timesteps, dimension, "int8"))
            queries = mixed_queries(trace, 50)
            with peak_memory() as grown:
                scan = best_of(lambda trace=trace, q=queries[:1]: exact_top_k(trace, q, 10, threads=threads), 3)  # type: ignore[misc]
            row: list[Any] = [samples, trace.bytes / 1e6, 1e3 * scan, grown[0] / 1e6]
            result.add(*row, *(_indexed(trace, queries, ef_construction) if samples <= indexed else (None,) * 4))
    result.show(path)
    if plot is not None:
        _plot_scale(result, plot)


SCAN, SCAN_MEMORY, INDEX, INDEX_SIZE = "scan, ms", "scan: memory, MB", "index, ms", "index: size, MB"


def _indexed(trace: Store, queries: np.ndarray, ef_construction: int) -> tuple[float | str, ...]:
    """Of an index: median milliseconds a query, recall, seconds to build, MB. Why there is none, if there is none."""
    start = time.perf_counter()
    facts = build_index(trace, ef_construction=ef_construction)
    built = time.perf_counter() - start
    index = open_index(trace)
    if isinstance(index, Unavailable):
        return index.reason, 0.0, built, facts.bytes / 1e6
    times, found = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(index, query[None], 10).rows[0])
        times.append(time.perf_counter() - start)
    truth = exact_top_k(trace, queries, 10).rows
    reached = float(np.mean([np.isin(best, ours).mean() for ours, best in zip(found, truth, strict=True)]))
    return 1e3 * float(np.median(times)), reached, built, facts.bytes / 1e6


def _plot_scale(result: Result, path: Path) -> None:
    """Time and size over N, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = {"ms a query": (SCAN, INDEX), "MB": (SCAN_MEMORY, INDEX_SIZE)}
    for axes, (label, names) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in names:
            column = result.columns.index(name)
            shown = [(row[0], row[column]) for row in result.rows if isinstance(row[column], float)]
            axes.loglog(*zip(*shown, strict=True), marker="o", label=name.rsplit(",", 1)[0])
        axes.set(xlabel="samples", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


COLD_QUERY = """
import json, sys, time
from pathlib import Path
import hnswlib, numpy as np
import dmin_trace.query.trace
from dmin_trace.query.answer import hits_of
from dmin_trace.search import fit_score, index
from dmin_trace.store import open_store

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024

def clocks():
    return np.array([time.perf_counter(), time.process_time()])

def timed(owner, name, part):
    inside = getattr(owner, name)
    def call(*given, **named):
        start = clocks()
        try:
            return inside(*given, **named)
        finally:
            taken[part] = taken.get(part, 0) + clocks() - start
    setattr(owner, name, call)

def step(part, work):
    start, before = clocks(), sum(taken.get(name, 0) for name in inside)
    found = work()
    taken[part] = clocks() - start - (sum(taken.get(name, 0) for name in inside) - before)
    return found

taken, before = {}, peak()
inside = ("graph: checksum, checks, load", "graph: search", "rerank", "background")
timed(index, "check_file", inside[0])
timed(index, "load_graph", inside[0])
timed(index.Index, "candidates", inside[1])
timed(index, "rerank", inside[2])
timed(index, "_some_scores", inside[3])
store = step("open store", lambda: open_store(Path(sys.argv[1])))
query = store.gradients([store.header.samples // 3])
score = step("directions", lambda: fit_score(store, "deflated"))
deflated = step("deflate", lambda: score.transform(query))
opened = step("index but graph", lambda: index.open_index(store))
ranking = step("search", lambda: index.search(opened, deflated, 10, kind="deflated", background=True))
hits = step("hits", lambda: hits_of(store, ranking))
assert len(hits[0]) == 10 and hits[0][0].columns["caption"]
seconds = {part: list(clock) for part, clock in taken.items()}
print(json.dumps({"seconds": seconds, "inside": inside, "imports": before, "peak": peak()}))
"""
"""A query by the index in a process of its own, without the run of the script that makes its gradient."""


@app.command("query-overhead")
def query_overhead_command(
    samples: Annotated[int, typer.Option(help="N.")] = 1_000_000,
    chunks: Annotated[int, typer.Option(help="Chunks of the store.")] = 2_000,
    timesteps: Annotated[int, typer.Option(help="T.")] = 5,
    dimension: Annotated[int, typer.Option(help="v: small, so that the store is made in minutes.")] = 2**5,
    runs: Annotated[int, typer.Option(help="Processes; the middle one is shown.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where the store is kept, and taken from if it is there.")] = None,
    path: Json = None,
) -> None:
    """What a query by the index costs beside the graph and the rerank, in a new process, on a store of many samples."""
    result = Result(
        "query-overhead",
        f"query-overhead, N = {samples:,}, T = {timesteps}, v = {dimension}, int8, 2 columns of text; k = 10",
        ("part", "ms", "of them CPU, ms"),
    )
    with scratch(folder) as made:
        kept = (folder or made) / "overhead.zarr"
        if not kept.exists():
            rows = 1 << (samples // chunks - 1).bit_length()
            header = make_header(samples, timesteps, dimension, "int8", rows=rows)
            texts: dict[str, Any] = {"caption": "string", "file_name": "string"}
            trace = clustered_store(kept, replace(header, columns=texts))
            build_index(trace, recall=0.05, fold=4, m=8, ef_construction=20, directions=8)
        found = []
        for _ in range(runs):
            ran = subprocess.run(
                [sys.executable, "-c", COLD_QUERY, str(kept)], check=True, stdout=subprocess.PIPE, text=True
            )
            found.append(json.loads(ran.stdout))
        graph = (kept.with_name("overhead.index") / "graph.hnsw").stat().st_size
        opened = open_store(kept)
        result.notes.append(f"{opened.header.chunks:,} chunks; graph.hnsw has {graph / 1e6:.0f} MB.")
    middle = {name: 1e3 * np.median([run["seconds"][name] for run in found], axis=0) for name in found[0]["seconds"]}
    inside = {name: middle.pop(name) for name in found[0]["inside"]}
    for name, taken in {**middle, "all of these": sum(middle.values()), **inside}.items():
        result.add(name, *(float(clock) for clock in taken))
    imports, peak = (float(np.median([run[name] for run in found])) / 1e6 for name in ("imports", "peak"))
    result.notes.append(
        f"memory at its largest: {peak:.0f} MB, {peak - graph / 1e6:.0f} without the graph; imports: {imports:.0f} MB."
    )
    result.show(path)


@app.command("write")
def write_command(
    samples: Annotated[int, typer.Option(help="N.")] = 2048,
    timesteps: Annotated[int, typer.Option(help="T.")] = 10,
    dimension: Annotated[int, typer.Option(help="v.")] = 2**14,
    many: Annotated[int, typer.Option(help="Chunks of the store of many small ones; 0 leaves it out.")] = 1000,
    folder: Folder = None,
    path: Json = None,
) -> None:
    """Writing a store's chunks against a plain write and fsync of the same bytes."""
    result = Result(
        "write",
        f"write, N = {samples:,}, T = {timesteps}, v = {dimension:,}",
        ("dtype", "chunks", "MB a chunk", "raw, MB/s", "store, MB/s", "x raw", "from float32, MB/s", "x raw "),
        notes=[
            "raw: one file a chunk of the same bytes, fsync, and fsync of its folder.",
            "store: a chunk that is quantised already, with its norms, columns and mark; from float32: quantised too.",
        ],
    )
    dtypes: tuple[Dtype, ...] = ("int8", "float16", "float32")
    cases = [(dtype, make_header(samples, timesteps, dimension, dtype)) for dtype in dtypes]
    if many:
        cases.append(("int8", make_header(many, 2, 16, "int8", rows=1)))
    for dtype, header in cases:
        with scratch(folder) as made:
            result.add(*_written(made, header, dtype))
    result.show(path)


def _written(made: Path, header: Header, dtype: Dtype) -> tuple[str | int | float, ...]:
    rows = header.chunk_rows
    sketches = np.random.default_rng(0).standard_normal((rows, len(header.timesteps), header.dimension), np.float32)
    values, scale = store.quantise(sketches, dtype)
    ones, label = np.ones(scale.shape, np.float32), {"label": list(range(rows))}
    writers = create(made / "stored.zarr", header), create(made / "given.zarr", header)
    data, number = values.tobytes(), np.arange(rows)
    seconds: dict[str, float] = {"raw": 0, "stored": 0, "given": 0}
    whole = header.samples // rows
    for chunk in range(whole):
        # In turn, so that all three meet the same disk.
        for name in seconds:
            start = time.perf_counter()
            if name == "raw":
                with (made / str(chunk)).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                store.sync(made)
            elif name == "stored":
                writers[0].write(chunk, values, scale, ones, ones, number, label)
            else:
                writers[1].write(chunk, *store.quantise(sketches, dtype), ones, ones, number, label)
            seconds[name] += time.perf_counter() - start
    rate = {name: whole * len(data) / 1e6 / taken for name, taken in seconds.items()}
    return (
        *(dtype, whole, len(data) / 1e6, rate["raw"], rate["stored"], rate["stored"] / rate["raw"]),
        *(rate["given"], rate["given"] / rate["raw"]),
    )


@app.command("start")
def start_command(
    runs: Annotated[int, typer.Option(help="Processes for each row.")] = 7,
    path: Json = None,
) -> None:
    """Seconds that fresh processes take to import dmin_trace and to show the help."""
    result = Result(
        "start",
        f"start, the fastest and the middle one of {runs} processes",
        ("process", "fastest, s", "middle, s", "beyond python, s", "beyond its imports, s"),
        notes=["beyond python: over `python -c pass`; beyond its imports: over `import typer, rich`."],
    )
    commands = {
        "python -c pass": ("-c", "pass"),
        "import typer, rich": ("-c", "import typer, rich.console, rich.text"),
        "import numpy": ("-c", "import numpy"),
        "import dmin_trace": ("-c", "import dmin_trace"),
        "dmin-trace --help": ("-m", "dmin_trace.cli.app", "--help"),
        "dmin-trace --version": ("-m", "dmin_trace.cli.app", "--version"),
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if turn:
                taken[name].append(time.perf_counter() - start)
    bare, imports = (min(taken[name]) for name in ("python -c pass", "import typer, rich"))
    for name, found in taken.items():
        fastest = min(found)
        result.add(name, fastest, float(np.median(found)), fastest - bare, fastest - imports)
    result.show(path)


@app.command("index")
def index_command(
    store_path: Annotated[
        Path | None, typer.Argument(metavar="STORE", help="A store. Without one, a clustered one is made.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Compressed gradients of queries, (Q, T, v) in a .npy file. Default: made.")
    ] = None,
    count: Annotated[int, typer.Option(help="Queries to ask with.")] = 64,
    samples: Annotated[int, typer.Option(help="Of a made store.")] = 9_288,
    timesteps: Annotated[int, typer.Option(help="Of a made store.")] = 10,
    dimension: Annotated[int, typer.Option(help="Of a made store.")] = 2**12,
    recall: Annotated[float, typer.Option()] = 0.99,
    fold: Annotated[int | None, typer.Option()] = None,
    folder: Folder = None,
    path: Json = None,
) -> None:
    """Queries through the index, reranked, against the exact scan of the same store: recall and time."""
    with scratch(folder) as made:
        # The index is built beside this link, so that a store's own index is left alone.
        place = made / "trace.zarr"
        if store_path is not None:
            place.symlink_to(store_path.absolute())
            trace = open_store(place)
        else:
            trace = clustered_store(place, make_header(samples, timesteps, dimension, "int8"))
        header = trace.header
        start = time.perf_counter()
        facts = build_index(trace, recall=recall, fold=fold)
        built = time.perf_counter() - start
        start = time.perf_counter()
        index = open_index(trace)
        read = time.perf_counter() - start
        asked = mixed_queries(trace, count) if queries is None else np.load(queries)[:count].astype(np.float32)
        result = Result(
            "index",
            f"index, N = {header.samples:,}, T = {len(header.timesteps)}, v = {header.dimension:,}, {header.dtype}; "
            f"{len(asked)} queries, {'made' if queries is None else 'captured'}",
            ("k", "C", "calibrated", "recall", "index, ms", "p95, ms", "graph, ms", "scan, ms", "faster"),
            notes=[
                f"built in {built:.1f} s, {facts.length:,} numbers a vector (F = {facts.fold}), opened in {read:.2f} "
                f"s, {facts.bytes / trace.bytes:.1%} of the store's bytes"
            ],
        )
        if isinstance(index, Unavailable):
            result.notes.append(index.reason)
            result.show(path)
            return
        for depth in facts.depths:
            truth = exact_top_k(trace, asked, depth.k).rows
            times, graph = np.empty((2, len(asked)))
            found = np.empty_like(truth)
            for q, query in enumerate(asked):
                start = time.perf_counter()
                found[q] = search(index, query[None], depth.k).rows[0]
                times[q] = time.perf_counter() - start
                start = time.perf_counter()
                index.candidates(query[None], depth)
                graph[q] = time.perf_counter() - start
            scan = best_of(lambda depth=depth: exact_top_k(trace, asked[:1], depth.k), 5)  # type: ignore[misc]
            reached = float(np.mean([np.isin(best, ours).mean() for ours, best in zip(found, truth, strict=True)]))
            median, late = float(np.median(times)), float(np.percentile(times, 95))
            shown = [1e3 * seconds for seconds in (median, late, float(np.median(graph)), scan)]
            result.add(depth.k, depth.candidates, depth.recall, reached, *shown, f"{scan / median:.0f}x")
        result.show(path)


# -- capture ---------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Where the time of a capture goes, in seconds."""

    samples: int = 0
    script: float = 0.0
    compress: float = 0.0
    store: float = 0.0
    whole: float = 0.0


@contextmanager
def clocked() -> Iterator[Clock]:
    """While entered, captures in this process are timed; the first sample of each, which warms up, is left out."""
    clock = Clock()
    opened = began = 0.0
    inner = {
        "open": StepGuard.open,
        "gradients": recorder.take_gradient,
        "compress": recorder.compress_gradient,
        "keep": ChunkQueue.add,
        "sample": Recorder.sample,
        "take": Recorder.take,
    }

    def open_step(guard: StepGuard, *args: Any, **named: Any) -> Any:
        nonlocal opened
        step = inner["open"](guard, *args, **named)
        opened = time.perf_counter()
        return step

    def gradients(*args: Any) -> Any:
        found = inner["gradients"](*args)
        clock.script += time.perf_counter() - opened
        return found

    def timed(name: str, inside: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = inside(*args, **named)
            setattr(clock, name, getattr(clock, name) + time.perf_counter() - start)
            return found

        return run

    def sample(self: Recorder, *args: Any) -> None:
        nonlocal began
        clock.samples += 1
        if clock.samples == 2:
            clock.script = clock.compress = clock.store = 0.0
            began = time.perf_counter()
        inner["sample"](self, *args)

    def take(self: Recorder, step: Any) -> None:
        inner["take"](self, step)
        clock.whole = time.perf_counter() - began

    places: list[tuple[Any, str, Any]] = [
        (StepGuard, "open", open_step),
        (recorder, "take_gradient", gradients),
        (recorder, "compress_gradient", timed("compress", inner["compress"])),
        (ChunkQueue, "add", timed("store", inner["keep"])),
        (Recorder, "sample", sample),
        (Recorder, "take", take),
    ]
    with replaced(places):
        yield clock


@contextmanager
def replaced(places: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """While entered, these attributes have other values."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _captured(work: Path, *arguments: object) -> Clock:
    """Runs `dmin-trace` in this process, and says where the time of its capture went."""
    with (
        clocked() as clock,
        contextlib.chdir(work),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as complaints,
    ):
        code = cli.main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(complaints.getvalue())
    return clock


@app.command("capture")
def capture_command(
    samples: Annotated[int, typer.Option(help="Of the digits; the pictures with captions are ten.")] = 260,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    folder: Folder = None,
    path: Json = None,
) -> None:
    """What a capture adds to the script's own forward and backward passes, and what remembering encoders saves."""
    torch.set_num_threads(threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    examples = Path(dmin_trace.__file__).parent.parent / "examples"
    from diffusers.models.autoencoders.vae import Encoder
    from transformers import CLIPTextModel

    sys.path.insert(0, str(Path(__file__).parent))
    import tiny_models

    with scratch(folder) as work:
        os.environ["XDG_STATE_HOME"] = str(work / "state")
        tiny_models.write_pictures(work / "data")
        lora = [examples / "train_text_to_image_lora.py", "--pretrained_model_name_or_path"]
        lora += [tiny_models.build("sd1_wide", work / "sd1"), "--train_data_dir", work / "data" / "captioned"]
        lora += ["--resolution", 64, "--rank", 4, "--train_batch_size", 2, "--max_train_steps", 3]
        digits = [examples / "train_digits.py", "--max_train_samples", samples, "--max_train_steps", 4]
        shares = Result(
            "capture",
            f"what a capture adds to a script's own forward and backward passes, {threads} thread(s)",
            ("run", "samples x T", "forward, backward: s", "compress, %", "store, %", "both, %", "all the rest, %"),
        )
        for name, command, timesteps in (("digits demo", digits, 5), ("tiny SD LoRA", lora, 10)):
            out = work / name.replace(" ", "-")
            clock = _captured(work, "run", "--timesteps", timesteps, "--", *command, "--output_dir", out)
            parts = [100 * part / clock.script for part in (clock.compress, clock.store)]
            rest = 100 * (clock.whole - clock.script) / clock.script - sum(parts)
            shares.add(name, f"{clock.samples - 1} x {timesteps}", clock.script, *parts, sum(parts), rest)
        shares.show(path)

        weights = next((work / "tiny-SD-LoRA").glob("*lora*.safetensors"))
        saved = Result(
            "encoders",
            f"tiny SD LoRA, T = 10, {threads} thread(s): a capture whose autoencoder and text encoder are cached",
            ("encoders", "s", "x free encoders"),
        )
        forget = [(frozen, "_is_frozen", lambda module: False)]
        answers: dict[int, Any] = {}

        def free(forward: Callable[..., Any]) -> Callable[..., Any]:
            def answer(self: Any, *args: Any, **named: Any) -> Any:
                if id(self) not in answers:
                    answers[id(self)] = forward(self, *args, **named)
                return answers[id(self)]

            return answer

        always = [(kind, "forward", free(kind.forward)) for kind in (Encoder, CLIPTextModel)]
        ways = {"run every time": forget, "cached": [], "free": [*forget, *always]}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        rows = {}
        for turn in range(4):
            for name, places in ways.items():
                out = work / f"{name.split()[0]}-{turn}.zarr"
                answers.clear()
                with replaced(places):
                    command = ["capture", "--weights", weights, "--timesteps", 10, "--out", out, "--", *lora]
                    taken[name].append(_captured(work, *command).whole)
                rows[name] = open_store(out).gradients(np.arange(10))
        best = {name: min(times) for name, times in taken.items()}
        for name, seconds in best.items():
            saved.add(name, seconds, seconds / best["free"])
        same = np.array_equal(rows["run every time"], rows["cached"])
        saved.notes.append(f"stored gradients, run every time and cached: {'equal' if same else 'DIFFERENT'}")
        saved.show(path)


@app.command("again")
def again_command(
    samples: Annotated[int, typer.Option(help="Of the digits.")] = 260,
    runs: Annotated[int, typer.Option(help="Processes for each row but the first.")] = 5,
    folder: Folder = None,
    path: Json = None,
) -> None:
    """Seconds of a query that was asked before, in a fresh process, with another k, score or view."""
    with scratch(folder) as work:
        environment = {**os.environ, "XDG_STATE_HOME": str(work / "state"), "XDG_CACHE_HOME": str(work / "cache")}

        def seconds(*arguments: object, times: int = 1) -> np.ndarray:
            """(wall, processor) seconds of the fastest of several processes, and of the one with the least work."""
            taken = []
            for _ in range(times):
                start, before = time.perf_counter(), os.times()
                ran = subprocess.run(
                    [sys.executable, *map(str, arguments)],
                    env=environment,
                    cwd=work,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                after = os.times()
                worked = sum(after[2:4]) - sum(before[2:4])
                taken.append((time.perf_counter() - start, worked))
                if ran.returncode:
                    raise SystemExit(ran.stderr)
            return np.min(taken, axis=0)

        example = Path(dmin_trace.__file__).parent.parent / "examples" / "train_digits.py"
        command = [example, "--max_train_samples", samples, "--max_train_steps", 60, "--output_dir", "out"]
        trace, ours = work / "out.trace" / "trace.zarr", ("-m", "dmin_trace.cli.app")
        seconds(*ours, "run", "--timesteps", 5, "--", *command)
        image, header = work / "query.png", open_store(trace).header
        sample = open_trace(trace).thumbnails[7]
        if sample is None:
            raise SystemExit("The trace has no picture of sample 7.")
        sample.convert("L").save(image)
        query = (*ours, "query", trace, image)
        rows = {
            "asked first": ((), 1),
            "asked first, once more": (("--no-cache",), 1),
            "asked again": ((), runs),
            "with another k": (("-k", 50), runs),
            "with another score": (("--score", "dmin"), runs),
            "by label": (("--by", "label"), runs),
        }
        shape = f"N = {header.samples:,}, T = {header.gradient_count}, v = {header.dimension:,}"
        result = Result(
            "again",
            f"a query of the digits demo, {shape}: the fastest of {runs} processes",
            ("query", "s", "beyond python, s", "of processors, s", "beyond python, s", "of the first, %"),
            notes=["beyond python: over `python -c pass`; with an index: after `dmin-trace index`."],
        )
        bare = seconds("-c", "pass", times=runs)
        taken = {name: seconds(*query, *options, times=times) for name, (options, times) in rows.items()}
        seconds(*ours, "index", trace)
        taken["asked again, with an index"] = seconds(*query, times=runs)
        for name, (wall, processor) in taken.items():
            share = 100 * processor / taken["asked first"][1]
            result.add(name, float(wall), float(wall - bare[0]), float(processor), float(processor - bare[1]), share)
        result.show(path)


@app.command("all")
def all_command(folder: Folder = None, plot: Annotated[Path | None, typer.Option()] = None, path: Json = None) -> None:
    """Every part with its defaults: about ten minutes, and 2 GB of disk. `estimator` needs a store of its own."""
    start_command(path=path)
    compress_command(path=path)
    torch.set_num_threads(os.cpu_count() or 1)
    write_command(folder=folder, path=path)
    score_command(folder=folder, path=path)
    check_command(folder=folder, path=path)
    index_command(folder=folder, path=path)
    capture_command(folder=folder, path=path)
    again_command(folder=folder, path=path)
    torch.set_num_threads(CORES)
    scale_command(folder=folder, plot=plot, path=path)


if __name__ == "__main__":
    app()
