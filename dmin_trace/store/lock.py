"""The lock of a store: one process at a time writes it.

The lock's file is `.NAME.lock` beside the store NAME. The system releases the lock of a process that dies; its file
stays, and the next capture takes the lock and removes the file at its end.
"""

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from dmin_trace.errors import TraceError

logger = logging.getLogger(__name__)

WAIT_SECONDS = 6.0
"""The loader's workers of a killed process hold its lock until they notice, which they check every 5 seconds."""
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class StoreLock:
    """The lock of the store at a path. The store may not exist yet; its folder must."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._path = store.with_name(f".{store.name}.lock")
        # A script may end its loop in another thread than the one that took the lock.
        self._lock = FileLock(self._path, thread_local=False)

    def take(self) -> None:
        """Takes the lock. Raises TraceError if another process holds it, or if its file cannot be made."""
        try:
            self._lock.acquire(timeout=WAIT_SECONDS, poll_interval=0.2)
        except Timeout:
            raise TraceError(
                f"Another capture is writing {self._store}: it holds {self._path}. Wait until it has ended, or give "
                "another path (out, --out)."
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise TraceError(f"{self._store} cannot be written: {error.strerror or error}.") from None
            why = getattr(error, "strerror", None) or "locks are not supported"
            logger.warning("%s cannot be locked (%s): make sure that no other capture writes it.", self._store, why)
            self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Releases the lock and removes its file. A second call does nothing."""
        if self._lock.is_locked:
            # The file is removed first: a process that waits for it then finds it gone, and makes another.
            self._path.unlink(missing_ok=True)
            self._lock.release()
