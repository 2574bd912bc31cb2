"""Builds the index of a store: finds what deflated scores need, links the vectors, and measures the recall.

Calibration chooses the number of candidates and the fold by the recall that it measures for each score, with held-out
samples, and with mixtures of two of them: of all queries those come closest to a generated image, which lies between
many training samples and takes more candidates than a sample does (docs/performance.md). Where the recall cannot be
reached, the index keeps no graph, and queries scan all samples.
"""

import hashlib
import logging
import math
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from dmin_trace.errors import SettingsError, TraceError
from dmin_trace.search import deflation, index_files
from dmin_trace.search.deflation import Progress, Score
from dmin_trace.search.exact import Floats, Rows, exact_top_k, has_direction
from dmin_trace.search.hnsw import Graph, graph_bytes, make_graph
from dmin_trace.search.index import COMMON_DIRECTIONS, Reduction, common_directions
from dmin_trace.search.index_files import Depth, Facts
from dmin_trace.store import Store, row_checksum

logger = logging.getLogger(__name__)

RECALL_AT_100 = 0.95  # wanted of the 100 best; the recall of the 10 best is an argument
HELD_OUT_SAMPLES = 64  # that calibration uses as queries before they are in the graph
MAX_CALIBRATION_NUMBERS = 2**28  # of all calibration queries: fewer are held out where gradients are very long
MAX_CANDIDATES = 4096
ROWS_PER_CANDIDATE = 8  # at the least: of more candidates, scattered reads take about as long as the scan
MARGIN = 2  # times the candidates that were enough in calibration, for queries that are harder
MAX_EF = 2**12
"""The largest ef, unless eight times the candidates is more. Among a million vectors that lie close a graph is left
early; 20 candidates then need an ef of thousands, which takes milliseconds."""
LINKED_NUMBERS = 2**22  # numbers of gradients that are converted to float32 at a time
STORE_PART = 0.05  # of the store's size, within which an automatic fold begins
MIN_FOLDED_NUMBERS, MAX_FOLDED_NUMBERS = 256, 5120  # R F of a vector, where an automatic fold begins and ends


def build_index(
    store: Store,
    *,
    recall: float = 0.99,
    fold: int | None = None,
    m: int = 16,
    ef_construction: int = 200,
    directions: int | None = None,
    progress: Progress | None = None,
) -> Facts:
    """Builds a store's index, measures its recall, and puts it beside the store in place of an older one.

    Args:
        recall: the part of the true 10 best that is to be found; of the 100 best it is 0.95.
        fold: F, a divisor of v; if not given, as small as the recall allows.
        m: links of a vector, 2 to 100.
        ef_construction: how many vectors are in view when one is linked.
        directions: how many are kept for deflated scores, 0 for none; if not given, as in `principal_directions`.

    Raises SettingsError if an argument is out of range or the vectors do not fit into memory; TraceError if the store
    is unfinished or damaged, or the index cannot be written.
    """
    progress = progress or (lambda what, done, of: None)
    if not 0 < recall <= 1:
        raise SettingsError(f"recall is {recall}; expected more than 0, and 1 at most.")
    if not 2 <= m <= 100:
        raise SettingsError(f"M is {m}; expected 2 to 100.")
    if not m <= ef_construction <= 10_000:
        raise SettingsError(f"ef_construction is {ef_construction}; expected {m} (M) to 10000.")
    header, folds = store.header, possible_folds(store, fold, m)
    if not store.complete:
        raise TraceError(f"{store.path} is unfinished. Finish the capture before it is indexed.")
    folder = index_files.index_beside(store.path)
    index_files.check_folder(folder)
    _check_graph_memory(store, folds[0], m)

    kept, copies, checksums = _distinct_rows(store, progress)
    fitting = max(8, MAX_CALIBRATION_NUMBERS // (2 * header.gradient_count * header.dimension))
    held = kept[np.linspace(0, len(kept) - 1, min(HELD_OUT_SAMPLES, fitting, len(kept) // 4)).astype(np.int64)]
    linked = np.setdiff1d(kept, held)
    most = min(MAX_CANDIDATES, len(linked) // ROWS_PER_CANDIDATE)
    wanted = {k: part for k, part in ((10, recall), (100, RECALL_AT_100)) if k <= most}
    principal = None
    arrays: dict[str, NDArray[Any]] = {}
    if directions != 0 and len(kept):
        needed = deflation.directions_memory(store, directions)
        _check_memory(needed, "Finding the principal directions", "Give a smaller --directions, or 0 for none.")
        principal = deflation.principal_directions(store, directions, progress)
        arrays = {index_files.PRINCIPAL: principal.vectors, index_files.EIGENVALUES: principal.eigenvalues}
    tried, short, graph = folds[0], f"{len(kept)} samples are few enough to scan", None
    depths: list[Depth] = []
    if wanted:
        queries: dict[Score, Floats] = {"dmin": _with_mixtures(store.gradients(held))}
        if principal is not None:
            queries["deflated"] = principal.deflate(queries["dmin"])
        truth = {score: _true_best(store, of, held, copies, max(wanted), progress) for score, of in queries.items()}
        common = common_directions(store, kept)
        for tried in folds:
            _check_graph_memory(store, tried, m)
            reduction = Reduction(common, tried)
            graph = make_graph(reduction.length, len(kept), m, ef_construction)
            _link(graph, store, reduction, linked, progress)
            depths, failed = [], {}
            for score, of in queries.items():
                served, failed[score] = _calibrate(graph, reduction.vectors(of), truth[score], wanted, most, score)
                depths += served
            short = "; ".join(filter(None, failed.values()))
            logger.info("fold %d: %s %s", tried, depths, short)
            # The paper's score decides: longer vectors cost every query, and what the graph cannot serve is scanned.
            if not failed["dmin"]:
                break
        if depths:
            _link(graph, store, reduction, held, progress)
            arrays |= {index_files.COMMON: common, index_files.COPIES: copies, index_files.CHECKSUMS: checksums}
    facts = Facts(
        store=header.id,
        state=store.state,
        projection=header.projection.fingerprint,
        timesteps=header.gradient_count,
        dimension=header.dimension,
        samples=header.samples,
        vectors=len(kept),
        fold=tried,
        directions=COMMON_DIRECTIONS,
        m=m,
        ef_construction=ef_construction,
        target=recall,
        queries=len(held),
        depths=tuple(depths),
        short=short,
        principal=0 if principal is None else principal.eigenvalues.shape[1],
        files={},
    )
    return index_files.write_index(folder, facts, arrays, graph if depths else None)


def possible_folds(store: Store, fold: int | None, m: int) -> list[int]:
    """The folds to try, one after another. Raises SettingsError if the given one does not divide v."""
    header = store.header
    v, timesteps = header.dimension, header.gradient_count
    if fold is not None:
        if fold < 1 or v % fold:
            raise SettingsError(f"fold is {fold}; expected a divisor of the store's dimension {v}, such as {v // 2}.")
        return [fold]
    row_bytes = timesteps * v * np.dtype(header.dtype).itemsize
    room = STORE_PART * row_bytes * header.samples - 4 * timesteps * COMMON_DIRECTIONS * v
    halves = [v >> n for n in reversed(range((v & -v).bit_length()))]
    folds = [f for f in halves if timesteps * f <= MAX_FOLDED_NUMBERS] or halves[:1]
    # The largest fold within the room: more numbers in a vector need fewer candidates.
    small = [f for f in folds if _graph_memory(store, f, m) <= room or timesteps * f < 2 * MIN_FOLDED_NUMBERS]
    return folds[folds.index(max([folds[0], *small])) :]


def _with_mixtures(gradients: Floats) -> Floats:
    """(2 n, T, v) the gradients of n samples, and n mixtures of two of them."""
    mixed = gradients + np.roll(gradients, len(gradients) // 2, axis=0)
    norm = np.linalg.norm(mixed, axis=2, keepdims=True)
    return np.concatenate([gradients, mixed / np.where(norm > 0, norm, 1)])


def _true_best(store: Store, queries: Floats, held: Rows, copies: Rows, k: int, progress: Progress) -> Rows:
    """(queries, k) the best of all rows but the held-out ones, by the exact scan; a copy counts as its original."""
    samples = store.header.samples
    original = np.arange(samples)
    original[copies[:, 0]] = copies[:, 1]
    left_out = np.isin(original, held)
    most = min(k + int(left_out.sum()), store.valid_count)
    scanned = "scanning for the true best"
    ranking = exact_top_k(store, queries, most, progress=lambda done: progress(scanned, done, samples))
    return np.stack([original[rows[~left_out[rows]][:k]] for rows in ranking.rows])


def _calibrate(
    graph: Graph, vectors: Floats, truth: Rows, wanted: dict[int, float], most: int, score: Score
) -> tuple[list[Depth], str]:
    """How deep the graph is searched for each number of hits; and, where its recall is not reached, why. The truth
    (2 n, k) are the true best of vectors (2 n, length); recall is that of the worse half, samples or mixtures."""
    depths, short = [], []
    labels = _nearest(graph, vectors, most, most)
    for k, least in wanted.items():
        # The place of each of the true best among the candidates; `most` if it is not there.
        match = labels[:, None, :] == truth[:, :k, None]
        places = np.where(match.any(axis=2), match.argmax(axis=2), most).reshape(2, -1)
        enough = int(np.sort(places, axis=1)[:, math.ceil(least * places.shape[1]) - 1].max()) + 1
        candidates = min(most, max(k, MARGIN * enough))
        reach = float(np.mean(places < candidates, axis=1).min())
        ef, recall = candidates, -1.0
        while recall < min((1 + least) / 2, reach) and ef < max(MAX_EF, 8 * candidates):
            ef *= 2
            found = (_nearest(graph, vectors, candidates, ef)[:, None, :] == truth[:, :k, None]).any(axis=2)
            recall = float(found.reshape(2, -1).mean(axis=1).min())
        depth = Depth(score=score, k=k, candidates=candidates, ef=ef, recall=recall)
        if recall < least:
            short.append(f"{depth.name} is {recall:.3f} with {candidates} candidates, {least:g} is wanted")
        else:
            depths.append(depth)
    return depths, "; ".join(short)


def _nearest(graph: Graph, vectors: Floats, k: int, ef: int) -> Rows:
    graph.set_ef(ef)
    return np.asarray(graph.knn_query(vectors, k=k)[0], np.int64)


def _graph_memory(store: Store, fold: int, m: int) -> int:
    return graph_bytes(store.header.gradient_count * (fold + COMMON_DIRECTIONS), store.header.samples, m)


def _check_graph_memory(store: Store, fold: int, m: int) -> None:
    vectors = f"{store.header.samples:,} samples of {store.header.gradient_count} x {fold:,} float32 numbers"
    _check_memory(_graph_memory(store, fold, m), f"The index ({vectors}, and links)", "Give a smaller --fold.")


def _check_memory(needed: int, what: str, what_to_do: str) -> None:
    """Raises SettingsError if so many bytes are not free."""
    if needed > (free := psutil.virtual_memory().available):
        sizes = f"{needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free"
        raise SettingsError(f"{what} needs {sizes}. {what_to_do}")


def _distinct_rows(store: Store, progress: Progress) -> tuple[Rows, Rows, NDArray[np.uint32]]:
    """The rows that the graph holds; (n, 2) the others that can be ranked, each with the row that it copies, sorted by
    that; and (N,) the checksums of all rows. In the graph many copies would be linked to each other alone."""
    firsts: dict[bytes, int] = {}
    copies: list[tuple[int, int]] = []
    checksums = np.zeros(store.header.samples, np.uint32)
    for chunk in store.chunks_done:
        rows = store.header.rows(chunk)
        numbers = store.numbers_of(chunk)
        valid = has_direction(numbers.norm)
        for values, scale, usable, row in zip(store.grad_chunk(chunk), numbers.scale, valid, rows, strict=True):
            checksums[row] = row_checksum(values)
            if usable:
                content = hashlib.blake2b(scale.tobytes(), digest_size=16)
                content.update(values.data)
                first = firsts.setdefault(content.digest(), row)
                if first != row:
                    copies.append((row, first))
        progress("looking for copies", rows.stop, store.header.samples)
    found = np.array(copies, np.int64).reshape(-1, 2)
    return np.array(list(firsts.values()), np.int64), found[np.argsort(found[:, 1], kind="stable")], checksums


def _link(graph: Graph, store: Store, reduction: Reduction, rows: Rows, progress: Progress) -> None:
    """Adds the vectors of these rows to the graph."""
    for here in deflation.row_blocks(store, rows, LINKED_NUMBERS):
        graph.add_items(reduction.vectors(store.gradients(rows[here])), rows[here])
        progress(f"linking vectors of {reduction.length:,} numbers", here.stop, len(rows))
