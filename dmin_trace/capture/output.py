"""The store that a capture writes: a new one, or one that an earlier capture left unfinished."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dmin_trace import store
from dmin_trace.capture.ranks import Ranks
from dmin_trace.capture.weights import Trainable
from dmin_trace.errors import CaptureError, TraceError
from dmin_trace.store import Header, Store, Writer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CaptureOutput:
    """Where the rows of a capture go. The first process locks the store's path, and makes the store.

    out: the path of the store.
    resume: whether to continue an unfinished store at `out`; otherwise a store that lies there is renamed.
    like: the finished store that the queries are for; None for a capture of training samples.
    reserve: bytes that must stay free on the disk for what the script saves at its end; None for no such limit.
    trial: capture two samples, check them, and write nothing.
    created: called with the header of a new store.
    progressed: called with how many rows this process has recorded, and how many it will.
    ranks: the processes that fill the store.
    """

    out: Path
    resume: bool = True
    like: Store | None = None
    reserve: int | None = None
    trial: bool = False
    created: Callable[[Header], None] = lambda header: None
    progressed: Callable[[int, int], None] = lambda done, total: None
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        self.lock = store.StoreLock(self.out.absolute())
        self._leads = self.ranks.rank == 0 and self.like is None

    def find(self) -> Store | None:
        """Locks the path, and returns the store there, if any. Raises TraceError if it may not be written to."""
        if self._leads:
            try:
                store.make_folder(self.out.absolute().parent)
            except OSError as error:
                raise TraceError(f"{self.out} cannot be written: {error.strerror or error}.") from None
            self.lock.take()
        if not self.resume:
            if self._leads and (aside := store.set_aside(self.out.absolute())) is not None:
                logger.warning(
                    "%s is of this run. That of an earlier run, which lay there, is now %s.", self.out, aside.name
                )
            return None
        if not self.out.exists():
            return None
        return store.open_store(self.out, unfinished=True)

    def prepare(self, trainable: Trainable, earlier: Store | None) -> bool:
        """Removes what killed captures left, and saves the weights. Returns whether this process has saved them."""
        if self._leads:
            store.sweep(self.out.absolute())
            if earlier is not None and earlier.done.all():
                # The earlier capture ended between its last chunk and the mark that the store is complete.
                Writer(self.out, earlier.header).finish()
            trainable.save(store.weights_beside(self.out))
        return self._leads

    def open(self, make_header: Callable[[], Header]) -> Writer:
        """Creates the store, or opens the one that is continued; all processes call it together."""
        with self.ranks.holding():
            header = make_header()
            if self.ranks.rank == 0:
                existing = self.out.exists()
                if not existing:
                    self._check_room(header)
                writer = (store.resume if existing else store.create)(self.out, header)
                self.created(writer.header)
        self.ranks.meet()
        with self.ranks.holding():
            if self.ranks.rank != 0:
                writer = store.resume(self.out, header)
        # An error that was held is raised here, so there is a writer.
        self.ranks.meet()
        return writer

    def _check_room(self, header: Header) -> None:
        """Raises CaptureError if the store would take the room that the script needs to save what it trained."""
        needed = store.bytes_of(header) + store.max_thumbnails_bytes(header)
        free = shutil.disk_usage(self.out.absolute().parent).free
        if self.reserve is not None and free < needed + self.reserve:
            raise CaptureError(
                f"The trace would take {needed:,} bytes, and its disk has {free:,} free, of which the script may need "
                f"{self.reserve:,} to save what it trained. Make room, or capture to another disk (out, --out)."
            )
        if free < needed:
            logger.warning(
                f"The trace will take {needed:,} bytes, and its disk has {free:,} free. A full disk stops a capture, "
                "which continues when there is room again."
            )
