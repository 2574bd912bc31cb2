"""What commands print: notes, progress bars and the log. All texts are made harmless first."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from dmin_trace.views import harmless

MAX_NOTE_LENGTH, MAX_MESSAGE_LENGTH = 400, 4000


def print_note(console: Console, text: str, style: str = "dim") -> None:
    """Prints one line, which may quote a store or a file from anybody."""
    console.print(Text(harmless(text, MAX_NOTE_LENGTH), style=style))


def print_error(error: Exception) -> None:
    """Prints an error as one red line to standard error."""
    message = harmless(str(error), MAX_MESSAGE_LENGTH)
    Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar on standard error that is gone when it ends, and that is not drawn outside a terminal."""
    console = Console(stderr=True)
    columns = columns or (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def step_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each step of some work, which calls what this gives: with a step, how much is done, of how
    much."""
    tasks: dict[str, TaskID] = {}
    with progress_bar() as progress:

        def show(step: str, done: int, of: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step)
            progress.update(tasks[step], completed=done, total=of)

        yield show


def show_log(verbose: bool) -> bool:
    """Shows the library's warnings and errors, and with `verbose` all of its log. Returns `verbose`, for typer."""
    handler = _StderrHandler()
    handler.setFormatter(_HarmlessFormatter("dmin-trace: %(message)s"))
    library = logging.getLogger("dmin_trace")
    library.addHandler(handler)
    library.setLevel(logging.DEBUG if verbose else logging.WARNING)
    library.propagate = False
    return verbose


class _StderrHandler(logging.Handler):
    """Writes to what is standard error now: a line of progress puts itself in its place, and stays below the log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _HarmlessFormatter(logging.Formatter):
    """Formats a record as one harmless line, followed by its traceback if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        first, *traceback = text.split("\n") if record.exc_info else [text]
        return "\n".join([harmless(first, MAX_MESSAGE_LENGTH), *traceback])
