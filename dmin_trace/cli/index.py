"""The command index: builds an index beside a store."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dmin_trace.cli.console import progress_bar, show_log
from dmin_trace.cli.options import TracePath, Verbose
from dmin_trace.errors import SettingsError


def index(
    *,
    trace: TracePath,
    recall: Annotated[float, typer.Option(help="The part of the true 10 best that a query must find.")] = 0.99,
    fold: Annotated[str, typer.Option(help="Numbers for each timestep, or auto: the fewest that suffice.")] = "auto",
    m: Annotated[int, typer.Option("--M", help="HNSW: links of each sample.")] = 16,
    ef_construction: Annotated[int, typer.Option(help="HNSW: candidates considered when a sample is linked.")] = 200,
    directions: Annotated[
        int | None, typer.Option(help="Principal directions that deflated scores take out. Default: as measured.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Build an index beside a store, so that queries need not scan it. Measures the recall that it reaches."""
    from rich.progress import TaskID

    from dmin_trace.search import build_index, index_beside
    from dmin_trace.store import open_store
    from dmin_trace.views import describe_index, facts_table

    show_log(verbose)
    if fold != "auto" and not fold.isdecimal():
        raise SettingsError(f"--fold is {fold!r}; expected auto, or a number such as 128.")
    store = open_store(trace)
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, of: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step)
            progress.update(tasks[step], completed=done, total=of)

        facts = build_index(
            store,
            recall=recall,
            fold=None if fold == "auto" else int(fold),
            m=m,
            ef_construction=ef_construction,
            directions=directions,
            progress=show,
        )
    console = Console()
    title = str(index_beside(trace))
    console.print(facts_table(describe_index(facts, store), title, ascii_only=console.options.ascii_only))
