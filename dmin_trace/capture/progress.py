"""The progress bar of a capture."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class SampleProgress:
    """A bar on standard error that counts samples; nothing is shown if that is not a terminal."""

    def __init__(self) -> None:
        """Shows nothing yet."""
        self._progress: Progress | None = None

    def start(self, samples: int) -> None:
        """Shows the bar."""
        console = Console(stderr=True)
        if not console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("capture"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TextColumn("[dim]{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("capture", total=samples, rate="")
        self._progress.start()

    def advance(self) -> None:
        """Counts one sample."""
        if self._progress is not None:
            rate = self._progress.tasks[0].speed
            self._progress.update(self._task, advance=1, rate=f"{rate:.1f}/s" if rate else "")

    def stop(self) -> None:
        """Ends the bar."""
        if self._progress is not None:
            self._progress.stop()
