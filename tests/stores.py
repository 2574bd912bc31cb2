"""Stores of made-up rows, for tests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr

from dmin_trace.settings import Dtype
from dmin_trace.store import (
    Header,
    NoiseFacts,
    ParameterFacts,
    ProjectionFacts,
    RunFacts,
    Store,
    Writer,
    create,
    open_store,
    quantise,
)
from dmin_trace.store.metadata import DIGEST, digest_of

DTYPES: tuple[Dtype, ...] = ("int8", "float16", "float32")


CAPTIONS = [
    "a cat",
    "",
    "naïve 猫 🐈‍⬛",
    "two\nlines\ttab",
    '"quoted", \\ back',
    "\x00nul",
    "x" * 5000,
    "é\u0301",
    " ",
    "ok",
]


class Rows(NamedTuple):
    """What a capture hands to a writer, for all N slots."""

    grad: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    sample: np.ndarray
    columns: dict[str, list[Any]]


def noise_facts(
    timesteps: int, calls: tuple[tuple[str, tuple[int, ...]], ...] = (), groups: int | None = None
) -> NoiseFacts:
    """What every training step of a capture drew."""
    return NoiseFacts(
        seed=3,
        draws=(calls,) * timesteps,
        digests=("e" * 64,) * timesteps,
        first_sample=0,
        losses=(0.5,) * timesteps,
        norms=(2.0,) * (groups or timesteps),
    )


def make_header(
    samples: int = 10, timesteps: int = 3, dimension: int = 32, dtype: Dtype = "int8", rows: int = 4, **changes: Any
) -> Header:
    """A header as a capture makes it; `group_count` among the changes pools the timesteps."""
    header = Header(
        id="0123456789abcdef" * 2,
        samples=samples,
        timesteps=tuple(100.0 * t + 0.5 for t in range(timesteps)),
        dimension=dimension,
        dtype=dtype,
        chunk_rows=rows,
        projection=ProjectionFacts(kind="rotation", seed=3, length=5000, width=8192, fingerprint="a" * 64),
        parameters=ParameterFacts(names=("w", "b"), shapes=((70, 70), (100,)), fingerprint="b" * 64),
        weights="c" * 64,
        noise=noise_facts(timesteps, (("randn", (1, 3, 8, 8)), ("randint*", (1,))), changes.get("group_count")),
        transform="none",
        batch={"pixel_values": (1, 3, 8, 8)},
        columns={"caption": "string", "label": "integer", "weight": "number"},
        settings={"timesteps": timesteps, "columns": None},
        writers={"dmin_trace": "0.1"},
        codec="none",
        draws=1,
        script="",
        script_sha256="",
        data_sha256="",
        unreached=(),
        run=RunFacts(conditions={"device": "cpu"}, models=()),
    )
    return dataclasses.replace(header, **changes)


def make_rows(header: Header, seed: int = 0) -> Rows:
    """Sketches of norm one or so, and samples that are not in the order of their slots."""
    generator = np.random.default_rng(seed)
    shape = (header.samples, header.gradient_count)
    grad = generator.standard_normal((*shape, header.dimension)).astype(np.float32) / header.dimension**0.5
    kinds: dict[str, list[Any]] = {
        "string": [CAPTIONS[k % len(CAPTIONS)] for k in range(header.samples)],
        "integer": [k * 7 - 1 for k in range(header.samples)],
        "number": [k / 3 for k in range(header.samples)],
    }
    return Rows(
        grad,
        generator.uniform(0.1, 9, shape).astype(np.float32),
        generator.uniform(0, 1, (header.samples, len(header.timesteps))).astype(np.float32),
        generator.permutation(header.samples).astype(np.int64) + 100,
        {name: kinds[kind] for name, kind in header.columns.items()},
    )


def write(writer: Writer, rows: Rows, chunk: int) -> None:
    """Writes one chunk of these rows."""
    held = writer.header.rows(chunk)
    here = slice(held.start, held.stop)
    columns = {name: values[here] for name, values in rows.columns.items()}
    stored = quantise(rows.grad[here], writer.header.dtype)
    writer.write(chunk, *stored, rows.norm[here], rows.loss[here], rows.sample[here], columns)


def write_store(path: Path, header: Header, rows: Rows, done: int | None = None) -> Store:
    """A store of these rows: finished, or with so many chunks `done`."""
    writer = create(path, header)
    for chunk in writer.pending()[:done]:
        write(writer, rows, chunk)
    if done is None:
        writer.finish()
    return open_store(path, unfinished=done is not None)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the metadata of a store or of an array in it, and writes the digest anew, as a forger would."""
    metadata = json.loads((path / "zarr.json").read_text())
    edit(metadata)
    if DIGEST in metadata["attributes"]:
        metadata["attributes"][DIGEST] = digest_of(metadata["attributes"])
    (path / "zarr.json").write_text(json.dumps(metadata))


def dequantised(path: Path) -> np.ndarray:
    """All rows in float64, read by plain Zarr."""
    group = zarr.open_group(path, mode="r")
    grad = np.asarray(group["grad"][:]).astype(np.float64)  # type: ignore[index]
    numbers: Any = group["numbers"]
    scale = numbers[:, slice(*numbers.attrs["columns"]["scale"])]
    return np.asarray(grad * scale[:, :, None])


def with_checksum(frame: bytes) -> bytes:
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


def crc32c(data: bytes) -> bytes:
    """Castagnoli's checksum bit by bit, as RFC 3720 has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return (value ^ 0xFFFFFFFF).to_bytes(4, "little")
