"""The store that a capture writes: a new one, or one that an earlier capture left unfinished."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dmin_trace import store
from dmin_trace.capture.ranks import Ranks
from dmin_trace.capture.weights import Trainable
from dmin_trace.errors import CaptureError, TraceError
from dmin_trace.store import Header, Store, Writer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptureTarget:
    """Where the rows of a capture go.

    out: the path of the store.
    resume: whether to continue an unfinished store at `out`.
    like: the finished store that the queries are for; None for a capture of training samples.
    reserve: bytes that must stay free on the disk for what the script saves at its end; None for no such limit.
    trial: capture two samples, check them, and write nothing.
    created: called with the header of a new store.
    """

    out: Path
    resume: bool = True
    like: Store | None = None
    reserve: int | None = None
    trial: bool = False
    created: Callable[[Header], None] = lambda header: None


class CaptureOutput:
    """The store at the target's path. The first process locks it, and makes it."""

    def __init__(self, target: CaptureTarget, ranks: Ranks) -> None:
        """Touches nothing yet."""
        self._target, self._out, self._ranks = target, target.out, ranks
        self._leads = ranks.rank == 0 and target.like is None
        self._lock = store.StoreLock(target.out.absolute())
        self._existing = False

    def find(self) -> Store | None:
        """Locks the path, and returns the store that is there, if one is.

        Raises TraceError if the path cannot be written, another process writes it, or nothing may be continued.
        """
        if self._leads:
            try:
                store.make_folder(self._out.absolute().parent)
            except OSError as error:
                raise TraceError(f"{self._out} cannot be written: {error.strerror or error}.") from None
            self._lock.take()
        self._existing = self._out.exists()
        if not self._existing:
            return None
        if not self._target.resume:
            store.check_free(self._out)
        return store.open_store(self._out, unfinished=True)

    def prepare(self, trainable: Trainable, earlier: Store | None) -> bool:
        """Removes what killed captures left, and saves the weights, which queries need; `earlier` is continued.

        Returns whether this process has saved them.
        """
        if not self._leads:
            return False
        store.sweep(self._out.absolute())
        if earlier is not None and earlier.done.all():
            # The earlier capture ended between its last chunk and the mark that the store is complete.
            Writer(self._out, earlier.header).finish()
        trainable.save(store.weights_beside(self._out))
        return True

    def open(self, make_header: Callable[[], Header]) -> Writer | None:
        """Creates the store, or opens the one that is continued; all processes call it together.

        Returns None only if an error of this process waits for the next meeting.
        """
        writer: Writer | None = None
        with self._ranks.holding():
            header = make_header()
            if self._ranks.rank == 0:
                if not self._existing:
                    self._check_room(header)
                writer = (store.resume if self._existing else store.create)(self._out, header)
                self._target.created(writer.header)
        self._ranks.meet()
        with self._ranks.holding():
            if self._ranks.rank != 0:
                writer = store.resume(self._out, header)
        self._ranks.meet()
        return writer

    def _check_room(self, header: Header) -> None:
        """Raises CaptureError if the store would take the room that the script needs to save what it trained."""
        needed, free = store.bytes_of(header), shutil.disk_usage(self._out.absolute().parent).free
        reserve = self._target.reserve
        if reserve is not None and free < needed + reserve:
            raise CaptureError(
                f"The trace would take {needed:,} bytes, and its disk has {free:,} free, of which the script may need "
                f"{reserve:,} to save what it trained. Make room, or capture to another disk (out, --out)."
            )
        if free < needed:
            logger.warning(
                f"The trace will take {needed:,} bytes, and its disk has {free:,} free. A full disk stops a capture, "
                "which continues when there is room again."
            )

    def release(self) -> None:
        """Unlocks the path."""
        self._lock.release()
