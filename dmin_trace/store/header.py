"""What a store holds, known before its first chunk is written: the attributes of its Zarr group.

A store can come from anybody, so every attribute is checked when it is read, and the first wrong one is named.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import msgspec
import numpy as np
from msgspec import Meta

from dmin_trace.errors import TraceError, brief
from dmin_trace.settings import (
    COLUMN_NAME,
    MAX_DIMENSION,
    MAX_PASSES,
    MAX_THUMBNAIL,
    MIN_THUMBNAIL,
    Codec,
    Dtype,
    Projection,
    Transform,
    group_timesteps,
)

MAX_CHUNKS = 2**22
"""A flag is kept in memory for each chunk."""
MAX_CHUNK_BYTES = 2**27
"""The largest chunk of more than one sample. Memory is allocated for a whole chunk."""
FRAME_HEADER_BYTES = 16
"""Bytes of Blosc's header, which is also the most by which Blosc makes a chunk longer."""
MAX_PACKED_BYTES = 2**31 - 1 - FRAME_HEADER_BYTES
"""The largest chunk that Blosc takes."""
MAX_SAMPLE_INDEX = 2**53
"""The largest integer up to which float64, in which indices are stored, holds all of them."""

ColumnKind = Literal["string", "integer", "number"]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
MaybeDigest = Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Length = Annotated[int, Meta(ge=1, le=2**62)]
Shape = tuple[Annotated[int, Meta(ge=0, le=2**62)], ...]
Names = Annotated[tuple[str, ...], Meta(max_length=10**6)]
Decoded = TypeVar("Decoded")

CHOICES = {"dtype": Dtype, "codec": Codec, "transform": Transform, "projection.kind": Projection, "columns": ColumnKind}


@dataclass(frozen=True, kw_only=True)
class ProjectionFacts:
    """How gradients were projected; see `project.Plan`."""

    kind: Projection
    seed: Seed
    length: Length
    width: Length
    fingerprint: Digest


@dataclass(frozen=True, kw_only=True)
class ParameterFacts:
    """The trained parameters, in the order of a gradient's elements."""

    names: Names
    shapes: Annotated[tuple[Shape, ...], Meta(max_length=10**6)]
    fingerprint: Digest


@dataclass(frozen=True, kw_only=True)
class NoiseFacts:
    """What a training step draws, and what came of it for the first sample that was recorded.

    draws: for each timestep its random calls, name and shape, in order; a star marks the draw of the timestep.
    digests: for each timestep SHA-256 of the values that were drawn, where they do not depend on the sample.
    first_sample: the first sample's index.
    losses, norms: for each timestep its loss, and for each row the norm of its gradient; None if not finite.
    """

    seed: Seed
    draws: Annotated[tuple[tuple[tuple[str, Shape], ...], ...], Meta(max_length=MAX_PASSES)]
    digests: Annotated[tuple[Digest, ...], Meta(max_length=MAX_PASSES)]
    first_sample: Annotated[int, Meta(ge=0, le=2**40)]
    losses: Annotated[tuple[float | None, ...], Meta(max_length=MAX_PASSES)]
    norms: Annotated[tuple[float | None, ...], Meta(max_length=MAX_PASSES)]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model that the run called, and its parameters and buffers that do not train.

    name, kind: the script's name for it, or its class; the name of its class.
    numbers, sha256: how many numbers they hold, and their fingerprint.
    in_steps: whether training steps call it, and not only what comes before the loop.
    """

    name: str
    kind: str
    numbers: Annotated[int, Meta(ge=0, le=2**62)]
    sha256: Digest
    in_steps: bool


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """How the rows were computed: conditions such as the device and the precision, by name; and the models called."""

    conditions: dict[str, str]
    models: Annotated[tuple[ModelFacts, ...], Meta(max_length=10**4)]


@dataclass(frozen=True, kw_only=True)
class ThumbnailFacts:
    """The small pictures of the samples.

    side: pixels of the longer side, at most.
    entry: the entry of the script's batch that they were made from; "" if they are of the samples' files.
    low, high: the values of that entry that are black and white, the same for all samples.
    """

    side: Annotated[int, Meta(ge=MIN_THUMBNAIL, le=MAX_THUMBNAIL)]
    entry: Annotated[str, Meta(max_length=200)]
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a store holds. `Settings` says what dimension, dtype, codec, transform and draws are.

    id: 32 hexadecimal digits, the store's name in the user's own records.
    samples, timesteps, chunk_rows: N, the T timesteps as the denoiser saw them, and C, the samples of a chunk.
    weights: fingerprint of the trained parameters.
    batch: shapes of what is made of images or words in a batch of one sample.
    columns, settings: the readable columns and their kinds; the capture's settings, as JSON.
    writers: versions of the packages that wrote the store.
    script, script_sha256, data_sha256: the script's name, fingerprints of its file and of the data; "" if not known.
    files_sha256: fingerprint of the names of the data set's files, in order; "" if not known.
    unreached: the trained parameters on which the loss does not depend.
    run: the precision, device and frozen models by which the rows were computed.
    group_count: R, the number of groups that timesteps are pooled into; None if each has a projected gradient.
    weights_of: which of the run's weights were captured, and which averages of them were not, for a person to read.
    thumbnails: how the small pictures of the samples were made; None if there are none.
    """

    id: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    samples: Annotated[int, Meta(ge=1, le=2**40)]
    timesteps: Annotated[tuple[float, ...], Meta(min_length=1, max_length=MAX_PASSES)]
    dimension: Annotated[int, Meta(ge=1, le=MAX_DIMENSION)]
    dtype: Dtype
    chunk_rows: Annotated[int, Meta(ge=1, le=2**40)]
    projection: ProjectionFacts
    parameters: ParameterFacts
    weights: Digest
    noise: NoiseFacts
    transform: Transform
    batch: dict[str, Shape]
    columns: dict[str, ColumnKind]
    settings: dict[str, Any]
    writers: dict[str, str]
    codec: Codec
    draws: Annotated[int, Meta(ge=1, le=MAX_PASSES)]
    script: str
    script_sha256: MaybeDigest
    data_sha256: MaybeDigest
    unreached: Names
    run: RunFacts
    files_sha256: MaybeDigest = ""
    weights_of: Annotated[str, Meta(max_length=1000)] = ""
    group_count: Annotated[int, Meta(ge=1, le=MAX_PASSES)] | None = None
    thumbnails: ThumbnailFacts | None = None

    @property
    def groups(self) -> tuple[tuple[float, ...], ...]:
        """For each of a sample's R projected gradients its timesteps: one, or several that were pooled."""
        numbers = group_timesteps(len(self.timesteps), self.group_count)
        return tuple(tuple(self.timesteps[k] for k in group) for group in numbers)

    @property
    def gradient_count(self) -> int:
        """R, the number of projected gradients of a sample: T, or fewer where timesteps are pooled."""
        return self.group_count or len(self.timesteps)

    @property
    def gradient_of(self) -> str:
        """What a projected gradient is of, in words."""
        return "timestep" if self.group_count is None else "group of timesteps"

    @property
    def sample_bytes(self) -> int:
        """The bytes of a sample's projected gradients, before the codec."""
        return self.gradient_count * self.dimension * np.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> int:
        """The number of chunks of rows."""
        return -(-self.samples // self.chunk_rows)

    def rows(self, chunk: int) -> range:
        """The rows of a chunk. The last chunk may hold fewer than C."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.samples))

    def to_attributes(self) -> dict[str, Any]:
        """The header as JSON keeps it: tuples are lists, and what is None is left out, as older versions wrote it."""
        kept = {name: value for name, value in asdict(self).items() if value is not None}
        return dict(json.loads(json.dumps(kept)))

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], path: Path) -> Self:
        """The header in the attributes of a store. Raises TraceError that names the first attribute that is wrong."""
        header = decode(attributes, cls, path)
        rows, names, steps = header.chunk_rows, len(header.parameters.names), len(header.timesteps)
        sample, groups = max(header.sample_bytes, number_bytes(steps, header.group_count)), header.gradient_count
        packable = header.codec == "none" or rows > 1 or header.sample_bytes <= MAX_PACKED_BYTES
        small = rows == 1 or rows * sample <= MAX_CHUNK_BYTES
        named = all(map(COLUMN_NAME.fullmatch, header.columns))  # a column's name is the name of a folder in meta/
        for right, name, expected in (
            (packable, "codec", f"none for chunks of more than {MAX_PACKED_BYTES} bytes"),
            (small, "chunk_rows", f"1, or chunks of {MAX_CHUNK_BYTES} bytes at most"),
            (header.chunks <= MAX_CHUNKS, "chunk_rows", f"at most {MAX_CHUNKS} chunks for {header.samples} samples"),
            # A file's name may be no Unicode.
            (re.fullmatch(r"[^/\\]{0,255}", header.script), "script", "the name of a file"),
            (named, "columns", "names of letters, digits, '_', '-', '.' and spaces"),
            (len(header.parameters.shapes) == names, "parameters.shapes", f"one for each of the {names} names"),
            (len(header.noise.draws) == steps, "noise.draws", f"one list for each of the {steps} timesteps"),
            (len(header.noise.digests) == steps, "noise.digests", f"one for each of the {steps} timesteps"),
            (len(header.noise.losses) == steps, "noise.losses", f"one for each of the {steps} timesteps"),
            (groups <= steps, "group_count", f"at most {steps}, the number of timesteps"),
            (len(header.noise.norms) == groups, "noise.norms", f"one for each of the {groups} rows of a sample"),
        ):
            if not right:
                raise _wrong(attributes, name, expected, path)
        return header


def number_bytes(timesteps: int, group_count: int | None = None) -> int:
    """The bytes of a sample's index, norms, losses and scales."""
    return 8 * (1 + 2 * (group_count or timesteps) + timesteps)


def decode(attributes: Mapping[str, Any], kind: type[Decoded], path: Path) -> Decoded:
    """Attributes of a store as a dataclass; others are passed over. Raises TraceError as `Header.from_attributes`."""
    try:
        return msgspec.convert(attributes, kind, strict=True)
    except msgspec.ValidationError as error:
        # Such as "Expected `int` >= 0, got `str` - at `$.noise.draws[0][1]`".
        said, _, place = str(error).partition(" - at ")
        name = re.sub(r"\[.*|`.*", "", place.partition("$.")[2])
    except UnicodeEncodeError:
        raise TraceError(f"{path} is damaged: its attributes hold text that is not Unicode.") from None
    if missing := re.search(r"missing required field `(\w+)`", said):
        raise _wrong(attributes, f"{name}.{missing[1]}".lstrip("."), "a value", path)
    expected = said.partition(", got ")[0].removeprefix("Expected ").replace("`", "")
    if said.startswith("Invalid enum value"):
        expected = f"one of {', '.join(get_args(CHOICES[name]))}"
    elif said.startswith("Number out of range"):
        expected = "finite numbers"
    raise _wrong(attributes, name, expected, path)


def _wrong(attributes: Mapping[str, Any], name: str, expected: str, path: Path) -> TraceError:
    found: Any = attributes
    for part in name.split("."):
        found = found.get(part, "missing") if isinstance(found, Mapping) else "missing"
    return TraceError(f"{path} is damaged: its attribute {name} is {brief(found)}; expected {expected}.")
