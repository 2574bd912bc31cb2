"""The files on disk: numpy and zarr, no torch.

    projected gradients -> quantise -> Writer -> trace.zarr -> Store -> rows

`layout` says what lies where, `header` what a store holds, `writer` writes it chunk by chunk, `reader` opens it, and
`integrity` finds damage.
"""

from dmin_trace.store.files import check_free as check_free
from dmin_trace.store.files import make_folder as make_folder
from dmin_trace.store.files import sweep as sweep
from dmin_trace.store.files import sync as sync
from dmin_trace.store.files import sync_tree as sync_tree
from dmin_trace.store.header import Header as Header
from dmin_trace.store.header import NoiseFacts as NoiseFacts
from dmin_trace.store.header import ParameterFacts as ParameterFacts
from dmin_trace.store.header import ProjectionFacts as ProjectionFacts
from dmin_trace.store.identity import check_data as check_data
from dmin_trace.store.identity import check_script as check_script
from dmin_trace.store.integrity import Damage as Damage
from dmin_trace.store.integrity import Progress as Progress
from dmin_trace.store.integrity import Verified as Verified
from dmin_trace.store.integrity import drop_damaged as drop_damaged
from dmin_trace.store.integrity import drop_failed as drop_failed
from dmin_trace.store.integrity import size_of as size_of
from dmin_trace.store.integrity import verify_chunks as verify_chunks
from dmin_trace.store.layout import FAILED as FAILED
from dmin_trace.store.layout import bytes_of as bytes_of
from dmin_trace.store.layout import choose_chunk_rows as choose_chunk_rows
from dmin_trace.store.layout import chunk_file as chunk_file
from dmin_trace.store.layout import weights_beside as weights_beside
from dmin_trace.store.lock import StoreLock as StoreLock
from dmin_trace.store.metadata import read_header as read_header
from dmin_trace.store.pack import pack_store as pack_store
from dmin_trace.store.processor_cores import core_count as core_count
from dmin_trace.store.quantisation import quantise as quantise
from dmin_trace.store.quantisation import row_checksum as row_checksum
from dmin_trace.store.queries import Queries as Queries
from dmin_trace.store.reader import RowNumbers as RowNumbers
from dmin_trace.store.reader import Store as Store
from dmin_trace.store.reader import UnrankedSamples as UnrankedSamples
from dmin_trace.store.reader import open_store as open_store
from dmin_trace.store.untrusted import ArrayHeader as ArrayHeader
from dmin_trace.store.untrusted import digest as digest
from dmin_trace.store.untrusted import parse as parse
from dmin_trace.store.untrusted import read_arrays as read_arrays
from dmin_trace.store.untrusted import size_within as size_within
from dmin_trace.store.writer import Writer as Writer
from dmin_trace.store.writer import create as create
from dmin_trace.store.writer import resume as resume
