"""Checks all of a store, its index and the weights beside it against their checksums."""

from __future__ import annotations

from pathlib import Path

from dmin_trace import search as index
from dmin_trace import store
from dmin_trace import store as integrity
from dmin_trace.errors import TraceError, WeightsError
from dmin_trace.store import Damage, Header, Progress, Verified


def verify_store(path: Path, *, progress: Progress | None = None) -> Verified:
    """Compares every checksum of the store at `path`, of its index, and of the weights beside it.

    Raises TraceError if there is no store. Whatever else is wrong is in the answer.
    """
    found = Verified()
    if integrity.size_of(path) is None:
        store.read_header(path)  # says that there is none
    try:
        header, finished = store.read_header(path)
    except TraceError as error:
        found.damages.append(Damage(file=f"{path.name}/zarr.json", what=str(error)))
        found.notes.append("Nothing else can be told without the header of the store.")
        return found
    try:
        found = integrity.verify_chunks(path, header, finished, progress=progress)
    except TraceError as error:
        found.damages.append(Damage(file=f"{path.name}/done", what=str(error)))
        return found
    if not found.bad_arrays:
        damaged, why = index.damage(store.open_store(path, unfinished=True))
        folder = index.index_beside(path)
        found.damages += [Damage(file=f"{folder.name}/{name}", what=what) for name, what in damaged]
        of_index = [file.lstat().st_size for file in folder.iterdir()] if folder.is_dir() else []
        found.files += len(of_index)
        found.bytes += sum(of_index)
        if why:
            found.notes.append(f"The index is not used: {why}. Make it anew with dmin-trace index.")
    _compare_weights(path, header, found)
    return found


def _compare_weights(path: Path, header: Header, found: Verified) -> None:
    """The weights beside the store, by the fingerprint in the header."""
    file = store.weights_beside(path)
    if not file.is_file():
        found.notes.append(f"There are no weights at {file}. Queries need them, or to be told where they are.")
        return
    # torch is imported where there are tensors to look at, and nowhere else.
    from dmin_trace.capture import weights

    try:
        fingerprint = weights.fingerprint_of(file, header.parameters.names)
    except WeightsError as error:
        found.damages.append(Damage(file=file.name, what=str(error)))
        return
    found.files += 1
    found.bytes += file.stat().st_size
    if fingerprint != header.weights:
        found.damages.append(
            Damage(
                file=file.name,
                what=f"are not the weights of the trace: their fingerprint is {fingerprint[:16]}, that in the header "
                f"{header.weights[:16]}",
            )
        )
