"""Ctrl-C and SIGTERM during a capture: the first is noted, so that the chunk in hand can be finished.

The handlers that were there come back with the first signal, so a second one does what it would have done without us.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class FirstSignal:
    """While held, the first Ctrl-C or SIGTERM is noted instead of ending the process.

    Only where nobody else has a handler for it, and in the main thread, which is where python runs them.

    caught: the signal's number, 0 until one came.
    """

    def __init__(self) -> None:
        """Nothing is held yet."""
        self.caught = 0
        self._before: dict[signal.Signals, object] = {}

    @property
    def name(self) -> str:
        """Of the signal that was caught, as a person knows it."""
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
        """Puts the handlers back that were there; a second call does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            # Somebody else may have set another one meanwhile.
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self.let_go()
