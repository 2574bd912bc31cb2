"""Compares all of a store, its index and the weights beside it with their checksums."""

from collections.abc import Sequence
from pathlib import Path

from dmin_trace.errors import TraceError, WeightsError
from dmin_trace.search import damage, index_beside
from dmin_trace.store import Damage, Progress, Verified, open_store, read_header, size_of, verify_chunks, weights_beside


def verify_store(path: Path, *, progress: Progress | None = None) -> Verified:
    """Compares a store, its index and its weights with their checksums. Raises TraceError only if there is no store."""
    found = Verified()
    try:
        header, finished = read_header(path)
    except TraceError as error:
        if size_of(path, ["zarr.json"]) is None:
            raise
        found.damages.append(Damage(file=f"{path.name}/zarr.json", what=str(error)))
        found.notes.append("Nothing else can be checked without the header of the store.")
        return found
    try:
        found = verify_chunks(path, header, finished, progress=progress)
    except TraceError as error:
        found.damages.append(Damage(file=f"{path.name}/done", what=str(error)))
        return found
    if not found.bad_arrays:
        _verify_index(path, found)
    _verify_weights(path, header.parameters.names, header.weights, found)
    return found


def _verify_index(path: Path, found: Verified) -> None:
    damaged, reason = damage(open_store(path, unfinished=True))
    folder = index_beside(path)
    found.damages += [Damage(file=f"{folder.name}/{name}", what=what) for name, what in damaged]
    sizes = [file.lstat().st_size for file in folder.iterdir()] if folder.is_dir() else []
    found.files += len(sizes)
    found.bytes += sum(sizes)
    if reason:
        found.notes.append(f"The index is not used: {reason}. Build it again with dmin-trace index.")


def _verify_weights(path: Path, names: Sequence[str], expected: str, found: Verified) -> None:
    file = weights_beside(path)
    if not file.is_file():
        found.notes.append(f"There are no weights at {file}. Queries need them, or --weights.")
        return
    # torch is imported only if there are weights to read.
    from dmin_trace.capture import weights

    try:
        fingerprint = weights.fingerprint_of(file, names)
    except WeightsError as error:
        found.damages.append(Damage(file=file.name, what=str(error)))
        return
    found.files += 1
    found.bytes += file.stat().st_size
    if fingerprint != expected:
        what = f"has other weights: their fingerprint is {fingerprint[:16]}, in the header it is {expected[:16]}"
        found.damages.append(Damage(file=file.name, what=what))
