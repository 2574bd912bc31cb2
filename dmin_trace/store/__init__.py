"""The files on disk: numpy and zarr, no torch.

    projected gradients -> Writer -> trace.zarr -> Store -> rows

`header` says what a store holds, `writer` writes it chunk by chunk, `reader` opens it, and `integrity` checks it.
"""

from dmin_trace.store.header import Header, NoiseFacts, ParameterFacts, ProjectionFacts
from dmin_trace.store.integrity import Damage, Progress, Verified, mendable, size_of, verify_chunks
from dmin_trace.store.lock import StoreLock
from dmin_trace.store.pack import pack_store
from dmin_trace.store.queries import Queries
from dmin_trace.store.reader import (
    CHECKSUMS,
    DONE,
    FAILED,
    Store,
    UnrankedSamples,
    Writer,
    bytes_of,
    check_data,
    check_free,
    check_script,
    choose_chunk_rows,
    chunk_file,
    create,
    header_digest,
    keep_digests,
    make_folder,
    marks,
    open_store,
    quantise,
    read_header,
    resume,
    row_checksum,
    sweep,
    sync,
    sync_tree,
    weights_beside,
)
from dmin_trace.store.untrusted import digest, parse, size_within
from dmin_trace.store.untrusted_npz import ArrayHeader, read_arrays

__all__ = [
    "ArrayHeader",
    "CHECKSUMS",
    "DONE",
    "Damage",
    "FAILED",
    "Header",
    "NoiseFacts",
    "ParameterFacts",
    "Progress",
    "ProjectionFacts",
    "Queries",
    "Store",
    "StoreLock",
    "Verified",
    "Writer",
    "bytes_of",
    "check_data",
    "check_free",
    "check_script",
    "choose_chunk_rows",
    "chunk_file",
    "create",
    "digest",
    "UnrankedSamples",
    "header_digest",
    "keep_digests",
    "make_folder",
    "marks",
    "mendable",
    "open_store",
    "pack_store",
    "parse",
    "quantise",
    "read_arrays",
    "read_header",
    "resume",
    "row_checksum",
    "size_of",
    "size_within",
    "sweep",
    "sync",
    "sync_tree",
    "verify_chunks",
    "weights_beside",
]
