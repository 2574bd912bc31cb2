"""The files on disk: numpy and zarr, no torch.

    projected gradients -> quantise -> Writer -> trace.zarr -> Store -> rows

`layout` says what lies where, `header` what a store holds, `writer` writes it chunk by chunk, `reader` opens it, and
`integrity` finds damage.
"""

from dmin_trace.store.files import check_free, check_writable, make_folder, set_aside, sweep, sync, sync_tree
from dmin_trace.store.header import (
    Header,
    ModelFacts,
    NoiseFacts,
    ParameterFacts,
    ProjectionFacts,
    RunFacts,
    ThumbnailFacts,
)
from dmin_trace.store.identity import check_data, check_files, check_script
from dmin_trace.store.integrity import Damage, Progress, Verified, drop_damaged, drop_failed, verify_chunks
from dmin_trace.store.layout import (
    FAILED,
    FILE_COLUMN,
    THUMBNAILS,
    bytes_of,
    choose_chunk_rows,
    chunk_file,
    index_beside,
    max_thumbnail_bytes,
    max_thumbnails_bytes,
    weights_beside,
)
from dmin_trace.store.lock import StoreLock
from dmin_trace.store.metadata import mark_not_final, read_header
from dmin_trace.store.pack import pack_store
from dmin_trace.store.processor_cores import core_count
from dmin_trace.store.quantisation import quantise, row_checksum
from dmin_trace.store.queries import PICTURE_SIDE, Queries, query_gradients
from dmin_trace.store.reader import RowNumbers, Store, UnrankedSamples, open_store
from dmin_trace.store.thumbnails import (
    PICTURE_ENDINGS,
    PICTURE_FORMATS,
    StoredThumbnail,
    Thumbnails,
    decode_webp,
    encode_webp,
    webp_size,
)
from dmin_trace.store.untrusted import ArrayHeader, digest, parse, read_arrays, size_of, size_within
from dmin_trace.store.writer import Writer, create, resume
