"""The commands for a store: info, verify, index, pack."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from dmin_trace import views
from dmin_trace.cli.console import print_note, progress_bar, step_bars
from dmin_trace.cli.options import JsonPath, TracePath, Verbose
from dmin_trace.errors import SettingsError
from dmin_trace.settings import Codec, Dtype, make_settings


def info(*, trace: TracePath) -> None:
    """Show what a store holds and how complete it is."""
    from dmin_trace.search import read_facts
    from dmin_trace.store import open_store

    store = open_store(trace, unfinished=True)
    console = Console()
    facts = [
        *views.describe_store(store),
        ("index", views.summarize_index(read_facts(store), store.header.gradient_of)),
    ]
    console.print(views.facts_table(facts, str(trace), ascii_only=console.options.ascii_only))


def verify(
    *,
    trace: TracePath,
    json_path: JsonPath = None,
    damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="Mark damaged chunks as not done; the next capture makes them anew.")
    ] = False,
    failed: Annotated[
        bool, typer.Option("--drop-failed", help="The same for chunks with samples that could not be loaded.")
    ] = False,
) -> None:
    """Compare all of a store, its index and its weights with their checksums, and name each damaged file.

    The exit code is 0 if everything is whole, and 1 if something is damaged.
    """
    from dmin_trace.audit import verify_store
    from dmin_trace.store import drop_damaged, drop_failed

    with progress_bar(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("verify", total=None)
        found = verify_store(trace, progress=lambda done, of: progress.update(task, completed=done, total=of))
    console = Console()
    if found.damages:
        console.print(views.damage_table(found, str(trace), ascii_only=console.options.ascii_only))
    for note in found.notes:
        print_note(console, note)
    count = len(found.damages)
    result = f"{count} {'file is' if count == 1 else 'files are'} damaged" if count else "all is whole"
    compared = f"{found.files:,} files, {found.bytes:,} bytes were compared with their checksums"
    print_note(console, f"{trace}: {result}; {compared}.", style="red" if count else "green")
    if json_path is not None:
        json_path.write_text(views.verified_json(found), encoding="utf-8")
    dropped = (drop_damaged(trace) if damaged else []) + (drop_failed(trace) if failed else [])
    if dropped:
        numbers = ", ".join(map(str, dropped))
        print_note(console, f"{len(dropped)} chunks are no longer done: {numbers}. Run the capture again.", style="")
    elif damaged or failed:
        print_note(console, "No chunk had to be made anew; nothing was changed.", style="")
    if count:
        raise typer.Exit(1)


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
    from dmin_trace.search import build_index, index_beside
    from dmin_trace.store import open_store

    if fold != "auto" and not fold.isdecimal():
        raise SettingsError(f"--fold is {fold!r}; expected auto, or a number such as 128.")
    store = open_store(trace)
    with step_bars() as show:
        facts = build_index(
            store,
            recall=recall,
            fold=None if fold == "auto" else int(fold),
            m=m,
            ef_construction=ef_construction,
            directions=directions,
            progress=show,
        )
    console, described = Console(), views.describe_index(facts, store)
    console.print(views.facts_table(described, str(index_beside(trace)), ascii_only=console.options.ascii_only))


def pack(
    *,
    trace: TracePath,
    out: Annotated[Path, typer.Option(help="The new store.")],
    codec: Annotated[Codec | None, typer.Option(help="Compression on disk. Default: as it is.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="How gradients are stored. Default: as it is.")] = None,
    dimension: Annotated[
        int | None, typer.Option(help="v, v/2, v/4 and so on: gradients are folded. Default: as it is.")
    ] = None,
    no_thumbnails: Annotated[bool, typer.Option("--no-thumbnails", help="Leave the samples' pictures out.")] = False,
) -> None:
    """Copy a finished store in another form. The copy answers the same queries.

    dmin-trace pack TRACE --out small.zarr --dimension 4096

    dmin-trace pack TRACE --out archive.zarr --codec blosc --no-thumbnails
    """
    from dmin_trace.store import open_store, pack_store

    make_settings({"codec": codec, "dtype": dtype, "dimension": dimension})
    store = open_store(trace)
    with progress_bar() as bar:
        task = bar.add_task("pack", total=store.header.samples)
        advance = partial(bar.advance, task)
        packed = pack_store(
            store,
            out,
            codec=codec,
            dtype=dtype,
            dimension=dimension,
            thumbnails=not no_thumbnails,
            progress=advance,
        )
    size = f"{packed.bytes:,} bytes, {packed.bytes / store.bytes:.1%} of {store.bytes:,}"
    print_note(Console(stderr=True), f"{out}: {size}.", style="")
