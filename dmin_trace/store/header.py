"""What is known of a capture before its first chunk is written: the attributes of the store's group.

A store can come from anybody, so every attribute is checked when it is read, and the first that is wrong is named.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dmin_trace.errors import TraceError, brief
from dmin_trace.settings import (
    COLUMN_NAME,
    MAX_DIMENSION,
    MAX_DRAWS,
    MAX_TIMESTEPS,
    Codec,
    Dtype,
    Projection,
    Transform,
)

MOST_SAMPLES = 2**40
MOST_CHUNKS = 2**22
"""64 TiB of chunks; beyond that a header is a lie, and a flag for each chunk an allocation to refuse."""
FRAME_HEADER = 16
"""Bytes of Blosc's header, which is also the most by which it makes a chunk longer."""
LARGEST_FRAME = 2**31 - 1 - FRAME_HEADER
LARGEST_CHUNK = 2**25
"""A chunk of more than one sample is at most so large: no writer makes one of twice CHUNK_BYTES, and what is allocated
for a chunk is in proportion."""

ColumnKind = Literal["string", "integer", "number"]


@dataclass(frozen=True, kw_only=True)
class ProjectionFacts:
    """How gradients were compressed; see `compress.Plan`."""

    kind: Projection
    seed: int
    length: int
    width: int
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
    dimension, dtype, codec, chunk_rows: v, how a number is stored, how a chunk of them is packed, R.
    weights: fingerprint of the trained parameters.
    draws: D, the number of noises at each timestep over which a gradient is the mean.
    transform: what was done to gradients before they were compressed.
    batch: shapes of what is made of images or words in a batch of one sample.
    columns: the readable columns and their kinds.
    settings: the capture's settings, as JSON.
    writers: versions of the packages that wrote the store.
    script, script_sha256: the name of the file whose loop was run, and the fingerprint of its bytes; "" if not known.
    data_sha256: fingerprint of the data set, by a few of its batches (`identity`); "" if not known.
    unreached: the trained parameters on which the loss did not depend.
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
    transform: Transform
    batch: dict[str, tuple[int, ...]]
    columns: dict[str, ColumnKind]
    settings: dict[str, Any]
    writers: dict[str, str]
    codec: Codec
    draws: int
    script: str
    script_sha256: str
    data_sha256: str
    unreached: tuple[str, ...]

    @property
    def sample_bytes(self) -> int:
        """The size of a sample's compressed gradients, before the codec."""
        return len(self.timesteps) * self.dimension * np.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> int:
        """How many chunks of rows there are."""
        return -(-self.samples // self.chunk_rows)

    def rows(self, chunk: int) -> range:
        """The slots of a chunk; the last one may be short."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.samples))

    def to_attributes(self) -> dict[str, Any]:
        """The header as JSON keeps it: tuples are lists."""
        attributes: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return attributes

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], path: Path) -> Header:
        """The header in the attributes of the store at `path`, every value checked.

        Raises TraceError that names the first attribute that is wrong.
        """
        reader = _Attributes(attributes, str(path))
        projection, parameters, noise = (reader.inside(name) for name in ("projection", "parameters", "noise"))
        header = cls(
            id=reader.text("id", r"[0-9a-f]{32}"),
            samples=reader.number("samples", 1, MOST_SAMPLES),
            timesteps=reader.numbers("timesteps", MAX_TIMESTEPS),
            dimension=reader.number("dimension", 1, MAX_DIMENSION),
            dtype=reader.choice("dtype", get_args(Dtype)),
            chunk_rows=reader.number("chunk_rows", 1, MOST_SAMPLES),
            projection=ProjectionFacts(
                kind=projection.choice("kind", get_args(Projection)),
                seed=projection.number("seed", 0, 2**32 - 1),
                length=projection.number("length", 1, 2**62),
                width=projection.number("width", 1, 2**62),
                fingerprint=projection.text("fingerprint", r"[0-9a-f]{64}"),
            ),
            parameters=ParameterFacts(
                names=tuple(parameters.listed("names", (str,), 10**6)),
                shapes=tuple(
                    parameters.shape("shapes", shape) for shape in parameters.listed("shapes", (list,), 10**6)
                ),
                fingerprint=parameters.text("fingerprint", r"[0-9a-f]{64}"),
            ),
            weights=reader.text("weights", r"[0-9a-f]{64}"),
            noise=NoiseFacts(
                seed=noise.number("seed", 0, 2**32 - 1),
                draws=tuple(noise.calls(slot) for slot in noise.listed("draws", (list,), MAX_TIMESTEPS)),
            ),
            transform=reader.choice("transform", get_args(Transform)),
            batch={name: reader.shape("batch", shape) for name, shape in reader.mapping("batch", list).items()},
            columns={name: _column_kind(reader, kind) for name, kind in reader.mapping("columns", str).items()},
            settings=reader.mapping("settings", object),
            writers=reader.mapping("writers", str),
            codec=reader.choice("codec", get_args(Codec)),
            draws=reader.number("draws", 1, MAX_DRAWS),
            script=reader.text("script", r"[^/\\]{0,255}"),
            script_sha256=reader.text("script_sha256", r"|[0-9a-f]{64}"),
            data_sha256=reader.text("data_sha256", r"|[0-9a-f]{64}"),
            unreached=tuple(reader.listed("unreached", (str,), 10**6)),
        )
        if header.codec != "none" and header.chunk_rows == 1 and header.sample_bytes > LARGEST_FRAME:
            raise reader.wrong("codec", f"none for chunks of more than {LARGEST_FRAME} bytes")
        if header.chunk_rows > 1 and header.chunk_rows * header.sample_bytes > LARGEST_CHUNK:
            raise reader.wrong("chunk_rows", f"1, or chunks of {LARGEST_CHUNK} bytes at most")
        if header.chunks > MOST_CHUNKS:
            raise reader.wrong("chunk_rows", f"at most {MOST_CHUNKS} chunks for {header.samples} samples")
        for name in header.columns:
            # A column's name is a folder's name in meta/.
            if not COLUMN_NAME.fullmatch(name):
                raise reader.wrong("columns", "names of letters, digits, '_', '-', '.' and spaces")
        if len(header.parameters.shapes) != len(header.parameters.names):
            raise parameters.wrong("shapes", f"one for each of the {len(header.parameters.names)} names")
        if len(header.noise.draws) != len(header.timesteps):
            raise noise.wrong("draws", f"one list for each of the {len(header.timesteps)} timesteps")
        return header


class _Attributes:
    """Reads attributes that anybody may have written: each is checked, and a wrong one is named."""

    def __init__(self, values: Mapping[str, Any], path: str, prefix: str = "") -> None:
        self._values, self._path, self._prefix = values, path, prefix

    def wrong(self, name: str, expected: str) -> TraceError:
        found = brief(self._values.get(name, "missing"))
        return TraceError(
            f"{self._path} is damaged: its attribute {self._prefix}{name} is {found}; expected {expected}."
        )

    def number(self, name: str, least: int, most: int) -> int:
        value = self._values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def numbers(self, name: str, most: int) -> tuple[float, ...]:
        try:
            values = tuple(float(value) for value in self.listed(name, (int, float), most))
        except OverflowError:
            raise self.wrong(name, "finite numbers, one at least") from None
        if not values or not all(math.isfinite(value) for value in values):
            raise self.wrong(name, "finite numbers, one at least")
        return values

    def text(self, name: str, pattern: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self.wrong(name, f"text like {pattern}")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> Any:
        value = self._values.get(name)
        if not isinstance(value, str) or value not in choices:
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
        """The attributes within one."""
        return _Attributes(self.mapping(name, object), self._path, f"{self._prefix}{name}.")

    def shape(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
            raise self.wrong(name, "shapes")
        return tuple(value)

    def calls(self, slot: list[Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        if not all(isinstance(call, list) and len(call) == 2 and isinstance(call[0], str) for call in slot):
            raise self.wrong("draws", "names and shapes")
        return tuple((call[0], self.shape("draws", call[1])) for call in slot)


def _column_kind(reader: _Attributes, kind: str) -> ColumnKind:
    for known in get_args(ColumnKind):
        if kind == known:
            return known  # type: ignore[no-any-return]
    raise reader.wrong("columns", f"kinds {', '.join(get_args(ColumnKind))}")
