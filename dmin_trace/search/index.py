"""The index: a graph over folded gradients proposes candidates, and exact scores rank them.

    trace.index/      beside trace.zarr
      index.json      what was built, of which state of which store, and the recall that was measured
      graph.hnsw      hnswlib's graph: a vector for each slot that can be ranked, of copies for the first alone
      shared.f32      (T, r, v) the directions in which the samples mostly lie at each timestep, orthonormal
      copies.i64      (n, 2) slots whose stored numbers are those of an earlier slot, and that slot
      rows.u32        (N,) the crc32c of each slot's stored numbers, by which a row is checked when it is ranked: the
                      checksum of its chunk would take reading all of that
      principal.f32   (T, r, v) more such directions, for deflated scores (`kernel`)
      eigenvalues.f64 (T, r) theirs

A projection folds (`compress`): adding bins j and j + v/2 until F are left gives a sketch of F numbers, whose inner
products err by about the product of the norms over sqrt(F). Gradients of a diffusion model are much alike, and an error
in what they share would drown what tells them apart; so each timestep is first split into its parts along r principal
directions, kept as exact numbers, and the rest, which is folded. A vector of the index holds both for all timesteps,
T (F + r) numbers, and its inner product with a query's estimates the score. Inner product and not cosine: a fold keeps
no norms.

HNSW (Malkov and Yashunin, arXiv 1603.09320) finds the C vectors with the largest products, and `ranking.rerank` ranks
their rows by the very scores of the exact scan. Building measures how many of the true 10 and 100 best are found for
samples that are not in the graph yet and for mixtures of them, chooses C and F by that, and writes it down; where the
recall cannot be reached the scan answers. That is done for each score that queries may ask for: a deflated query has
other neighbours, in the same graph.

An index can come from anybody, as a store can. It is used only if everything in it fits the store as it is now; its
checksums find damage, but not a forger, who writes them too: see `hnsw` for what is checked against those.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from dmin_trace import store as untrusted
from dmin_trace.errors import QueryError, SettingsError, TraceError
from dmin_trace.search import deflation as kernel
from dmin_trace.search import exact as score
from dmin_trace.search import ranking
from dmin_trace.search.deflation import Directions, Progress, Score
from dmin_trace.search.graph import GraphError, graph_bytes, load_graph, make_graph
from dmin_trace.search.ranking import Ranking
from dmin_trace.store import Store, row_checksum, sync, sync_tree

if TYPE_CHECKING:
    import hnswlib

logger = logging.getLogger(__name__)

FORMAT = "dmin_trace.index"
VERSION = 1

RECALL_AT_100 = 0.95
"""What is asked of the 100 best; of the 10 best it is the user's to say."""
HELD_OUT = 64
"""Samples that ask in calibration before they are in the graph themselves."""
SCANNED = 8
"""Candidates are at most one in so many samples: beyond that scattered reads cost about what the scan does."""
MOST_CANDIDATES = 4096
DEEPEST = 2**12
"""ef goes no further than this, or than eight times the candidates: among a million vectors that lie close, a graph is
left early, and 20 candidates need an ef of thousands, which take milliseconds."""
MARGIN = 2
"""Times the candidates that were enough in calibration."""
SMALL = 0.05
"""The part of the store's bytes that an automatic fold begins within."""
LEAST_FOLDED, MOST_FOLDED = 256, 5120
"""T F, numbers in a vector, that an automatic fold begins with at least and ends with at most."""
DIRECTIONS = 8
"""r, principal directions that are kept apart; they halve the candidates that are needed."""
DIRECTIONS_OF = 256
"""Samples, spread over the store, that the directions are taken from."""
BLOCK = 2**22
"""Numbers of gradients that are converted to float32 at a time."""
ASKED = 2**28
"""Numbers of gradients that ask in calibration at the most: fewer samples ask where they are very long."""
LARGEST_FACTS = 2**20
ANOTHER_VERSION = "it was written by another version of dmin_trace"

GRAPH, SHARED, COPIES, ROWS, FACTS = "graph.hnsw", "shared.f32", "copies.i64", "rows.u32", "index.json"
NAMES = (GRAPH, SHARED, COPIES, ROWS)
PRINCIPAL, EIGENVALUES = "principal.f32", "eigenvalues.f64"


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How to ask for up to k hits of a score, and what part of the true k best was found so.

    candidates: C, how many rows are scored exactly.
    ef: how many vectors hnswlib's search has in view.
    """

    score: Score
    k: int
    candidates: int
    ef: int
    recall: float

    @property
    def name(self) -> str:
        """What the recall is of."""
        return f"recall@{self.k}" + ("" if self.score == "dmin" else f" of {self.score} scores")


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the index: its size and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What index.json holds.

    store, state, projection: the store's id, the fingerprint of its content, and that of its projection.
    timesteps, dimension: T and v of the store.
    samples, vectors: N, and how many of them the graph holds.
    fold, directions: F and r.
    m, ef_construction: HNSW's.
    target: the recall that was asked for, of the first 10 hits.
    asked: how many samples it was measured with.
    depths: the numbers of hits that are served; none if the scan has to answer.
    short: if it serves less than it should, why.
    principal: how many principal directions of each timestep are kept for deflated scores.
    files: the other files.
    """

    store: str
    state: str
    projection: str
    timesteps: int
    dimension: int
    samples: int
    vectors: int
    fold: int
    directions: int
    m: int
    ef_construction: int
    target: float
    asked: int
    depths: tuple[Depth, ...]
    short: str
    principal: int
    files: dict[str, File]

    @property
    def length(self) -> int:
        """Numbers in a vector."""
        return self.timesteps * (self.fold + self.directions)

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.bytes for file in self.files.values())

    def depth(self, k: int, score: Score = "dmin") -> Depth | None:
        """How to ask for k hits of a score; None if so many were not calibrated."""
        return next((depth for depth in self.depths if depth.k >= k and depth.score == score), None)

    def unserved(self, score: Score) -> str:
        """Why the graph does not answer for a score, or not for more hits."""
        served = [depth.k for depth in self.depths if depth.score == score]
        if served:
            return f"the index serves up to {max(served)} hits"
        of = f" {score} scores" if self.depths else ""
        return f"the index does not serve{of}" + (f" ({self.short})" if self.short else "")

    def to_json(self) -> str:
        """The facts as index.json keeps them, with their own digest."""
        facts = json.loads(json.dumps({"format": FORMAT, "version": VERSION, "space": "ip", **asdict(self)}))
        return json.dumps({**facts, "digest": untrusted.digest(facts)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """The facts that `to_json` wrote. Raises GraphError if they are none, of another version, or absurd."""
        try:
            kept = untrusted.parse(text)
            written = kept.pop("digest", None)
            if written != untrusted.digest(kept):
                raise GraphError(f"{FACTS} is damaged")
            if (kept.pop("format"), kept.pop("version"), kept.pop("space")) != (FORMAT, VERSION, "ip"):
                raise GraphError(ANOTHER_VERSION)
            depths = tuple(Depth(**depth) for depth in kept.pop("depths"))
            files = {name: File(**file) for name, file in kept.pop("files").items()}
            facts = cls(**kept, depths=depths, files=files)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise GraphError(f"{FACTS} cannot be read") from None
        whole: tuple[Any, ...] = (
            facts.timesteps,
            facts.dimension,
            facts.samples,
            facts.asked,
            facts.fold,
            facts.directions,
            facts.m,
            facts.ef_construction,
            facts.vectors,
            facts.principal,
            *(file.bytes for file in files.values()),
        )
        whole += tuple(number for depth in depths for number in (depth.k, depth.candidates, depth.ef))
        parts = (facts.target, *(depth.recall for depth in depths))
        right = all(type(number) is int and 0 <= number < 2**50 for number in whole)
        right = right and all(type(part) in (int, float) and 0 <= part <= 1 for part in parts)
        right = right and all(depth.k <= depth.candidates <= min(depth.ef, facts.vectors) for depth in depths)
        right = right and all(depth.score in get_args(Score) for depth in depths)
        right = right and facts.principal <= kernel.MOST_DIRECTIONS
        right = right and isinstance(facts.short, str) and all(isinstance(file.sha256, str) for file in files.values())
        if not right or not 2 <= facts.m <= 100:
            raise GraphError(f"{FACTS} holds numbers that are out of range")
        return facts


@dataclass(frozen=True)
class Split:
    """How compressed gradients become vectors of the index.

    shared: (T, r, v) float32, the directions that are kept apart: at each timestep orthonormal, or zero.
    fold: F.
    """

    shared: NDArray[np.float32]
    fold: int

    @property
    def length(self) -> int:
        """Numbers in a vector."""
        timesteps, directions, _ = self.shared.shape
        return int(timesteps) * (self.fold + int(directions))

    def vectors(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, T, v) to (n, T (F + r)) float32: of each timestep its parts along the directions, and the rest folded."""
        along = np.matmul(rows.transpose(1, 0, 2), self.shared.transpose(0, 2, 1))  # (T, n, r)
        rest = _folded(rows, self.fold) - np.matmul(along, self._folded_shared).transpose(1, 0, 2)
        return np.concatenate([along.transpose(1, 0, 2), rest], axis=2).reshape(len(rows), -1)

    @cached_property
    def _folded_shared(self) -> NDArray[np.float32]:
        return _folded(self.shared, self.fold)


class Index:
    """An index that is fresh, whole and calibrated; `open_index` makes one."""

    def __init__(
        self,
        trace: Store,
        facts: Facts,
        split: Split,
        graph: hnswlib.Index,
        copies: NDArray[np.int64],
        checksums: NDArray[np.uint32],
    ) -> None:
        """Made by `open_index`."""
        self.checksums = checksums
        self.trace = trace
        self.facts = facts
        self._split = split
        self._graph = graph
        self._copies = copies

    def candidates(self, queries: NDArray[np.float32], depth: Depth) -> list[NDArray[np.int64]]:
        """For each of the queries (Q, T, v) the slots that may be among its best, their copies with them."""
        self._graph.set_ef(depth.ef)
        try:
            labels, _ = self._graph.knn_query(self._split.vectors(queries), k=depth.candidates)
        except RuntimeError as error:
            raise TraceError(
                f"The index of {self.trace.path} does not answer: {error}. Make it anew (dmin-trace index), or ask "
                "with --exact."
            ) from None
        found: list[NDArray[np.int64]] = [of_query.astype(np.int64) for of_query in labels]
        if not len(self._copies):
            return found
        return [np.append(slots, self._copies[np.isin(self._copies[:, 1], slots), 0]) for slots in found]


def search(index: Index, queries: NDArray[np.float32], k: int, *, kind: Score = "dmin") -> Ranking:
    """The k best of what the graph proposes for each query, by exact scores; of equal ones the first slot.

    Args:
        index: from `open_index`.
        queries: (Q, T, v), compressed gradients, as the score has them.
        k: how many to keep; `index.facts.depth(k, kind)` says whether so many are served.
        kind: the score that the queries are for.

    Raises:
        QueryError: k is out of range or not served, or the queries are not finite or not of the store's shape.
        TraceError: the store or the graph is damaged.
    """
    ranking.check_k(index.trace, k)
    ranking.check_queries(index.trace, queries)
    depth = index.facts.depth(k, kind)
    if depth is None:
        raise QueryError(f"k is {k}, more than the index was calibrated for. Ask for fewer, or ask with --exact.")
    return ranking.rerank(index.trace, queries, index.candidates(queries, depth), k, checksums=index.checksums)


def index_beside(path: Path) -> Path:
    """The folder beside a store that holds its index."""
    return path.with_name(path.name.removesuffix(".zarr") + ".index")


@dataclass(frozen=True)
class Unavailable:
    """A store's index, or a part of it, that is not used.

    reason: why, in words; "" if none was made.
    """

    reason: str


def read_facts(trace: Store) -> Facts | Unavailable:
    """The facts of a store's index, if the store has not changed since the index was built."""
    folder = index_beside(trace.path)
    if not folder.is_dir():
        return Unavailable("")
    try:
        return _fresh_facts(trace, folder)
    except GraphError as error:
        return _unused(error)


def open_index(trace: Store) -> Index | Unavailable:
    """The index of a store, ready for queries; `Unavailable` if it serves none too."""
    facts = read_facts(trace)
    if isinstance(facts, Unavailable):
        return facts
    if not facts.depths:
        return Unavailable(facts.unserved("dmin"))
    try:
        return _opened(trace, facts, index_beside(trace.path))
    except GraphError as error:
        return _unused(error)
    except (OSError, ValueError) as error:
        return _unused(f"it is damaged ({error})")


def open_directions(trace: Store) -> Directions | Unavailable:
    """The principal directions that a store's index keeps."""
    facts = read_facts(trace)
    if isinstance(facts, Unavailable):
        return facts
    if not facts.principal:
        return Unavailable("")
    shape = (facts.timesteps, facts.principal)
    folder = index_beside(trace.path)
    try:
        kept = _checked(folder, EIGENVALUES, facts.files[EIGENVALUES], 8 * math.prod(shape))
        eigenvalues = np.fromfile(kept, "<f8").reshape(shape)
        file = _checked(folder, PRINCIPAL, facts.files[PRINCIPAL], 4 * math.prod(shape) * facts.dimension)
        vectors = np.memmap(file, "<f4", "r", shape=(*shape, facts.dimension))
        if not np.isfinite(eigenvalues).all() or (np.diff(eigenvalues, append=0.0) > 0).any():
            raise GraphError(f"{EIGENVALUES} holds none")
        if not np.allclose(np.vecdot(vectors, vectors), eigenvalues > 0, atol=1e-2):
            raise GraphError(f"{PRINCIPAL} holds no directions")
    except GraphError as error:
        return _unused(error)
    except (OSError, ValueError) as error:
        return _unused(f"it is damaged ({error})")
    return Directions(vectors, eigenvalues)


def damage(trace: Store) -> tuple[list[tuple[str, str]], str]:
    """The files of a store's index that are damaged, each with what is wrong; and, in words, why it is not used though
    no file may be damaged, "" if it is, or there is none. Reads all of its files."""
    folder = index_beside(trace.path)
    if not folder.is_dir():
        return [], ""
    try:
        facts = _read_facts(folder)
    except GraphError as error:
        return ([], str(error)) if str(error) == ANOTHER_VERSION else ([(FACTS, str(error))], "")
    try:
        _fresh_facts(trace, folder)
        why = ""
    except TraceError:
        why = "the store is damaged"
    except GraphError as error:
        why = str(error)
    found: list[tuple[str, str]] = []
    for name, written in facts.files.items():
        try:
            if name not in (*NAMES, PRINCIPAL, EIGENVALUES):
                raise GraphError(f"{name} is no file of an index")
            _checked(folder, name, written, written.bytes)
        except (GraphError, OSError) as error:
            found.append((name, str(error)))
    return found, why


def build_index(
    trace: Store,
    *,
    recall: float = 0.99,
    fold: int | None = None,
    m: int = 16,
    ef_construction: int = 200,
    directions: int | None = None,
    progress: Progress | None = None,
) -> Facts:
    """Builds a store's index, measures its recall, and puts it beside the store in place of an older one.

    Where the recall cannot be reached, that is written down instead of a graph, and queries scan. The principal
    directions of deflated scores are found and kept all the same.

    Args:
        trace: the store.
        recall: what part of the true 10 best is to be found; of the 100 best it is 0.95.
        fold: F, a divisor of v; if not given, as small as the recall allows.
        m: links of a vector, 2 to 100.
        ef_construction: how many vectors are in view when one is linked.
        directions: how many principal directions deflated scores take out, 0 for none to be kept;
            `kernel.choose_directions` says it if it is not given.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        What was built; `depths` says what it serves.

    Raises:
        SettingsError: an argument is out of range, or the vectors do not fit into memory.
        TraceError: the store is unfinished or damaged, or the index cannot be written.
    """
    progress = progress or (lambda what, done, of: None)
    if not 0 < recall <= 1:
        raise SettingsError(f"recall is {recall}; expected more than 0, and 1 at most.")
    if not 2 <= m <= 100:
        raise SettingsError(f"M is {m}; expected 2 to 100.")
    if not m <= ef_construction <= 10_000:
        raise SettingsError(f"ef_construction is {ef_construction}; expected {m} (M) to 10000.")
    folds = _folds(trace, fold, m)
    if not trace.complete:
        raise TraceError(f"{trace.path} is unfinished. Finish the capture before it is indexed.")
    folder = index_beside(trace.path)
    _check_ours(folder)
    _check_memory(trace, folds[0], m)

    state = fingerprint(trace)
    kept, copies, checksums = _kept_and_copies(trace, progress)
    affordable = max(8, ASKED // (2 * len(trace.header.timesteps) * trace.header.dimension))
    held = kept[np.linspace(0, len(kept) - 1, min(HELD_OUT, affordable, len(kept) // 4)).astype(np.int64)]
    linked = np.setdiff1d(kept, held)
    most = min(MOST_CANDIDATES, len(linked) // SCANNED)
    wanted = {k: part for k, part in ((10, recall), (100, RECALL_AT_100)) if k <= most}
    facts = Facts(
        store=trace.header.id,
        state=state,
        projection=trace.header.projection.fingerprint,
        timesteps=len(trace.header.timesteps),
        dimension=trace.header.dimension,
        samples=trace.header.samples,
        vectors=len(kept),
        fold=folds[0],
        directions=DIRECTIONS,
        m=m,
        ef_construction=ef_construction,
        target=recall,
        asked=len(held),
        depths=(),
        short=f"{len(kept)} samples are few enough to scan",
        principal=0,
        files={},
    )
    principal = None
    arrays: dict[str, NDArray[Any]] = {}
    if directions != 0 and len(kept):
        free = _free_memory()
        if free is not None and free < (needed := kernel.memory(trace, directions)):
            raise SettingsError(
                f"To find principal directions takes {needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB "
                "are free. Give a smaller --directions, or 0 for none."
            )
        principal = kernel.principal_directions(trace, directions, progress)
        facts = replace(facts, principal=principal.eigenvalues.shape[1])
        arrays |= {PRINCIPAL: principal.vectors, EIGENVALUES: principal.eigenvalues}
    if not wanted:
        return _write(folder, facts, arrays)
    questions: dict[Score, NDArray[np.float32]] = {"dmin": _questions(trace, held)}
    if principal is not None:
        questions["deflated"] = principal.deflate(questions["dmin"])
    truth = {kind: _truth(trace, asked, held, copies, max(wanted), progress) for kind, asked in questions.items()}
    shared = _shared_directions(trace, kept)
    for fold in folds:
        _check_memory(trace, fold, m)
        split = Split(shared, fold)
        graph = make_graph(split.length, len(kept), m, ef_construction)
        _add(graph, trace, split, linked, progress)
        found = [
            _calibrate(graph, split.vectors(asked), truth[kind], wanted, most, kind)
            for kind, asked in questions.items()
        ]
        depths = tuple(depth for served, _ in found for depth in served)
        short = [why for _, why in found]
        logger.info("fold %d: %s %s", fold, depths, short)
        facts = replace(facts, fold=fold, depths=depths, short="; ".join(filter(None, short)))
        # The paper's score decides. A larger vector costs every query, and what it cannot serve is scanned for.
        if not short[0]:
            break
    if not facts.depths:
        return _write(folder, facts, arrays)
    _add(graph, trace, split, held, progress)
    return _write(folder, facts, {**arrays, SHARED: shared, COPIES: copies, ROWS: checksums}, graph)


def fingerprint(trace: Store) -> str:
    """SHA-256 of what the store is and of the checksums of all its chunks."""
    return trace.state


def graph_memory(trace: Store, fold: int, m: int) -> int:
    """Bytes of a graph of this fold."""
    return graph_bytes(len(trace.header.timesteps) * (fold + DIRECTIONS), trace.header.samples, m)


def _folds(trace: Store, fold: int | None, m: int) -> list[int]:
    """The folds to try, one after another."""
    header = trace.header
    v, timesteps = header.dimension, len(header.timesteps)
    if fold is not None:
        if fold < 1 or v % fold:
            raise SettingsError(f"fold is {fold}; expected a divisor of the store's dimension {v}, such as {v // 2}.")
        return [fold]
    sketch = timesteps * v * np.dtype(header.dtype).itemsize
    room = SMALL * sketch * header.samples - 4 * timesteps * DIRECTIONS * v
    folds = [v]
    while folds[-1] % 2 == 0:
        folds.append(folds[-1] // 2)
    folds = [f for f in reversed(folds) if timesteps * f <= MOST_FOLDED] or [folds[-1]]
    small = [f for f in folds if graph_bytes(timesteps * (f + DIRECTIONS), header.samples, m) <= room]
    # Within the room the largest: more numbers in a vector make for fewer rows to score.
    first = max([*small, *(f for f in folds[:1]), *(f for f in folds if timesteps * f < 2 * LEAST_FOLDED)])
    return folds[folds.index(first) :]


def _check_memory(trace: Store, fold: int, m: int) -> None:
    """Raises SettingsError if the graph would not fit into memory."""
    needed, free = graph_memory(trace, fold, m), _free_memory()
    if free is not None and needed > free:
        header = trace.header
        raise SettingsError(
            f"The index needs {needed / 2**30:,.1f} GiB of memory ({header.samples:,} samples of "
            f"{len(header.timesteps)} x {fold:,} float32 numbers, and their links), and {free / 2**30:,.1f} GiB are "
            "free. Give a smaller --fold."
        )


def _free_memory() -> int | None:
    """Bytes that a process could still take, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _kept_and_copies(
    trace: Store, progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
    """The slots that the graph holds; (n, 2) the others that can be ranked, each with the kept slot it copies; and (N,)
    the checksums of all slots' stored numbers.

    Copies would crowd a neighbourhood until nothing else is linked, and they are what a model remembers best.
    """
    firsts: dict[bytes, int] = {}
    copies: list[tuple[int, int]] = []
    checksums = np.zeros(trace.header.samples, np.uint32)
    for chunk in trace.chunks_done:
        grad, scale = trace.grad_chunk(chunk), trace.scale_chunk(chunk)
        for row, factors, slot in zip(grad, scale, trace.header.rows(chunk), strict=True):
            checksums[slot] = row_checksum(row)
            if trace.valid[slot]:
                digest = hashlib.blake2b(factors.tobytes(), digest_size=16)
                digest.update(row.data)
                first = firsts.setdefault(digest.digest(), slot)
                if first != slot:
                    copies.append((slot, first))
        progress("looking for copies", trace.header.rows(chunk).stop, trace.header.samples)
    return np.array(list(firsts.values()), np.int64), np.array(copies, np.int64).reshape(-1, 2), checksums


def _questions(trace: Store, held: NDArray[np.int64]) -> NDArray[np.float32]:
    """(2 n, T, v) what asks in calibration: the held-out samples, and mixtures of two of them.

    A generated image is no copy of a sample: it lies between many, none of which stands out. It takes more candidates
    than a sample does, and mixtures come closest to it (docs/performance.md).
    """
    rows = trace.gradients(held)
    mixed = rows + np.roll(rows, len(rows) // 2, axis=0)
    norm = np.linalg.norm(mixed, axis=2, keepdims=True)
    return np.concatenate([rows, mixed / np.where(norm > 0, norm, 1)])


def _truth(
    trace: Store,
    questions: NDArray[np.float32],
    held: NDArray[np.int64],
    copies: NDArray[np.int64],
    depth: int,
    progress: Progress,
) -> NDArray[np.int64]:
    """(questions, depth) the best of all slots but the held-out ones, a copy as the slot that it copies."""
    first = np.arange(trace.header.samples)
    first[copies[:, 0]] = copies[:, 1]
    left_out = np.isin(first, held)
    deep = min(depth + int(left_out.sum()), int(trace.valid.sum()))
    done = 0

    def scanned(samples: int) -> None:
        nonlocal done
        done += samples
        progress("scanning for the truth", done, trace.header.samples)

    ranking = score.exact_top_k(trace, questions, deep, progress=scanned)
    return np.stack([first[slots[~left_out[slots]][:depth]] for slots in ranking.rows])


def _shared_directions(trace: Store, kept: NDArray[np.int64]) -> NDArray[np.float32]:
    """(T, r, v) the principal directions of samples at each timestep, the mean not taken out; zeros where fewer are."""
    timesteps, dimension = len(trace.header.timesteps), trace.header.dimension
    count = min(DIRECTIONS_OF, len(kept), max(2 * DIRECTIONS, 2**26 // dimension))
    some = kept[np.linspace(0, len(kept) - 1, count).astype(np.int64)]
    found = np.zeros((timesteps, DIRECTIONS, dimension), np.float32)
    rows = np.empty((count, dimension), np.float32)
    for t in range(timesteps):
        for n, (chunk, place) in enumerate(zip(*np.divmod(some, trace.header.chunk_rows), strict=True)):
            rows[n] = trace.grad_chunk(int(chunk))[place, t]
        rows *= trace.scale[some, t, None]
        _, mixtures = np.linalg.eigh(rows @ rows.T)  # the smallest first
        directions = mixtures[:, : -1 - DIRECTIONS : -1].T @ rows
        norms = np.linalg.norm(directions, axis=1)
        real = norms > 1e-3 * norms.max()
        found[t, : len(norms)][real] = directions[real] / norms[real, None]
    return found


def _add(graph: hnswlib.Index, trace: Store, split: Split, slots: NDArray[np.int64], progress: Progress) -> None:
    """Links the vectors of these slots."""
    done = 0
    for part in _parts(trace, slots):
        graph.add_items(split.vectors(trace.gradients(part)), part)
        done += len(part)
        progress(f"linking vectors of {split.length:,} numbers", done, len(slots))


def _calibrate(
    graph: hnswlib.Index,
    asked: NDArray[np.float32],
    truth: NDArray[np.int64],
    wanted: dict[int, float],
    most: int,
    kind: Score,
) -> tuple[tuple[Depth, ...], str]:
    """How to ask the graph so that each number of hits has its recall; and, where one cannot be served, why.

    Recall is that of the worse half: samples, or mixtures. For queries that are harder than both, more candidates are
    taken than were enough.
    """
    depths: list[Depth] = []
    short: list[str] = []
    labels = _ask(graph, asked, most, most)
    for k, least in wanted.items():
        # Where among the candidates each of the true best comes; `most` if it does not.
        match = labels[:, None, :] == truth[:, :k, None]
        places = np.where(match.any(axis=2), match.argmax(axis=2), most).reshape(2, -1)
        enough = int(np.sort(places, axis=1)[:, math.ceil(least * places.shape[1]) - 1].max()) + 1
        candidates = min(most, max(k, MARGIN * enough))
        reach = float(np.mean(places < candidates, axis=1).min())
        ef = candidates
        while True:
            ef *= 2
            found = (_ask(graph, asked, candidates, ef)[:, None, :] == truth[:, :k, None]).any(axis=2)
            recall = float(found.reshape(2, -1).mean(axis=1).min())
            if recall >= min((1 + least) / 2, reach) or ef >= max(DEEPEST, 8 * candidates):
                break
        depth = Depth(score=kind, k=k, candidates=candidates, ef=ef, recall=recall)
        if recall < least:
            short.append(f"{depth.name} is {recall:.3f} with {candidates} candidates, {least:g} is wanted")
        else:
            depths.append(depth)
    return tuple(depths), "; ".join(short)


def _ask(graph: hnswlib.Index, asked: NDArray[np.float32], k: int, ef: int) -> NDArray[np.int64]:
    graph.set_ef(ef)
    labels: NDArray[np.int64] = graph.knn_query(asked, k=k)[0].astype(np.int64)
    return labels


def _parts(trace: Store, slots: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The slots in parts whose gradients are few enough to be held as float32."""
    size = max(1, BLOCK // (len(trace.header.timesteps) * trace.header.dimension))
    for start in range(0, len(slots), size):
        yield slots[start : start + size]


def _check_ours(folder: Path) -> None:
    """Raises TraceError if something else is where the index belongs: it would be lost."""
    try:
        ours = not folder.exists() or {file.name for file in folder.iterdir()} <= {
            *NAMES,
            PRINCIPAL,
            EIGENVALUES,
            FACTS,
        }
    except OSError:
        ours = False
    if not ours or folder.is_symlink():
        raise TraceError(f"{folder} is where the index belongs, but is no index of dmin_trace. Move it away.")


def _write(folder: Path, facts: Facts, arrays: Mapping[str, NDArray[Any]], graph: hnswlib.Index | None = None) -> Facts:
    """Puts the index in its place, whole: what a killed build leaves has another name."""
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if graph is not None:
            graph.save_index(os.fspath(partial / GRAPH))
            if (partial / GRAPH).stat().st_size != graph.index_file_size():  # hnswlib says nothing of a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, numbers in arrays.items():
            numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tofile(partial / name)
        sizes = {file.name: File(bytes=file.stat().st_size, sha256=_sha256(file)) for file in sorted(partial.iterdir())}
        facts = replace(facts, files=sizes)
        (partial / FACTS).write_text(facts.to_json(), encoding="utf-8")
        sync_tree(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TraceError(f"{folder} cannot be written: {error.strerror or error}.") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return facts


def _read_facts(folder: Path) -> Facts:
    """What index.json says. Raises GraphError if it is damaged."""
    try:
        size = untrusted.size_within(folder, [FACTS])
        if size is None or size > LARGEST_FACTS:
            raise GraphError(f"it has no {FACTS} that can be read")
        return Facts.from_json((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphError(f"it has no {FACTS} that can be read ({error})") from None


def _fresh_facts(trace: Store, folder: Path) -> Facts:
    """What index.json says. Raises GraphError if it is damaged, or not of the store as it is."""
    facts = _read_facts(folder)
    header = trace.header
    if (facts.store, facts.projection) != (header.id, header.projection.fingerprint):
        raise GraphError("it is of another store")
    shape = (facts.samples, facts.timesteps, facts.dimension)
    if shape != (header.samples, len(header.timesteps), header.dimension) or facts.state != fingerprint(trace):
        raise GraphError("the store has changed since")
    files = {*(NAMES if facts.depths else ()), *((PRINCIPAL, EIGENVALUES) if facts.principal else ())}
    possible = facts.fold and header.dimension % facts.fold == 0 and facts.principal <= header.samples
    if not possible or set(facts.files) != files:
        raise GraphError(f"{FACTS} holds numbers that are out of range")
    return facts


def _opened(trace: Store, facts: Facts, folder: Path) -> Index:
    """The index whose facts are fresh. Raises GraphError if a file of it is not what was written."""
    usable = np.flatnonzero(trace.valid)
    # What a file may have for its size, before any is read.
    likely = graph_bytes(facts.length, len(usable), facts.m)
    largest = {
        GRAPH: 2 * likely + 2**16,
        SHARED: 4 * facts.timesteps * facts.directions * facts.dimension,
        COPIES: 16 * len(usable),
        ROWS: 4 * facts.samples,
    }
    for name, most in largest.items():
        _checked(folder, name, facts.files[name], most)
    shared = np.fromfile(folder / SHARED, "<f4").reshape(facts.timesteps, facts.directions, facts.dimension)
    copies = np.fromfile(folder / COPIES, "<i8").reshape(-1, 2).astype(np.int64)
    checksums = np.fromfile(folder / ROWS, "<u4")
    if len(checksums) != facts.samples:
        raise GraphError(f"{ROWS} holds {len(checksums)} checksums, expected {facts.samples}")
    linked = np.setdiff1d(usable, copies[:, 0])
    if not np.isin(copies[:, 0], usable).all() or not np.isin(copies[:, 1], linked).all():
        raise GraphError(f"{COPIES} names slots that cannot be ranked")
    if len(linked) + len(copies) != len(usable) or len(linked) != facts.vectors:
        raise GraphError(f"{COPIES} does not leave the {facts.vectors} slots that the graph holds")
    split = Split(shared, facts.fold)
    graph = load_graph(folder / GRAPH, split.length, linked, facts.m)
    return Index(trace, facts, split, graph, copies, checksums)


def _checked(folder: Path, name: str, written: File, most: int) -> Path:
    """A file of the index. Raises GraphError if it is not what was written, or larger than it can be."""
    path = folder / name
    try:
        size = untrusted.size_within(folder, [name])
    except ValueError as error:
        raise GraphError(str(error)) from None
    if size != written.bytes or size > most:
        raise GraphError(f"{name} is not of the size that was written")
    if _sha256(path) != written.sha256:
        raise GraphError(f"{name} is damaged")
    return path


def _unused(why: object) -> Unavailable:
    return Unavailable(f"the index is not used: {why}; make it anew with dmin-trace index")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _folded(rows: NDArray[np.float32], fold: int) -> NDArray[np.float32]:
    """Bins j, j + F, j + 2 F and so on added up."""
    folded: NDArray[np.float32] = rows.reshape(*rows.shape[:-1], -1, fold).sum(axis=-2)
    return folded
