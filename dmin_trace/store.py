"""The Zarr store: create, write, resume, open, map.

One Zarr v3 group. Rows are slots; slot -> dataset index is the array `sample`. Each process owns whole chunks of R
slots, writes each once, and marks it done last: grad, scale, norm, loss, sample, meta; fsync; done. Readers go by
`done`, never by fill values, and a resumed capture writes every chunk that is not done anew.

Random projections do not compress, so chunks are stored raw with a crc32c behind them: the file of a chunk is the
C-order array and 4 bytes, ordinary Zarr for every other reader, and read by memory map here.

    trace.zarr/   attributes: the Header, and complete
      grad    (N, T, v) int8 | float16 | float32     chunks (R, T, v)
      scale   (N, T) float32, for int8               norm, loss  (N, T) float32
      sample  (N,) int64                             done  (ceil(N / R),) uint8, one a chunk
      meta/   a column each, (N,): string, int64 or float64

A store can come from anybody: nothing in it is executed, no path is taken from it, and its shapes are checked against
the files before anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import TraceError
from dmin_trace.settings import LARGEST_DIMENSION, MOST_TIMESTEPS, Dtype, Projection

if TYPE_CHECKING:
    import zarr

FORMAT = "dmin_trace"
VERSION = 1
CHUNK_BYTES = 2**24
MOST_SAMPLES = 2**40
LARGEST_METADATA = 2**28
TRAILER = 4
"""Bytes of crc32c behind each chunk."""

ColumnKind = Literal["string", "integer", "number"]
Array = NDArray[Any]

_INTS: dict[ColumnKind, str] = {"string": "string", "integer": "int64", "number": "float64"}


@dataclass(frozen=True, kw_only=True)
class ProjectionFacts:
    """How gradients were compressed; see `compress.Plan`."""

    kind: Projection
    seed: int
    length: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ParameterFacts:
    """What a gradient's elements belong to."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class NoiseFacts:
    """What the loop body drew: for each slot its random calls, name and shape, in order."""

    seed: int
    draws: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of a capture before its first chunk is written; the group's attributes.

    id: 32 hexadecimal digits, the store's name in the user's own records.
    samples: N.
    timesteps: as the denoiser saw them.
    dimension, dtype, chunk_rows: v, how a number is stored, R.
    weights: fingerprint of the trained parameters.
    batch: shapes of the image-like tensors of a batch of one sample.
    columns: the readable columns and their kinds.
    settings: the capture's settings, as JSON.
    writers: versions of the packages that wrote the store.
    """

    id: str
    samples: int
    timesteps: tuple[float, ...]
    dimension: int
    dtype: Dtype
    chunk_rows: int
    projection: ProjectionFacts
    parameters: ParameterFacts
    weights: str
    noise: NoiseFacts
    precondition: str
    batch: dict[str, tuple[int, ...]]
    columns: dict[str, ColumnKind]
    settings: dict[str, Any]
    writers: dict[str, str]

    @property
    def chunks(self) -> int:
        """How many chunks of rows there are."""
        return -(-self.samples // self.chunk_rows)

    def rows(self, chunk: int) -> range:
        """The slots of a chunk; the last one may be short."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.samples))


def choose_chunk_rows(samples: int, timesteps: int, dimension: int, dtype: Dtype, processes: int = 1) -> int:
    """R: a power of two, for chunks of about 16 MiB, and such that every process has one."""
    fitting = max(1, CHUNK_BYTES // (timesteps * dimension * np.dtype(dtype).itemsize))
    return int(2 ** math.floor(math.log2(max(1, min(fitting, samples // processes)))))


def check_free(path: Path) -> None:
    """Raises TraceError if something is at `path` already, or if nothing could be written there."""
    if path.exists():
        raise TraceError(
            f"{path} exists already and belongs to another run. Give another path (out, --out), or move it away."
        )
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise TraceError(f"{path} cannot be written: {parent} is no folder that this user may write to.")


def create(path: Path, header: Header) -> Writer:
    """Makes an empty store, whole or not at all.

    Raises TraceError if something is there already, or if the folder cannot be written.
    """
    check_free(path)
    partial = path.with_name(f".{path.name}.{header.id}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet_zarr():
            _create_arrays(partial, header)
        _sync_tree(partial)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TraceError(f"{path} cannot be written: {error.strerror or error}.") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Writer(path, header)


def resume(path: Path, header: Header) -> Writer:
    """Opens an unfinished store of the same capture, to write what is not done.

    Raises TraceError if the store is not of the same capture; id and writers may differ.
    """
    trace = open_trace(path, unfinished=True)
    for field in fields(Header):
        found, expected = getattr(trace.header, field.name), getattr(header, field.name)
        if field.name not in ("id", "writers") and found != expected:
            raise TraceError(
                f"{path} belongs to another capture: its {field.name} is {_short(found)}, that of this run is "
                f"{_short(expected)}. Give another path (--out), or move it away."
            )
    return Writer(path, trace.header)


class Writer:
    """Writes a store's chunks, each once and whole."""

    def __init__(self, path: Path, header: Header) -> None:
        """For a store that exists; made by `create` and `resume`."""
        self.path = path
        self.header = header

    def pending(self) -> list[int]:
        """The chunks that are not done."""
        return [chunk for chunk, done in enumerate(_read_done(self.path, self.header)) if not done]

    def write(
        self,
        chunk: int,
        grad: Array,
        norm: Array,
        loss: Array,
        sample: Array,
        columns: Mapping[str, Sequence[str | int | float]],
    ) -> None:
        """Writes one chunk and marks it done.

        Args:
            chunk: its number.
            grad: (n, T, v) float32, the compressed gradients; n is R, or less in the last chunk.
            norm, loss: (n, T) float32.
            sample: (n,) int64, the dataset indices.
            columns: n values for each of the header's columns.

        Raises:
            TraceError: the shapes are not those of the chunk, or the disk does not take it.
        """
        header = self.header
        slots = header.rows(chunk)
        expected = (len(slots), len(header.timesteps), header.dimension)
        if (
            grad.shape != expected
            or norm.shape != expected[:2]
            or loss.shape != expected[:2]
            or len(sample) != expected[0]
        ):
            raise TraceError(f"Chunk {chunk} was given gradients of shape {grad.shape}; expected {expected}.")
        values, scale = quantise(np.ascontiguousarray(grad, np.float32), header.dtype)
        arrays: dict[str, Array] = {"grad": values, "norm": norm, "loss": loss, "sample": sample}
        if header.dtype == "int8":
            arrays["scale"] = scale
        arrays |= {f"meta/{name}": _as_array(columns[name], kind) for name, kind in header.columns.items()}
        where = slice(slots.start, slots.stop)
        try:
            with _quiet_zarr():
                group = _open_group(self.path, "r+")
                for name in sorted(arrays, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
                    _array(group, name)[where] = arrays[name]
                    _sync(chunk_file(self.path, name, chunk, arrays[name].ndim))
                    _sync(chunk_file(self.path, name, chunk, arrays[name].ndim).parent)
                _array(group, "done")[chunk] = 1
            _sync(chunk_file(self.path, "done", chunk, 1))
            _sync(self.path / "done" / "c")
        except OSError as error:
            raise TraceError(
                f"Chunk {chunk} of {self.path} cannot be written: {error.strerror or error}. Make room and run the "
                "capture again on demand (dmin-trace capture); what is done is kept."
            ) from None

    def finish(self) -> None:
        """Marks the store complete. Raises TraceError if a chunk is not done."""
        if pending := self.pending():
            raise TraceError(f"{self.path} is unfinished: {len(pending)} of {self.header.chunks} chunks are not done.")
        metadata = self.path / "zarr.json"
        facts = json.loads(metadata.read_text(encoding="utf-8"))
        facts["attributes"]["complete"] = True
        partial = metadata.with_name(".zarr.json.partial")
        partial.write_text(json.dumps(facts), encoding="utf-8")
        _sync(partial)
        partial.replace(metadata)
        _sync(self.path)


class Trace:
    """A store opened for reading."""

    def __init__(self, path: Path, header: Header, complete: bool, done: NDArray[np.bool_]) -> None:
        """Made by `open_trace`."""
        self.path = path
        self.header = header
        self.complete = complete
        self.done = done

    @property
    def chunks_done(self) -> list[int]:
        """The numbers of the chunks that are done."""
        return [int(chunk) for chunk in np.flatnonzero(self.done)]

    @property
    def slots_done(self) -> NDArray[np.int64]:
        """The slots that lie in chunks that are done, in order."""
        return np.array([slot for chunk in self.chunks_done for slot in self.header.rows(chunk)], np.int64)

    @cached_property
    def sample(self) -> NDArray[np.int64]:
        """(N,) the dataset index of each slot; -1 in chunks that are not done."""
        return np.where(self._row_done, self._small("sample", np.int64), -1)

    @cached_property
    def norm(self) -> NDArray[np.float32]:
        """(N, T) the L2 norm of each gradient before it was divided out; NaN in chunks that are not done."""
        return np.where(self._row_done[:, None], self._small("norm", np.float32), np.nan).astype(np.float32)

    @cached_property
    def loss(self) -> NDArray[np.float32]:
        """(N, T) the script's loss; NaN in chunks that are not done."""
        return np.where(self._row_done[:, None], self._small("loss", np.float32), np.nan).astype(np.float32)

    @cached_property
    def rankable(self) -> NDArray[np.bool_]:
        """(N,) whether a slot is done and all its gradients have a direction: finite, and not zero."""
        return (np.isfinite(self.norm) & (self.norm > 0)).all(axis=1)

    def column(self, name: str) -> list[Any]:
        """The N values of a readable column. Raises TraceError if there is none of this name."""
        if name not in self.header.columns:
            raise TraceError(f"{self.path} has no column {name}; it has {', '.join(self.header.columns) or 'none'}.")
        with _quiet_zarr():
            values: list[Any] = np.asarray(_array(_open_group(self.path, "r"), f"meta/{name}")[:]).tolist()
        return values

    def slot_of(self, sample: int) -> int:
        """The slot of a dataset index. Raises TraceError if the store does not hold it."""
        found = np.flatnonzero(self.sample == sample)
        if sample < 0 or not found.size:
            raise TraceError(
                f"{self.path} holds no sample {sample}; its samples are {self.sample[self._row_done].min(initial=0)} to "
                f"{self.sample.max(initial=-1)}."
            )
        return int(found[0])

    def grad_chunk(self, chunk: int) -> Array:
        """The stored numbers of a chunk that is done, (n, T, v), mapped from its file.

        Raises TraceError if the file is missing or not as long as it must be.
        """
        header = self.header
        shape = (header.chunk_rows, len(header.timesteps), header.dimension)
        return self._mapped("grad", chunk, np.dtype(header.dtype), shape)[: len(header.rows(chunk))]

    def scale_chunk(self, chunk: int) -> NDArray[np.float32]:
        """The scales of a chunk of an int8 store, (n, T); ones for other stores."""
        header = self.header
        rows = len(header.rows(chunk))
        if header.dtype != "int8":
            return np.ones((rows, len(header.timesteps)), np.float32)
        shape = (header.chunk_rows, len(header.timesteps))
        return np.array(self._mapped("scale", chunk, np.dtype(np.float32), shape)[:rows])

    def rows(self, slots: Array) -> NDArray[np.float32]:
        """The compressed gradients of these slots, (n, T, v) float32.

        Raises TraceError for a slot in a chunk that is not done.
        """
        header = self.header
        found = np.empty((len(slots), len(header.timesteps), header.dimension), np.float32)
        chunks = np.asarray(slots) // header.chunk_rows
        for chunk in np.unique(chunks):
            if not self.done[chunk]:
                raise TraceError(f"{self.path} is unfinished: chunk {chunk} is not done.")
            here = np.flatnonzero(chunks == chunk)
            places = np.asarray(slots)[here] - chunk * header.chunk_rows
            grad, scale = self.grad_chunk(int(chunk)), self.scale_chunk(int(chunk))
            found[here] = grad[places].astype(np.float32) * scale[places][:, :, None]
        return found

    @cached_property
    def bytes(self) -> int:
        """The size of all files of the store."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @cached_property
    def _row_done(self) -> NDArray[np.bool_]:
        return np.repeat(self.done, self.header.chunk_rows)[: self.header.samples]

    def _small(self, name: str, dtype: type) -> Array:
        shape = () if name == "sample" else (len(self.header.timesteps),)
        values = np.zeros((self.header.samples, *shape), dtype)
        for chunk in self.chunks_done:
            rows = self.header.rows(chunk)
            values[rows.start : rows.stop] = self._mapped(
                name, chunk, np.dtype(dtype), (self.header.chunk_rows, *shape)
            )[: len(rows)]
        return values

    def _mapped(self, name: str, chunk: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        if not self.done[chunk]:
            raise TraceError(f"{self.path} is unfinished: chunk {chunk} is not done.")
        file = chunk_file(self.path, name, chunk, len(shape))
        expected = math.prod(shape) * dtype.itemsize + TRAILER
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise TraceError(
                f"{self.path} is damaged: chunk {chunk} of {name} has {size} bytes, expected {expected}. Restore the "
                "file, or capture again."
            )
        return np.memmap(file, dtype=dtype.newbyteorder("<"), mode="r", shape=shape)


def open_trace(path: str | os.PathLike[str], *, unfinished: bool = False) -> Trace:
    """Opens a store for reading.

    Args:
        path: the store.
        unfinished: open it even if the capture has not finished; what is done can be read.

    Raises:
        TraceError: no such store, none of dmin_trace's, one of another version, an unfinished or a damaged one.
    """
    path = Path(path)
    metadata = path / "zarr.json"
    if not path.exists():
        raise TraceError(f"There is no store at {path}.")
    if not metadata.is_file():
        raise TraceError(f"{path} is not a trace: it has no zarr.json. Give the folder that a capture wrote.")
    if metadata.stat().st_size > LARGEST_METADATA:
        raise TraceError(f"{metadata} has {metadata.stat().st_size} bytes; expected at most {LARGEST_METADATA}.")
    try:
        facts = json.loads(metadata.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        raise TraceError(f"{metadata} cannot be read as JSON; the store is damaged.") from None
    attributes = facts.get("attributes") if isinstance(facts, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise TraceError(f"{path} is a Zarr store, but not a trace of dmin_trace.")
    if attributes.get("version") != VERSION:
        raise TraceError(
            f"{path} is of version {_short(attributes.get('version'))}; expected {VERSION}. Read it with the dmin_trace "
            "that wrote it, or capture again."
        )
    header = header_from(attributes, path)
    complete = attributes.get("complete") is True
    done = _read_done(path, header)
    if not unfinished and not (complete and done.all()):
        raise TraceError(
            f"{path} is unfinished: {int(done.sum())} of {header.chunks} chunks are done. Finish it with the command "
            "that made it: dmin-trace capture --weights DIR -- SCRIPT ARGS."
        )
    return Trace(path, header, complete and bool(done.all()), done)


def quantise(grad: NDArray[np.float32], dtype: Dtype) -> tuple[Array, NDArray[np.float32]]:
    """Turns sketches (n, T, v) into what is stored, and their scales (n, T).

    int8 is the number over the scale, the largest magnitude of its (sample, timestep) over 127. A row that is not
    finite is stored as zeros; its norm says that it is not to be ranked.
    """
    finite = np.isfinite(grad).all(axis=2)
    if not finite.all():
        grad = np.where(finite[:, :, None], grad, 0)
    scale = np.ones(grad.shape[:2], np.float32)
    if dtype != "int8":
        return grad.astype(dtype), scale
    scale = (np.abs(grad).max(axis=2) / 127).astype(np.float32)
    return np.rint(grad / np.where(scale > 0, scale, 1)[:, :, None]).clip(-127, 127).astype(np.int8), scale


def chunk_file(path: Path, name: str, chunk: int, axes: int) -> Path:
    """The file of a chunk of rows, by Zarr v3's default key encoding."""
    return path.joinpath(*name.split("/"), "c", str(chunk), *["0"] * (axes - 1))


def header_from(attributes: Mapping[str, Any], path: Path) -> Header:
    """The header in a group's attributes, every value checked. Raises TraceError that names the first that is wrong."""
    reader = _Attributes(attributes, str(path))
    projection, parameters, noise = (reader.inside(name) for name in ("projection", "parameters", "noise"))
    timesteps = tuple(float(t) for t in reader.listed("timesteps", (int, float), MOST_TIMESTEPS))
    if not timesteps or not all(math.isfinite(t) for t in timesteps):
        raise reader.wrong("timesteps", "finite numbers, one at least")
    header = Header(
        id=reader.text("id", r"[0-9a-f]{32}"),
        samples=reader.number("samples", 1, MOST_SAMPLES),
        timesteps=timesteps,
        dimension=reader.number("dimension", 1, LARGEST_DIMENSION),
        dtype=reader.choice("dtype", get_args(Dtype)),
        chunk_rows=reader.number("chunk_rows", 1, MOST_SAMPLES),
        projection=ProjectionFacts(
            kind=projection.choice("kind", get_args(Projection)),
            seed=projection.number("seed", 0, 2**32 - 1),
            length=projection.number("length", 1, 2**62),
            fingerprint=projection.text("fingerprint", r"[0-9a-f]{64}"),
        ),
        parameters=ParameterFacts(
            names=tuple(parameters.listed("names", (str,), 10**6)),
            shapes=tuple(parameters.shape("shapes", shape) for shape in parameters.listed("shapes", (list,), 10**6)),
            fingerprint=parameters.text("fingerprint", r"[0-9a-f]{64}"),
        ),
        weights=reader.text("weights", r"[0-9a-f]{64}"),
        noise=NoiseFacts(
            seed=noise.number("seed", 0, 2**32 - 1),
            draws=tuple(noise.calls(slot) for slot in noise.listed("draws", (list,), MOST_TIMESTEPS)),
        ),
        precondition=reader.text("precondition", r"[a-z_]{1,40}"),
        batch={name: reader.shape("batch", shape) for name, shape in reader.mapping("batch", list).items()},
        columns={name: _column_kind(reader, kind) for name, kind in reader.mapping("columns", str).items()},
        settings=reader.mapping("settings", object),
        writers=reader.mapping("writers", str),
    )
    for name in header.columns:
        # A column's name is a folder's name in meta/.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_ .-]{0,99}", name):
            raise reader.wrong("columns", "names of letters, digits, '_', '-', '.' and spaces")
    if len(header.noise.draws) != len(timesteps):
        raise reader.wrong("noise", f"draws for each of the {len(timesteps)} timesteps")
    return header


def facts(trace: Trace) -> list[tuple[str, str]]:
    """What `dmin-trace info` shows of a store: names and values."""
    header, rows = trace.header, len(trace.slots_done)
    sketch = len(header.timesteps) * header.dimension * np.dtype(header.dtype).itemsize
    whole = len(header.timesteps) * header.projection.length * 4
    state = "complete" if trace.complete else f"unfinished: {int(trace.done.sum())} of {header.chunks} chunks are done"
    without = rows - int(trace.rankable.sum())
    shown = [
        ("samples", f"{rows:,} of {header.samples:,}; {state}"),
        ("timesteps", f"{len(header.timesteps)}: {', '.join(f'{t:g}' for t in header.timesteps)}"),
        ("gradient", f"{header.projection.length:,} numbers in {len(header.parameters.names):,} tensors"),
        ("compressed", f"to {header.dimension:,} numbers of {header.dtype}, projection {header.projection.kind}"),
        ("a sample", f"{sketch:,} bytes; {whole / sketch:,.0f} times smaller than its gradients in float32"),
        ("the store", f"{trace.bytes:,} bytes in {header.chunks} chunks of {header.chunk_rows} samples"),
        ("precondition", header.precondition),
        ("seed", f"{header.projection.seed} (projection), {header.noise.seed} (noise)"),
        ("the script draws", _calls(header.noise.draws[0])),
        ("columns", ", ".join(header.columns) or "none"),
        ("weights", header.weights[:16]),
        ("id", header.id),
        ("written by", ", ".join(f"{name} {version}" for name, version in header.writers.items())),
    ]
    if without:
        shown.insert(1, ("without direction", f"{without:,} samples have a zero or non-finite gradient; never ranked"))
    return shown


class _Attributes:
    """Reads attributes that anybody may have written: each is checked, and a wrong one is named."""

    def __init__(self, values: Mapping[str, Any], path: str, prefix: str = "") -> None:
        self._values, self._path, self._prefix = values, path, prefix

    def wrong(self, name: str, expected: str) -> TraceError:
        found = _short(self._values.get(name, "missing"))
        return TraceError(
            f"{self._path} is damaged: its attribute {self._prefix}{name} is {found}; expected {expected}."
        )

    def number(self, name: str, least: int, most: int) -> int:
        value = self._values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def text(self, name: str, pattern: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self.wrong(name, f"text like {pattern}")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> Any:
        value = self._values.get(name)
        if value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def listed(self, name: str, kinds: tuple[type, ...], most: int) -> list[Any]:
        value = self._values.get(name)
        if (
            not isinstance(value, list)
            or len(value) > most
            or not all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
        ):
            raise self.wrong(name, f"a list of at most {most}")
        return value

    def mapping(self, name: str, kind: type) -> dict[str, Any]:
        value = self._values.get(name)
        if not isinstance(value, dict) or not all(isinstance(item, kind) for item in value.values()):
            raise self.wrong(name, "names and values")
        return value

    def inside(self, name: str) -> _Attributes:
        return _Attributes(self.mapping(name, object), self._path, f"{self._prefix}{name}.")

    def shape(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
            raise self.wrong(name, "shapes")
        return tuple(value)

    def calls(self, slot: list[Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        if not all(isinstance(call, list) and len(call) == 2 and isinstance(call[0], str) for call in slot):
            raise self.wrong("draws", "names and shapes")
        return tuple((call[0], self.shape("draws", call[1])) for call in slot)


_ORDER = ("grad", "scale", "norm", "loss", "sample")


def _column_kind(reader: _Attributes, kind: str) -> ColumnKind:
    for known in get_args(ColumnKind):
        if kind == known:
            return known  # type: ignore[no-any-return]
    raise reader.wrong("columns", f"kinds {', '.join(get_args(ColumnKind))}")


def _create_arrays(path: Path, header: Header) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec

    count, slots, rows = header.samples, len(header.timesteps), header.chunk_rows
    attributes = {"format": FORMAT, "version": VERSION, **asdict(header), "complete": False}
    group = zarr.create_group(path, zarr_format=3, attributes=json.loads(json.dumps(attributes)))
    shapes: dict[str, tuple[tuple[int, ...], str, tuple[int, ...]]] = {
        "grad": ((count, slots, header.dimension), header.dtype, (rows, slots, header.dimension)),
        "norm": ((count, slots), "float32", (rows, slots)),
        "loss": ((count, slots), "float32", (rows, slots)),
        "sample": ((count,), "int64", (rows,)),
        "done": ((header.chunks,), "uint8", (1,)),
    }
    if header.dtype == "int8":
        shapes["scale"] = ((count, slots), "float32", (rows, slots))
    shapes |= {f"meta/{name}": ((count,), _INTS[kind], (rows,)) for name, kind in header.columns.items()}
    for name, (shape, dtype, chunks) in shapes.items():
        group.create_array(
            name, shape=shape, dtype=dtype, chunks=chunks, compressors=[Crc32cCodec()], fill_value=_fill(name, dtype)
        )


def _fill(name: str, dtype: str) -> Any:
    if name == "done" or dtype == "int8":
        return 0
    if dtype == "string":
        return ""
    return -1 if dtype == "int64" else float("nan")


def _as_array(values: Sequence[str | int | float], kind: ColumnKind) -> Array:
    if kind == "string":
        # Lone surrogates cannot be written as UTF-8.
        texts = [str(value).encode("utf-8", "replace").decode("utf-8") for value in values]
        return np.array(texts, dtype=np.dtypes.StringDType())
    return np.array(values, dtype=_INTS[kind])


def _open_group(path: Path, mode: Literal["r", "r+"]) -> zarr.Group:
    import zarr

    return zarr.open_group(path, mode=mode, zarr_format=3)


def _array(group: zarr.Group, name: str) -> Any:
    return group[name]


def _read_done(path: Path, header: Header) -> NDArray[np.bool_]:
    """Which chunks are done: those with a file in done/ that says 1. Bounded by the files, not by what N claims."""
    folder = path / "done" / "c"
    files = {int(file.name): file for file in folder.iterdir() if file.name.isdigit()} if folder.is_dir() else {}
    if header.chunks > 2**31 or (header.chunks > 2**20 and header.chunks > 1000 * (len(files) + 1)):
        raise TraceError(
            f"{path} is damaged: it claims {header.samples} samples in {header.chunks} chunks, and holds {len(files)}."
        )
    done = np.zeros(header.chunks, np.bool_)
    for chunk, file in files.items():
        if chunk < header.chunks and file.stat().st_size == 1 + TRAILER:
            done[chunk] = file.read_bytes()[:1] == b"\x01"
    return done


@contextmanager
def _quiet_zarr() -> Iterator[None]:
    """Zarr warns that strings have no final specification; every reader in question reads them."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _calls(calls: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name}({', '.join(map(str, shape))})" for name, shape in calls)
