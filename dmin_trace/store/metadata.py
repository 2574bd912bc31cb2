"""The metadata of a store: zarr.json of the group and of each array.

The group's attributes hold the Header, the format and its version, whether the store is complete, of a complete store
what `Finished` says, and a SHA-256 digest of all this, which finds damage, but not a forger, who writes it too. The
metadata of the arrays follows from the Header. It is for other readers of Zarr; here only `verify` reads it.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from dmin_trace.errors import TraceError, brief
from dmin_trace.store import untrusted
from dmin_trace.store.files import replace_text
from dmin_trace.store.header import Digest, Header, decode
from dmin_trace.store.layout import BYTES, ArrayLayout, array_layouts

FORMAT = "dmin_trace"
VERSION = 1
DIGEST = "sha256"
"""The attribute that holds the digest of the others."""
BLOSC: dict[str, str | int] = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
"""Blosc's settings. A higher level gains a few per cent, at a hundredth of the speed."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is known of a store when its last chunk is written: `Store.state` and `Store.valid_count`.

    final: False if the training went on after the capture, so that its weights are not those of the trained model.
    """

    state: Digest
    valid_count: Annotated[int, Meta(ge=0)]
    final: bool = True


def read_header(path: Path) -> tuple[Header, Finished | None]:
    """The header of a store, and what it says of itself if complete. Raises TraceError if it is missing or damaged."""
    try:
        if not path.exists():
            raise TraceError(f"There is no store at {path}. Give the folder that a capture wrote.")
        if untrusted.size_within(path, ["zarr.json"]) is None:
            raise TraceError(f"{path} is not a trace: it has no zarr.json. Give the folder that a capture wrote.")
    except (OSError, ValueError) as error:
        raise TraceError(f"There is no store at {path}: {_reason(error)}.") from None
    try:
        metadata = untrusted.read_json(path, ["zarr.json"])
    except (ValueError, OSError) as error:
        raise TraceError(
            f"{path}/zarr.json cannot be read as JSON: {_reason(error)}; the store is damaged. Restore the file from a "
            "copy, or capture again."
        ) from None
    if not isinstance(metadata, dict):
        raise TraceError(f"{path}/zarr.json holds no JSON object; the store is damaged.")
    attributes = metadata.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise TraceError(f"{path} is a Zarr store, but not a trace of dmin_trace.")
    version = attributes.get("version")
    if type(version) is not int or version != VERSION:
        raise TraceError(
            f"{path} is of version {brief(version)}; expected {VERSION}. Read it with the dmin_trace that wrote it, "
            "or capture again."
        )
    header = Header.from_attributes(attributes, path)
    if attributes.get(DIGEST) != digest_of(attributes):
        raise TraceError(
            f"{path} is damaged: its zarr.json is not what was written, by its own digest. Restore the file from a "
            "copy, or capture again."
        )
    return header, decode(attributes, Finished, path) if attributes.get("complete") is True else None


def set_finished(path: Path, finished: Finished | None) -> None:
    """Writes into a store that it is complete, or that it is not. Raises OSError if the disk refuses."""
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    attributes = metadata["attributes"]
    # A store that is completed again is still of the weights that it was of.
    final = attributes.get("final", True)
    for name in ("state", "valid_count", "final"):
        attributes.pop(name, None)
    attributes["complete"] = finished is not None
    if finished is not None:
        attributes |= asdict(replace(finished, final=final))
    elif not final:
        attributes["final"] = False
    _replace_group(path, metadata)


def mark_not_final(path: Path) -> None:
    """Writes into a store that the training went on after its capture. Raises OSError if the disk refuses."""
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    metadata["attributes"]["final"] = False
    _replace_group(path, metadata)


def _replace_group(path: Path, metadata: dict[str, Any]) -> None:
    metadata["attributes"][DIGEST] = digest_of(metadata["attributes"])
    replace_text(path / "zarr.json", json.dumps(metadata))


def digest_of(attributes: Mapping[str, Any]) -> str:
    """The digest of a group's attributes, without the digest itself."""
    return untrusted.digest({name: value for name, value in attributes.items() if name != DIGEST})


def create_arrays(path: Path, header: Header) -> None:
    """Makes the folders of a store and their zarr.json."""
    attributes = {"format": FORMAT, "version": VERSION, **header.to_attributes(), "complete": False}
    for name, metadata in {"": _group(attributes), **_inner_metadata(header)}.items():
        (path / name).mkdir()
        (path / name / "zarr.json").write_text(json.dumps(metadata), encoding="utf-8")
    set_finished(path, None)


def check_with_zarr(path: Path, header: Header) -> None:
    """Raises TraceError if zarr-python sees another shape, dtype or chunk in a new store than the header says."""
    import zarr

    group = zarr.open_group(path, mode="r", zarr_format=3)
    with warnings.catch_warnings():
        # Zarr warns that strings and bytes have no final specification yet; zarr-python reads them.
        warnings.simplefilter("ignore")
        for name, layout in array_layouts(header).items():
            array = group[name]
            found = (array.shape, array.chunks, str(array.dtype)) if isinstance(array, zarr.Array) else ()
            dtype = {"string": str(np.dtypes.StringDType()), BYTES: "object"}.get(layout.dtype, layout.dtype)
            if found != (expected := (layout.shape, layout.chunks, dtype)):
                raise TraceError(
                    f"zarr {zarr.__version__} reads the array {name} as {brief(found)}; expected {brief(expected)}. "
                    "Install another version of zarr."
                )


def damaged_metadata(path: Path, header: Header) -> dict[str, str]:
    """The arrays and inner groups whose zarr.json is not that of the header, each with what is wrong."""
    found = {}
    for name, expected in _inner_metadata(header).items():
        try:
            if untrusted.read_json(path, [*name.split("/"), "zarr.json"]) != expected:
                found[name] = "is not what was written"
        except (ValueError, OSError) as error:
            found[name] = f"cannot be read: {_reason(error)}"
    return found


def restore_metadata(path: Path, header: Header, names: Iterable[str]) -> None:
    """Writes the zarr.json of arrays and inner groups anew. Raises OSError if the disk refuses."""
    for name in names:
        replace_text(path / name / "zarr.json", json.dumps(_inner_metadata(header)[name]))


def _inner_metadata(header: Header) -> dict[str, dict[str, Any]]:
    """The zarr.json of each array, and of the group that holds the columns, as the specification of Zarr 3 has it."""
    return {"meta": _group({})} | {name: _array(layout) for name, layout in array_layouts(header).items()}


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _array(layout: ArrayLayout) -> dict[str, Any]:
    numbers = {"name": "bytes", "configuration": {"endian": "little"}}
    of_any_length = {"string": {"name": "vlen-utf8"}, BYTES: {"name": "vlen-bytes"}}
    codecs: list[dict[str, Any]] = [of_any_length.get(layout.dtype, numbers)]
    if layout.packed:
        codecs.append({"name": "blosc", "configuration": {"typesize": np.dtype(layout.dtype).itemsize, **BLOSC}})
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(layout.shape),
        "data_type": layout.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(layout.chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if layout.fill != layout.fill else layout.fill,
        "codecs": [*codecs, {"name": "crc32c"}],
        "dimension_names": list(layout.axes),
        "attributes": layout.attributes,
    }


def _reason(error: Exception) -> str:
    """What went wrong with a file, in a few words and on one line."""
    return brief(getattr(error, "strerror", None) or str(error))[1:-1]
