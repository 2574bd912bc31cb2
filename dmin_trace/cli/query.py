"""The command query: which training samples influenced an image most."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dmin_trace.cli import options
from dmin_trace.cli.console import print_note
from dmin_trace.errors import QueryError
from dmin_trace.views import find_draw, hits_json, hits_table, shows_pictures, table_csv, totals_table

if TYPE_CHECKING:
    from dmin_trace.query import QueryInput, Trace
    from dmin_trace.store import Queries

MOST_AGAINST = 8
"""Samples most against each query that a page shows."""


def query(
    *,
    context: typer.Context,
    trace: options.TracePath,
    images: options.ImagePaths = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The prompt of each image, or one for all. Without images: what to make images from.",
            rich_help_panel=options.ASKING,
        ),
    ] = None,
    concept: options.Concepts = None,
    without: options.WithoutConcepts = None,
    conditioning: options.Conditioning = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first image made from a prompt. Default: 0.", rich_help_panel=options.ASKING),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(help="Number of images made from each prompt. Default: 1.", rich_help_panel=options.ASKING),
    ] = None,
    made: Annotated[
        Path | None,
        typer.Option(help="Folder for the images made. Default: generated.", rich_help_panel=options.ASKING),
    ] = None,
    sample: options.Samples = None,
    k: Annotated[
        int, typer.Option("-k", help="Number of training samples to show.", rich_help_panel=options.OUTPUT)
    ] = 10,
    html_path: options.HtmlPath = None,
    json_path: options.JsonPath = None,
    csv_path: options.CsvPath = None,
    parquet_path: options.ParquetPath = None,
    score: options.ScoreName = "deflated",
    exact: options.Exact = False,
    shown_images: options.ShownImages = "auto",
    weights: options.TracedWeights = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Show what groups have of the influence: a column, or folder. In --groups, a heading.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            help="The group of each file, as CSV (file_name,artist) or JSON, instead of a column.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="In groups, count near-copies once.", rich_help_panel=options.OUTPUT)
    ] = False,
    edited_script: options.EditedScript = False,
    any_device: options.AnyDevice = False,
    no_cache: options.NoCache = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the most influential training samples for each image.

    dmin-trace query TRACE a.png b.png --prompt "a cat" --prompt "a dog"

    dmin-trace query TRACE --prompt "a cat" --num 4

    dmin-trace query TRACE heart.png --prompt "a red heart" --concept red

    dmin-trace query TRACE a.png --by artist

    dmin-trace query TRACE a.png -k 24 --html answer.html

    The script's command is remembered from the capture on this machine. Elsewhere give it after --.
    """
    from dmin_trace.query import (
        QueryInput,
        Stages,
        generate_images,
        group_samples,
        open_trace,
        read_inputs,
        with_concepts,
    )
    from dmin_trace.search import check_score, usable_k

    if bool(images or prompt) == bool(sample):
        raise QueryError("Give images or prompts as queries, or training samples with --sample, and not both.")
    if conditioning and not images:
        raise QueryError("--conditioning says what images were made from. Give the images too.")
    if sample and (concept or without):
        raise QueryError(
            "--concept and --without are for images: what a trace keeps of a training sample is of its own caption. "
            "Give the sample's image, and its caption with --prompt."
        )
    if merge and by is None and groups is None:
        raise QueryError("--merge is for groups. Name them with --by or --groups, or leave it out.")
    for_prompts = {"--seed": seed, "--num": num, "--made": made}
    if (unused := [name for name, value in for_prompts.items() if value is not None]) and (images or sample):
        raise QueryError(f"{', '.join(unused)} is for images made from a prompt alone. Leave it out here.")
    # A capture that still runs can be queried for the samples that are done; the answer says how many.
    opened = open_trace(trace, unfinished=True)
    check_score(opened.store, score)
    k = usable_k(opened.store, k)
    grouped = by is not None or groups is not None
    if grouped:
        # A mistake in the groups is found before the queries are captured.
        group_samples(opened, by, groups)
    with Console(stderr=True).status("Reading the queries") as status:
        stages = Stages(status.update)
        if prompt and not images:
            # A concept that is not in its prompt is found before the images are made.
            pairs = with_concepts([QueryInput(trace, text) for text in prompt], concept or [], without or [])
            stages.begin("Making images")
            folder = made or trace.absolute().parent / "generated"
            count = 1 if num is None else num
            made_images = generate_images(opened.store, prompt, folder, num=count, seed=seed or 0, command=context.obj)
            of_prompts = [pair.without for pair in pairs for _ in range(count)]
            inputs = [replace(one, without=rest) for one, rest in zip(made_images, of_prompts, strict=True)]
        else:
            inputs = with_concepts(
                read_inputs(images or [], prompt or [], conditioning or []), concept or [], without or []
            )
        stages.end()
        asked = context.obj, edited_script, any_device, not no_cache, status.update
        queries = read_queries(opened, sample, inputs, weights, *asked)
        stages.begin("Searching")
        top = opened.top_k(queries, k, score, exact=exact)
        totals = opened.totals(queries, by, groups, merge=merge, score=score) if grouped else None
        # Those that are most against a query take a scan: they are looked for where there was one already.
        lowest = None
        if html_path is not None and top.answered_by.recall is None:
            lowest = opened.top_k(queries, min(k, MOST_AGAINST), score, largest=False)
        stages.end()
    console = Console()
    draw = find_draw(console) if shows_pictures(console, shown_images) else None
    for number in range(len(top)):
        console.print(hits_table(top, number, ascii_only=console.options.ascii_only, draw=draw))
        console.print()
        if totals is not None:
            console.print(totals_table(totals, number, ascii_only=console.options.ascii_only))
            console.print()
    print_note(console, top.answered_by.description)
    if top.deflation:
        print_note(console, f"{top.score} scores: took out {top.deflation}")
    if html_path is not None:
        top.to_html(html_path, lowest=lowest, totals=totals)
        if lowest is None:
            print_note(console, "The page is without the samples most against the queries, which take a scan: --exact.")
        print_note(console, f"Page: {html_path}", style="")
    if json_path is not None:
        facts = {
            **options.trace_facts(opened),
            "answered_by": "scan" if top.answered_by.recall is None else "index",
            "index_recall": top.answered_by.recall,
            "taken_out": top.deflation,
            "complete": opened.complete,
            "samples_searched": len(opened.store.rows_done),
        }
        json_path.write_text(hits_json(top, facts, totals), encoding="utf-8")
    if csv_path is not None:
        csv_path.write_text(table_csv(top.table), encoding="utf-8", newline="")
    if parquet_path is not None:
        top.to_parquet(parquet_path)
    if totals is not None and csv_path is not None:
        options.beside(csv_path, "groups").write_text(table_csv(totals.table), encoding="utf-8", newline="")
    if totals is not None and parquet_path is not None:
        totals.to_parquet(options.beside(parquet_path, "groups"))


def read_queries(
    trace: "Trace",
    samples: Sequence[int] | None,
    inputs: "Sequence[QueryInput]",
    weights: Path | None,
    command: Sequence[str],
    edited_script: bool,
    any_device: bool = False,
    cache: bool = True,
    progress: Callable[[str], None] | None = None,
) -> "Queries":
    """The queries: stored samples, or else images. `command` is the script's, or empty for the remembered one."""
    if samples:
        return trace.query_samples(samples)
    images, prompts = [given.image for given in inputs], [given.prompt for given in inputs]
    sources = [given.conditioning for given in inputs]
    return trace.query_images(
        images,
        prompts,
        without=[given.without for given in inputs],
        conditioning=sources,
        weights=weights,
        command=command,
        edited_script=edited_script,
        any_device=any_device,
        cache=cache,
        progress=progress,
    )
