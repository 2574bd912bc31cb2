"""The progress bar of a capture."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class SampleProgress:
    """A bar on standard error that counts samples; nothing is shown if that is not a terminal."""

    def __init__(self) -> None:
        """Shows nothing yet."""
        console = Console(stderr=True)
        texts = TextColumn("capture"), BarColumn(), MofNCompleteColumn(), TextColumn("samples")
        times = TextColumn("[dim]{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Progress(*texts, *times, console=console, disable=not console.is_terminal)

    def start(self, samples: int) -> None:
        """Shows the bar."""
        self._bar.add_task("capture", total=samples, rate="")
        self._bar.start()

    def advance(self) -> None:
        """Counts one sample, once the bar is shown."""
        for task in self._bar.tasks:
            self._bar.update(task.id, advance=1, rate=f"{task.speed:.1f}/s" if task.speed else "")

    def stop(self) -> None:
        """Ends the bar."""
        self._bar.stop()
