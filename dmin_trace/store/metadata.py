"""The metadata of a store: zarr.json of the group and of each array, with digests that find damage.

The group's attributes hold the Header, the format and its version, SHA-256 digests of all metadata, and whether the
store is complete; of a complete store also what `Finished` says. The digests find damage, but not a forger, who writes
them too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from msgspec import Meta

from dmin_trace.errors import TraceError, brief
from dmin_trace.store import untrusted
from dmin_trace.store.files import replace_text
from dmin_trace.store.header import Digest, Header, decode
from dmin_trace.store.layout import ArrayLayout, array_layouts

FORMAT = "dmin_trace"
VERSION = 1
CHECKSUMS = "checksums"
"""The attribute that holds the digests of the metadata."""
BLOSC: dict[str, str | int] = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
"""Blosc's settings. A higher level gains a few per cent, at a hundredth of the speed."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is known of a store when its last chunk is written.

    state: SHA-256 of the header and of the checksums of all chunks.
    valid_count: the number of rows that can be ranked.
    """

    state: Digest
    valid_count: Annotated[int, Meta(ge=0)]


def read_header(path: Path) -> tuple[Header, Finished | None]:
    """The header of a store, and what it says of its content if it says that it is complete.

    Raises TraceError if there is no store of dmin_trace at `path`, or if its metadata is damaged.
    """
    metadata = _read_group(path)
    attributes = metadata["attributes"]
    header = Header.from_attributes(attributes, path)
    if _digests(attributes, path)["header"] != header_digest(metadata):
        raise TraceError(
            f"{path} is damaged: its zarr.json is not what was written, by its own digest. Restore the file from a "
            "copy, or capture again."
        )
    return header, decode(attributes, Finished, path) if attributes.get("complete") is True else None


def set_finished(path: Path, finished: Finished | None) -> None:
    """Writes into a store that it is complete, or that it is not. Raises OSError if the disk refuses."""
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    attributes = metadata["attributes"]
    for name in ("state", "valid_count"):
        attributes.pop(name, None)
    attributes |= {"complete": finished is not None} | (asdict(finished) if finished is not None else {})
    attributes[CHECKSUMS]["header"] = header_digest(metadata)
    replace_text(path / "zarr.json", json.dumps(metadata))


def header_digest(metadata: Mapping[str, Any]) -> str:
    """The digest of the group's metadata, without that digest itself."""
    attributes = metadata["attributes"]
    return untrusted.digest({**metadata, "attributes": {**attributes, CHECKSUMS: attributes[CHECKSUMS]["arrays"]}})


def keep_digests(path: Path) -> None:
    """Writes the digests of all metadata of the store at `path` into its attributes."""
    files = [file for file in sorted(path.rglob("zarr.json")) if file.parent != path]
    arrays = {
        file.parent.relative_to(path).as_posix(): untrusted.digest(json.loads(file.read_text(encoding="utf-8")))
        for file in files
    }
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    metadata["attributes"][CHECKSUMS] = {"arrays": arrays}
    metadata["attributes"][CHECKSUMS]["header"] = header_digest(metadata)
    (path / "zarr.json").write_text(json.dumps(metadata), encoding="utf-8")


def create_arrays(path: Path, header: Header) -> None:
    """Makes the group and its arrays, without chunks and without digests."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    attributes = {"format": FORMAT, "version": VERSION, **header.to_attributes(), "complete": False}
    with warnings.catch_warnings():
        # Of strings Zarr warns that their specification is not final; every known reader reads them.
        for words in ("does not have a Zarr V3 specification", "not part in the Zarr format 3 specification"):
            warnings.filterwarnings("ignore", message=f".*{words}.*")
        group = zarr.create_group(path, zarr_format=3, attributes=attributes)
        for name, layout in array_layouts(header).items():
            # None for the compressors would mean Zarr's default, zstd.
            group.create_array(
                name,
                shape=layout.shape,
                dtype=layout.dtype,
                chunks=layout.chunks,
                compressors=[*([BloscCodec(**cast(Any, BLOSC))] if layout.packed else []), Crc32cCodec()],
                fill_value=layout.fill,
                dimension_names=layout.axes,
                attributes=layout.attributes,
            )


def check_arrays(path: Path, header: Header) -> None:
    """Raises TraceError if an array's metadata is not what the header says, or not what was written."""
    for name, what in damaged_arrays(path, header).items():
        raise TraceError(f"{path} is damaged: the metadata of {name} {what}. Restore it from a copy, or capture again.")


def damaged_arrays(path: Path, header: Header) -> dict[str, str]:
    """The arrays and groups whose metadata is damaged, each with what is wrong."""
    kept = _digests(_read_group(path)["attributes"], path)["arrays"]
    layouts = array_layouts(header)
    found = {name: _damage(path, name, layouts.get(name), kept.get(name, "")) for name in (*layouts, *kept)}
    return {name: what for name, what in found.items() if what}


def _damage(path: Path, name: str, layout: ArrayLayout | None, written: str) -> str:
    """What is wrong with the metadata of an array, or of a group (no layout): not what memory maps rely on, or, by its
    digest, not what was written; "" if nothing is."""
    names = [*name.split("/"), "zarr.json"]
    if not path.joinpath(*names).is_file():
        return "is missing"
    try:
        metadata = _read_json(path, names)
    except TraceError as error:
        return f"cannot be read ({error})"
    if layout is not None:
        for fact, choices in _expected_metadata(layout).items():
            value = metadata.get(fact)
            if (value if fact == "chunk_grid" else _extensions(value)) not in choices:
                return f"is not that of the header: its {fact} is {brief(value)}; expected {brief(choices[0])}"
    return "" if untrusted.digest(metadata) == written else "is not what was written, by its digest"


def _expected_metadata(layout: ArrayLayout) -> dict[str, list[object]]:
    """The facts of an array's zarr.json that decide how its chunks are read. Versions of Zarr spell some in two ways:
    what is a default is written or left out."""
    codec = "vlen-utf8" if layout.dtype == "string" else "bytes"
    packed = [("blosc", {"typesize": np.dtype(layout.dtype).itemsize, **BLOSC})] if layout.packed else []
    return {
        "shape": [list(layout.shape)],
        "data_type": [layout.dtype],
        "chunk_grid": [{"name": "regular", "configuration": {"chunk_shape": list(layout.chunks)}}],
        "chunk_key_encoding": [("default", {"separator": "/"}), ("default", {})],
        "codecs": [[(codec, facts), *packed, ("crc32c", {})] for facts in ({}, {"endian": "little"})],
    }


def _extensions(value: Any) -> Any:
    """Zarr's named extensions, such as codecs, as pairs (name, configuration)."""
    if isinstance(value, list):
        return [_extensions(item) for item in value]
    return (value.get("name"), value.get("configuration", {})) if isinstance(value, dict) else value


def _read_group(path: Path) -> dict[str, Any]:
    """The group's metadata. Raises TraceError if there is no store of dmin_trace, or one of another version."""
    try:
        exists, has_metadata = path.exists(), untrusted.size_within(path, ["zarr.json"]) is not None
    except (OSError, ValueError) as error:
        raise TraceError(f"There is no store at {path}: {_reason(error)}.") from None
    if not exists:
        raise TraceError(f"There is no store at {path}.")
    if not has_metadata:
        raise TraceError(f"{path} is not a trace: it has no zarr.json. Give the folder that a capture wrote.")
    metadata = _read_json(path, ["zarr.json"])
    attributes = metadata.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise TraceError(f"{path} is a Zarr store, but not a trace of dmin_trace.")
    version = attributes.get("version")
    if type(version) is not int or version != VERSION:
        raise TraceError(
            f"{path} is of version {brief(version)}; expected {VERSION}. Read it with the dmin_trace that wrote it, "
            "or capture again."
        )
    return metadata


def _digests(attributes: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The digests of the metadata. Raises TraceError if they are missing, or of another form."""
    kept = attributes.get(CHECKSUMS, "missing")
    if not isinstance(kept, dict) or set(kept) != {"header", "arrays"} or not isinstance(kept["arrays"], dict):
        raise TraceError(
            f"{path} is damaged: its attribute {CHECKSUMS} is {brief(kept)}; expected digests. Restore "
            f"{path / 'zarr.json'} from a copy, or capture again."
        )
    return kept


def _read_json(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The object in a metadata file of the store. Raises TraceError if it cannot be trusted."""
    try:
        found = untrusted.read_json(path, names)
    except (ValueError, OSError) as error:
        file = path.joinpath(*names)
        raise TraceError(f"{file} cannot be read as JSON: {_reason(error)}; the store is damaged.") from None
    if not isinstance(found, dict):
        raise TraceError(f"{path.joinpath(*names)} holds no JSON object; the store is damaged.")
    return found


def _reason(error: Exception) -> str:
    """What went wrong with a file, in a few words and on one line."""
    return brief(getattr(error, "strerror", None) or str(error))[1:-1]
