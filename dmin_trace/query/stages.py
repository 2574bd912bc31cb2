"""What takes the time of a query, shown while it runs, and logged with the time that it took."""

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Stages:
    """The stages of a query, one after another."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        """`show` is called with what the query does now, in words."""
        self._show = show
        self._stage, self._began = "", 0.0

    def begin(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Begins a stage, which ends the one before; or goes on with it. Of `total` things `done` are done."""
        if stage != self._stage:
            self.end()
            self._stage, self._began = stage, time.perf_counter()
        if self._show is not None:
            self._show(f"{stage} {done:,} of {total:,}" if total else stage)

    def end(self) -> None:
        """Ends the last stage. A second call does nothing."""
        if self._stage:
            logger.info("%s: %.1f s.", self._stage, time.perf_counter() - self._began)
        self._stage = ""
