"""Ctrl-C and SIGTERM during a capture: the first one is noted, so that the chunk in hand can be finished.

The first signal also puts the earlier handlers back, so a second one does what it would have done without a capture.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class FirstSignal:
    """While held, the first Ctrl-C or SIGTERM is noted and does not end the process.

    A signal for which another handler is set is left alone. So are all signals outside the main thread, which is where
    python runs handlers.

    caught: the number of the signal, 0 before one came.
    """

    def __init__(self) -> None:
        """Holds nothing yet."""
        self.caught = 0
        self._before: dict[signal.Signals, object] = {}

    @property
    def name(self) -> str:
        """The name of the caught signal for a person to read; "" before one came."""
        return "Ctrl-C" if self.caught == signal.SIGINT else signal.Signals(self.caught).name if self.caught else ""

    def hold(self) -> None:
        """Begins to note signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, handler in usual.items():
            if signal.getsignal(number) is handler:
                self._before[number] = signal.signal(number, self._note)

    def let_go(self) -> None:
        """Puts the earlier handlers back. A second call does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            # Another part of the program may have set its own in the meantime.
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self.let_go()
