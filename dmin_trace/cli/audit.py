"""The command audit: which training samples a person should look at."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dmin_trace.cli import options
from dmin_trace.cli.console import print_note, step_bars
from dmin_trace.errors import SettingsError
from dmin_trace.views import audit_json, audit_lines, audit_tables, table_csv

IN_PAGE = 48
"""Samples of each list in a page, or as many as -k says, if that is more."""


def audit(
    *,
    trace: options.TracePath,
    column: Annotated[
        str | None, typer.Option(help="Labels or captions. Default: the first of the usual names.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of samples of each list to show.")] = 10,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=options.check_folder,
            help="Also write all that might be removed or looked at, and why: a line of JSON each. Nothing is removed.",
        ),
    ] = None,
    html_path: options.HtmlPath = None,
    json_path: options.JsonPath = None,
    csv_path: options.CsvPath = None,
    parquet_path: options.ParquetPath = None,
    verbose: options.Verbose = False,
) -> None:
    """Show near-copies, outliers, labels that do not fit and samples without influence. It needs no query.

    dmin-trace audit TRACE --out list.jsonl --html audit.html

    Nothing is changed: the list is for a person, or for a program of your own.
    """
    from dmin_trace.audit import audit_trace
    from dmin_trace.query import open_trace

    if k < 1:
        raise SettingsError(f"k is {k}; expected 1 or more.")
    opened = open_trace(trace, unfinished=True)
    with step_bars() as show:
        found = audit_trace(opened, column, progress=show)
    console = Console()
    for table in audit_tables(found, k, ascii_only=console.options.ascii_only):
        console.print(table)
        console.print()
    counted = f"{found.samples:,} samples were audited; {len(found.findings):,} findings. Nothing was changed."
    for note in (counted, *found.notes):
        print_note(console, note)
    if html_path is not None:
        found.to_html(html_path, max(k, IN_PAGE))
        print_note(console, f"Page: {html_path}", style="")
    if json_path is not None:
        json_path.write_text(audit_json(found, options.trace_facts(opened)), encoding="utf-8")
    if csv_path is not None:
        csv_path.write_text(table_csv(found.table), encoding="utf-8", newline="")
    if parquet_path is not None:
        found.to_parquet(parquet_path)
    if out is not None:
        out.write_text(audit_lines(found, opened.store.header.id), encoding="utf-8")
