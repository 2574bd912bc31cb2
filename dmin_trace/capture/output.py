"""The store that a capture writes: a new one, or one that an earlier capture left unfinished."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable

from dmin_trace.capture.ranks import Ranks
from dmin_trace.capture.source import CaptureTarget
from dmin_trace.capture.weights import Trainable
from dmin_trace.errors import CaptureError, TraceError
from dmin_trace.store import (
    Header,
    Store,
    StoreLock,
    Writer,
    bytes_of,
    check_free,
    create,
    make_folder,
    open_store,
    resume,
    sweep,
    weights_beside,
)

logger = logging.getLogger(__name__)


class CaptureOutput:
    """The store at the target's path. The first process locks it, makes it, and marks it complete.

    weights_saved: whether the trained weights lie beside the store.
    """

    def __init__(self, target: CaptureTarget, ranks: Ranks) -> None:
        """Touches nothing yet."""
        self.weights_saved = False
        self._target, self._out, self._ranks = target, target.out, ranks
        self._leads = ranks.rank == 0 and target.like is None
        self._lock: StoreLock | None = None
        self._existing = False

    def find(self) -> Store | None:
        """Locks the path, and returns the store that is there, if one is.

        Raises TraceError if the path cannot be written, another process writes it, or nothing may be continued.
        """
        path = self._out.absolute()
        if self._leads:
            try:
                make_folder(path.parent)
            except OSError as error:
                raise TraceError(f"{self._out} cannot be written: {error.strerror or error}.") from None
            lock = StoreLock(path)
            lock.take()
            self._lock = lock
        self._existing = self._out.exists()
        if not self._existing:
            return None
        if not self._target.resume:
            check_free(self._out)
        return open_store(self._out, unfinished=True)

    def prepare(self, trainable: Trainable, earlier: Store | None) -> None:
        """Removes what killed captures left, and saves the weights, which queries need; `earlier` is continued."""
        if not self._leads:
            return
        sweep(self._out.absolute())
        if earlier is not None and earlier.done.all():
            # The earlier capture ended between its last chunk and the mark that the store is complete.
            Writer(self._out, earlier.header).finish()
        trainable.save(weights_beside(self._out))
        self.weights_saved = True

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
                writer = (resume if self._existing else create)(self._out, header)
                self._target.created(writer.header)
        self._ranks.meet()
        with self._ranks.holding():
            if self._ranks.rank != 0:
                writer = resume(self._out, header)
        self._ranks.meet()
        return writer

    def _check_room(self, header: Header) -> None:
        """Raises CaptureError if the store would take the room that the script needs to save what it trained."""
        needed, free = bytes_of(header), shutil.disk_usage(self._out.absolute().parent).free
        reserve = self._target.reserve
        if reserve is not None and free < needed + reserve:
            raise CaptureError(
                f"The trace would take {needed:,} bytes, and its disk has {free:,} free, of which the script may need "
                f"{reserve:,} to save what it trained. Make room, or capture to another disk (out, --out)."
            )
        if free < needed:
            logger.warning(
                "The trace will take %s bytes, and its disk has %s free. A full disk stops a capture, which continues "
                "when there is room again.",
                f"{needed:,}",
                f"{free:,}",
            )

    def release(self) -> None:
        """Unlocks the path."""
        if self._lock is not None:
            self._lock.release()
