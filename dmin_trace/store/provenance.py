"""Whether a run's script and data set are those of a store."""

from __future__ import annotations

from pathlib import Path

from dmin_trace.errors import TraceError, brief
from dmin_trace.store.header import Header


def check_script(path: Path, header: Header, name: str, sha256: str, what: str) -> None:
    """Raises TraceError if a script differs from that of the store at `path`; if one of both is not known, it passes.

    Args:
        path: the store.
        header: its header.
        name, sha256: of the script that is to run.
        what: what the user can do about it, for the message.
    """
    if header.script_sha256 and sha256 and header.script_sha256 != sha256:
        raise TraceError(
            f"The script is not the one that made {path}: the SHA-256 of {name} is {sha256[:16]}, that of the trace's "
            f"{brief(header.script)} is {header.script_sha256[:16]}. {what}"
        )


def check_data(path: Path, header: Header, samples: int, sha256: str) -> None:
    """Raises TraceError if a data set differs from that of the store at `path`, in its length or, if both are known,
    in its fingerprint."""
    theirs, ours = (f"it has {count:,} samples" for count in (header.samples, samples))
    if header.samples == samples and header.data_sha256 and sha256:
        theirs, ours = (f"the fingerprint of its content is {known[:16]}" for known in (header.data_sha256, sha256))
    if theirs != ours:
        raise TraceError(
            f"The data set is not the one that {path} is of. That of the trace: {theirs}; that of this run: {ours}. "
            "Give the same one, in the same order and with the same transforms; or another path (out, --out)."
        )
