"""Several processes fill one store: they meet, and exchange errors and signals, so that all stop at the same step.

A training step may gather values from all processes, so each must run the same number of steps: one that fails runs on
until the next meeting, and its rows are discarded. They meet when the store is opened, after every chunk, and last.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from dmin_trace.errors import CaptureError, message_of


@dataclass
class Ranks:
    """The processes that fill one store together, each its own chunks.

    rank, count: the number of this process, from 0, and how many there are. The first makes the store.
    gather: waits until every process has called it, and returns the message of each, by rank.
    error: the error of this process that the others do not know yet.
    meeting: whether the other processes expect this one at their next meeting.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[str], list[str]] = lambda message: [message]
    error: Exception | None = field(default=None, init=False)
    meeting: bool = field(default=False, init=False)

    def hold(self, error: Exception) -> bool:
        """Keeps an error until the next meeting. Returns False, and keeps nothing, if no process waits for this one."""
        if not self.meeting or self.count == 1:
            return False
        self.error = self.error or error
        return True

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keeps an error in the block until the next meeting, or raises it if no other process waits for this one."""
        try:
            yield
        except Exception as error:
            if not self.hold(error):
                raise

    def meet(self, caught: int = 0) -> int:
        """Waits for the others, and returns the signal that any of them `caught`, or 0. Raises an error of any."""
        if self.count == 1:
            return caught
        message = json.dumps({"error": "" if self.error is None else message_of(self.error), "signal": caught})
        try:
            messages = [json.loads(text) for text in self.gather(message)]
        except Exception as error:
            self.meeting = False
            raise CaptureError(
                f"Process {self.rank} of {self.count} no longer reaches the others, so one of them has ended "
                f"({message_of(error).splitlines()[0][:200]}). Run the capture again: it continues with the chunks "
                "that are not in the store."
            ) from None
        for rank, told in enumerate(messages):
            if told["error"]:
                self.meeting = False
                raise self.error or CaptureError(f"Process {rank} of {self.count} failed: {told['error']}")
        return max(int(told["signal"]) for told in messages)


class FirstSignal:
    """While held, the first Ctrl-C or SIGTERM is noted, so that the current chunk can be finished.

    A second one does what it would have done without a capture. A signal for which another handler is set is left
    alone, as are all signals outside the main thread, where python runs handlers.

    caught: the number of the signal, 0 before one came.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[signal.Signals, object] = {}

    @property
    def name(self) -> str:
        """The name of the caught signal for a person to read; "" before one came."""
        return "Ctrl-C" if self.caught == signal.SIGINT else signal.Signals(self.caught).name if self.caught else ""

    def hold(self) -> None:
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
