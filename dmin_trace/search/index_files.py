"""The files of an index: their format, reading them strictly, and writing them whole or not at all.

    trace.index/      beside trace.zarr
      index.json      what was built, of which state of which store, and the recall that was measured
      graph.hnsw      the graph of hnswlib: a vector for each row that can be ranked and is no copy of another
      common.f32      (R, r, v) the directions that vectors keep apart (`index.Reduction`)
      copies.i64      (n, 2) rows whose stored numbers are those of another row, and that row; sorted by the latter
      rows.u32        (N,) the crc32c of each row's stored numbers, which checks a candidate without its whole chunk
      principal.f32   (R, r, v) the principal directions of deflated scores (`deflation`)
      eigenvalues.f64 (R, r) their eigenvalues

An index from anybody is used only if everything in it fits the store as it is now. Checksums find damage, not a
forgery: `hnsw` says what is checked against those.
"""

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError, brief
from dmin_trace.search.deflation import MAX_DIRECTIONS, Score
from dmin_trace.search.hnsw import Graph, GraphError
from dmin_trace.store import Store, digest, size_within, sync, sync_tree
from dmin_trace.store import index_beside as index_beside

FORMAT, VERSION = "dmin_trace.index", 1
MAX_FACTS_BYTES = 2**20
FACTS, GRAPH, COMMON, COPIES, CHECKSUMS = "index.json", "graph.hnsw", "common.f32", "copies.i64", "rows.u32"
PRINCIPAL, EIGENVALUES = "principal.f32", "eigenvalues.f64"
GRAPH_FILES, DIRECTION_FILES = {GRAPH, COMMON, COPIES, CHECKSUMS}, {PRINCIPAL, EIGENVALUES}

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**50)]
Part = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Depth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the graph is searched for up to k hits of a score: with ef vectors in view, for candidates that are scored
    exactly; recall is the part of the true k best that was found."""

    score: Score
    k: Count
    candidates: Count
    ef: Count
    recall: Part

    @property
    def name(self) -> str:
        """What the recall is of."""
        return f"recall@{self.k}" + ("" if self.score == "dmin" else f" of {self.score} scores")


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the index: its size and its SHA-256."""

    bytes: Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What index.json holds.

    store, state, projection: the store's id and state, and the fingerprint of its projection.
    vectors, m, ef_construction: how many vectors the graph holds, and how HNSW linked them.
    fold, directions: F and r of the vectors.
    target, queries: the recall that is wanted for the first 10 hits, and how many held-out samples measured it.
    depths, short: the numbers of hits that the graph serves, and why it serves less than it should; "" if it does not.
    timesteps: R, how many projected gradients a sample has: T, or fewer where timesteps are pooled.
    principal: how many principal directions of each timestep are kept for deflated scores.
    """

    format: str = FORMAT
    version: int = VERSION
    store: str
    state: str
    projection: str
    timesteps: Count
    dimension: Count
    samples: Count
    vectors: Count
    fold: Annotated[int, msgspec.Meta(ge=1, lt=2**50)]
    directions: Count
    m: Annotated[int, msgspec.Meta(ge=2, le=100)]
    ef_construction: Count
    target: Part
    queries: Count
    depths: tuple[Depth, ...]
    short: str
    principal: Annotated[int, msgspec.Meta(ge=0, le=MAX_DIRECTIONS)]
    files: dict[str, File]
    digest: str = ""

    def __post_init__(self) -> None:
        for depth in self.depths:
            if not depth.k <= depth.candidates <= min(depth.ef, self.vectors):
                raise ValueError(f"{depth.candidates} candidates do not fit {self.vectors} vectors or ef {depth.ef}")
        if self.dimension % self.fold:
            raise ValueError(f"fold {self.fold} does not divide dimension {self.dimension}")

    @property
    def length(self) -> int:
        """The numbers of a vector."""
        return self.timesteps * (self.fold + self.directions)

    @property
    def bytes(self) -> int:
        """The bytes of its files."""
        return sum(file.bytes for file in self.files.values())

    def depth(self, k: int, score: str = "dmin") -> Depth | None:
        """How the graph is searched for k hits of a score; None if it does not serve so many."""
        return next((depth for depth in self.depths if depth.k >= k and depth.score == score), None)

    def unserved(self, score: str) -> str:
        """Why the graph does not serve a score, or not more hits."""
        served = [depth.k for depth in self.depths if depth.score == score]
        if served:
            return f"the index serves up to {max(served)} hits"
        of = f" {score} scores" if self.depths else ""
        return f"the index does not serve{of}" + (f" ({self.short})" if self.short else "")

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The facts of an index.json. Raises GraphError if they are damaged, invalid or of another version."""
        try:
            written = msgspec.json.decode(text, type=dict[str, Any])
            if (written.get("format"), written.get("version")) != (FORMAT, VERSION):
                raise AnotherVersionError("it was written by another version of dmin_trace")
            facts = msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise GraphError(f"{FACTS} is not valid: {brief(str(error))[1:-1]}") from None
        if facts.digest != facts.own_digest:
            raise GraphError(f"{FACTS} is damaged")
        expected = (GRAPH_FILES if facts.depths else set()) | (DIRECTION_FILES if facts.principal else set())
        if set(facts.files) != expected or facts.principal > facts.samples:
            raise GraphError(f"{FACTS} names other files than such an index has")
        return facts

    @property
    def own_digest(self) -> str:
        """What `digest` is in index.json."""
        return digest({name: value for name, value in msgspec.to_builtins(self).items() if name != "digest"})


class AnotherVersionError(GraphError):
    """An index of another version of dmin_trace."""


@dataclass(frozen=True)
class Unavailable:
    """A store's index, or a part of it, that is not used; `reason` says why, "" if none was made."""

    reason: str

    @classmethod
    def because(cls, why: object) -> Self:
        """An index that was made, and is damaged or does not fit the store."""
        return cls(f"the index is not used: {why}; make it anew with dmin-trace index")


def read_facts(store: Store) -> Facts | Unavailable:
    """The facts of a store's index, if the store has not changed since the index was built. Reads index.json alone."""
    folder = index_beside(store.path)
    if not folder.is_dir():
        return Unavailable("")
    try:
        facts = _read_facts(folder)
    except GraphError as error:
        return Unavailable.because(error)
    return Unavailable.because(why) if (why := _misfit(facts, store)) else facts


def read_array(
    folder: Path, facts: Facts, name: str, dtype: str, shape: tuple[int, ...], *, mapped: bool = False
) -> NDArray[Any]:
    """The numbers of a file; -1 in a shape takes what the file has. Raises what `check_file` does, and ValueError for
    another shape."""
    most = math.prod(facts.samples if size < 0 else size for size in shape)
    file = check_file(folder, name, facts.files[name], most * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype, "r", shape=shape) if mapped else np.fromfile(file, dtype).reshape(shape)


def check_file(folder: Path, name: str, written: File, most: int) -> Path:
    """The path of a file. Raises GraphError if it is not what was written or larger than `most` bytes, ValueError if it
    is a link, OSError if it cannot be read."""
    size = size_within(folder, [name])
    if size != written.bytes or size > most:
        raise GraphError(f"{name} is not of the size that was written")
    if _sha256(folder / name) != written.sha256:
        raise GraphError(f"{name} is damaged")
    return folder / name


def damage(store: Store) -> tuple[list[tuple[str, str]], str]:
    """The damaged files of a store's index, each with what is wrong; and why the index is not used though no file may
    be damaged, "" if it is used or there is none."""
    folder = index_beside(store.path)
    if not folder.is_dir():
        return [], ""
    try:
        facts = _read_facts(folder)
    except AnotherVersionError as error:
        return [], str(error)
    except GraphError as error:
        return [(FACTS, str(error))], ""
    try:
        why = _misfit(facts, store)
    except TraceError:
        why = "the store is damaged"
    found: list[tuple[str, str]] = []
    for name, written in facts.files.items():
        try:
            check_file(folder, name, written, written.bytes)
        except (GraphError, OSError, ValueError) as error:
            found.append((name, str(error)))
    return found, why


def check_folder(folder: Path) -> None:
    """Raises TraceError if something else is where the index belongs: it would be lost."""
    try:
        names = {file.name for file in folder.iterdir()} if folder.exists() else set()
    except OSError:
        names = {""}
    if folder.is_symlink() or not names <= GRAPH_FILES | DIRECTION_FILES | {FACTS}:
        raise TraceError(f"{folder} is where the index belongs, but is no index of dmin_trace. Move it away.")


def write_index(folder: Path, facts: Facts, arrays: Mapping[str, NDArray[Any]], graph: "Graph | None") -> Facts:
    """Writes the files of an index and puts them in place of an older one, which a build that is killed leaves. Returns
    the facts with the sizes and checksums of the files. Raises TraceError if they cannot be written."""
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if graph is not None:
            graph.save_index(os.fspath(partial / GRAPH))
            if (partial / GRAPH).stat().st_size != graph.index_file_size():  # hnswlib does not report a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, numbers in arrays.items():
            numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tofile(partial / name)
        files = {file.name: File(bytes=file.stat().st_size, sha256=_sha256(file)) for file in sorted(partial.iterdir())}
        facts = msgspec.structs.replace(facts, files=files)
        signed = msgspec.structs.replace(facts, digest=facts.own_digest)
        (partial / FACTS).write_bytes(msgspec.json.format(msgspec.json.encode(signed)))
        sync_tree(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise TraceError(f"{folder} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _read_facts(folder: Path) -> Facts:
    try:
        size = size_within(folder, [FACTS])
        if size is None or size > MAX_FACTS_BYTES:
            raise GraphError(f"it has no {FACTS} that can be read")
        return Facts.from_json((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphError(f"it has no {FACTS} that can be read ({error})") from None


def _misfit(facts: Facts, store: Store) -> str:
    """Why an index is not of the store as it is now; "" if it is."""
    header = store.header
    if (facts.store, facts.projection) != (header.id, header.projection.fingerprint):
        return "it is of another store"
    shape = (facts.samples, facts.timesteps, facts.dimension)
    if shape != (header.samples, header.gradient_count, header.dimension) or facts.state != store.state:
        return "the store has changed since"
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
