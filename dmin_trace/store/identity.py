"""Whether a run is the one that a store is of: its script, its data set, and all else that the header says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin_trace.errors import TraceError, brief
from dmin_trace.store.header import Header

MAY_DIFFER = (
    *("id", "writers", "script", "script_sha256", "data_sha256", "files_sha256", "unreached", "run", "weights_of"),
    # The settings say whether there are any; which entry of the batch they are of is the store's word.
    "thumbnails",
    *("noise.first_sample", "noise.losses", "noise.norms"),
)
"""Attributes in which two runs of one capture, or two of its processes, may differ, or that are compared elsewhere,
where both are known. Each process begins with another sample."""


def check_script(path: Path, header: Header, name: str, sha256: str, what: str) -> None:
    """Raises TraceError, with `what` to do, if a script's SHA-256 is not the store's, where both are known."""
    if header.script_sha256 and sha256 and header.script_sha256 != sha256:
        raise TraceError(
            f"The script is not the one that made {path}: the SHA-256 of {name} is {sha256[:16]}, that of the trace's "
            f"{brief(header.script)} is {header.script_sha256[:16]}. {what}"
        )


def check_data(path: Path, header: Header, samples: int, sha256: str) -> None:
    """Raises TraceError if a data set differs from the store's in its length or, if both are known, fingerprint."""
    theirs, ours = (f"it has {count:,} samples" for count in (header.samples, samples))
    if header.samples == samples and header.data_sha256 and sha256:
        theirs, ours = (f"the fingerprint of its content is {known[:16]}" for known in (header.data_sha256, sha256))
    if theirs != ours:
        raise TraceError(
            f"The data set is not the one that {path} is of. That of the trace: {theirs}; that of this run: {ours}. "
            "Give the same one, in the same order and with the same transforms; or another path (out, --out)."
        )


def check_files(path: Path, header: Header, sha256: str) -> None:
    """Raises TraceError if the files of a data set, or their order, are not the store's, where both are known."""
    if header.files_sha256 and sha256 and header.files_sha256 != sha256:
        raise TraceError(
            f"The files of the data set are not those that {path} is of, or are in another order: the fingerprint of "
            f"their names is {sha256[:16]}, that of the trace {header.files_sha256[:16]}. Some scripts take files in "
            "the order of the directory, which differs in a copy of it. Give the folder that was captured, or another "
            "path (out, --out)."
        )


def check_capture(path: Path, existing: Header, header: Header) -> None:
    """Raises TraceError if a header is of another capture than the existing one of the store at `path`."""
    check_files(path, existing, header.files_sha256)
    check_data(path, existing, header.samples, header.data_sha256)
    found, expected = (_flat(facts.to_attributes()) for facts in (existing, header))
    for name in sorted(found | expected):
        # A setting that is not given is None, or missing where an older version wrote the store.
        theirs, ours = (facts.get(name) for facts in (found, expected))
        if {name, name.split(".")[0]}.isdisjoint(MAY_DIFFER) and theirs != ours:
            raise TraceError(
                f"{path} belongs to another capture: its {name} is {brief(theirs)}, that of this run is {brief(ours)}. "
                "Give another path (--out), or move it away."
            )


def _flat(attributes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Attributes of attributes by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in attributes.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
