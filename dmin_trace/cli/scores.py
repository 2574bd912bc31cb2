"""The command scores: the score of every training sample, for programs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dmin_trace.cli import options
from dmin_trace.cli.console import print_note, progress_bar
from dmin_trace.cli.query import read_queries
from dmin_trace.errors import QueryError


def scores(
    *,
    context: typer.Context,
    trace: options.TracePath,
    images: options.ImagePaths = None,
    out: Annotated[
        Path, typer.Option(callback=options.check_folder, help="The file: a table (.parquet), or numbers alone (.npy).")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt of each image, or one for all.")] = None,
    concept: options.Concepts = None,
    without: options.WithoutConcepts = None,
    conditioning: options.Conditioning = None,
    sample: options.Samples = None,
    per_timestep: Annotated[bool, typer.Option("--per-timestep", help="The score at each timestep too.")] = False,
    weights: options.TracedWeights = None,
    score: options.ScoreName = "deflated",
    edited_script: options.EditedScript = False,
    any_device: options.AnyDevice = False,
    no_cache: options.NoCache = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the influence score of every training sample for each image to a file.

    dmin-trace scores TRACE a.png b.png --out scores.parquet

    A .npy file has one row for each query and one column for each sample, in the order of the data set; with
    --per-timestep, in place of each score, its parts.
    """
    from dmin_trace.query import check_scores_path, open_trace, read_inputs, with_concepts
    from dmin_trace.search import check_score

    check_scores_path(out)
    if bool(images) == bool(sample):
        raise QueryError("Give images as queries, or training samples with --sample, and not both.")
    if sample and (prompt or concept or without or conditioning or weights):
        raise QueryError("--prompt, --concept, --without, --conditioning and --weights are for images. Leave them out.")
    opened = open_trace(trace, unfinished=True)
    check_score(opened.store, score)
    with Console(stderr=True).status("Reading the queries") as status:
        inputs = read_inputs(images or [], prompt or [], conditioning or [])
        inputs = with_concepts(inputs, concept or [], without or [])
        asked = context.obj, edited_script, any_device, not no_cache, status.update
        queries = read_queries(opened, sample, inputs, weights, *asked)
    with progress_bar() as progress:
        task = progress.add_task("writing scores", total=len(queries))
        opened.write_scores(
            queries,
            out,
            score,
            per_timestep=per_timestep,
            progress=lambda done: progress.update(task, completed=done),
        )
    count = f"{len(queries):,} {'query' if len(queries) == 1 else 'queries'}"
    print_note(Console(stderr=True), f"{out}: {score} scores of {len(opened):,} samples for {count}.", style="")
