"""One capture at a time writes a store: a lock beside it, which the system takes back from a process that dies.

The file is `.NAME.lock` beside the store NAME. It is there while a capture runs, and after one that was killed; the
next one takes it over, and removes it at its end.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from dmin_trace.errors import TraceError

logger = logging.getLogger(__name__)

WAIT = 6.0
"""Seconds: the loader's workers of a killed process hold its lock until they notice, every 5 seconds."""
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class StoreLock:
    """The lock of one store, taken or not."""

    def __init__(self, store: Path) -> None:
        """The lock of the store at this path, which need not be there yet; its folder must."""
        self._store = store
        self._path = store.with_name(f".{store.name}.lock")
        # The script may end its loop in another thread than it began it in.
        self._lock = FileLock(self._path, thread_local=False)

    def take(self) -> None:
        """Takes the lock. Raises TraceError if another process has it, or if its file cannot be made."""
        try:
            self._lock.acquire(timeout=WAIT, poll_interval=0.2)
        except Timeout:
            raise TraceError(
                f"Another capture is writing {self._store}: it holds {self._path}. Wait until it has ended, or give "
                "another path (out, --out)."
            ) from None
        except NotImplementedError:
            self._go_without("locks are not supported")
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise TraceError(f"{self._store} cannot be written: {error.strerror or error}.") from None
            self._go_without(str(error.strerror or error))

    def release(self) -> None:
        """Gives the lock back and removes its file; a second call does nothing."""
        if self._lock.is_locked:
            # While it is held: who waits for it meanwhile finds that the file has no name any more, and makes another.
            self._path.unlink(missing_ok=True)
            self._lock.release()

    def _go_without(self, why: str) -> None:
        logger.warning("%s cannot be locked (%s): see to it that no other capture writes to it.", self._store, why)
        self._path.unlink(missing_ok=True)
