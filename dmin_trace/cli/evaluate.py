"""The commands evaluate labels, duplicates and lds: how good the scores of a trace are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dmin_trace.cli.console import progress_bar
from dmin_trace.cli.options import (
    Conditioning,
    EditedScript,
    Exact,
    ImagePaths,
    JsonPath,
    ScoreName,
    TracedWeights,
    TracePath,
    trace_facts,
)
from dmin_trace.errors import QueryError

if TYPE_CHECKING:
    from dmin_trace.audit import Measurement
    from dmin_trace.store import Store

app = typer.Typer(
    help="Measure how good the scores of a trace are. Likeness and influence are different things; measure both.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Counts = Annotated[
    list[int] | None,
    typer.Option("-k", help="Number of best samples to look at. May be repeated. Default: 5, 10, 50 and 100."),
]
QueryCount = Annotated[
    int, typer.Option("--queries", help="Number of stored samples used as queries, spread evenly.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the bootstrap that gives the 95 % intervals.")]


@app.command("labels")
def labels(
    *,
    trace: TracePath,
    column: Annotated[str, typer.Argument(help="A column of labels.")],
    k: Counts = None,
    queries: QueryCount = 100,
    seed: Seed = 0,
    score: ScoreName = "deflated",
    exact: Exact = False,
    json_path: JsonPath = None,
) -> None:
    """Detection rate: the part of the k best samples that have the label of the query.

    Stored samples are the queries, so no model is needed. The rate measures likeness, not influence.
    """
    from dmin_trace.audit import measure_labels
    from dmin_trace.store import open_store

    store = open_store(trace)
    with progress_bar() as progress:
        task = progress.add_task("Scoring the queries")
        found = measure_labels(
            store,
            column,
            ks=k,
            queries=queries,
            score=score,
            exact=exact,
            seed=seed,
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    _show(found, store, json_path)


@app.command("duplicates")
def duplicates(
    *,
    trace: TracePath,
    column: Annotated[str, typer.Argument(help="A column in which duplicates have the same value.")],
    k: Counts = None,
    queries: QueryCount = 100,
    seed: Seed = 0,
    score: ScoreName = "deflated",
    exact: Exact = False,
    json_path: JsonPath = None,
) -> None:
    """Recall of duplicates: the part of the duplicates of a query that is among the k best samples.

    Stored samples are the queries, so no model is needed. A score that misses duplicates is broken; one that finds
    them may still rank the rest badly.
    """
    from dmin_trace.audit import measure_duplicates
    from dmin_trace.store import open_store

    store = open_store(trace)
    with progress_bar() as progress:
        task = progress.add_task("Scoring the queries")
        found = measure_duplicates(
            store,
            column,
            ks=k,
            queries=queries,
            score=score,
            exact=exact,
            seed=seed,
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    _show(found, store, json_path)


@app.command("lds")
def lds(
    *,
    context: typer.Context,
    trace: TracePath,
    retrained: Annotated[
        Path,
        typer.Argument(
            metavar="MODELS",
            help="A file of numpy.savez with subsets, bool (models, samples), and losses (models, queries), of models "
            "that were trained again on subsets of the samples.",
        ),
    ],
    images: ImagePaths = None,
    sample: Annotated[
        list[int] | None, typer.Option(help="A stored sample as the query, instead of images. May be repeated.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt of each image, or one for all.")] = None,
    conditioning: Conditioning = None,
    weights: TracedWeights = None,
    seed: Seed = 0,
    score: ScoreName = "deflated",
    json_path: JsonPath = None,
    edited_script: EditedScript = False,
) -> None:
    """Linear datamodeling score: whether the scores predict which retrained model has the lower loss on a query.

    The queries are images, or stored samples, in the order of the losses. The score measures the influence of many
    samples together.
    """
    from dmin_trace.audit import measure_datamodeling, read_retrained
    from dmin_trace.query import capture_queries, read_inputs, sample_gradients
    from dmin_trace.store import open_store

    if bool(images) == bool(sample):
        raise QueryError("Give the queries: images, or stored samples with --sample, and not both.")
    if not images and (prompt or conditioning or weights):
        raise QueryError("--prompt, --conditioning and --weights are for images. Give images, or leave them out.")
    store = open_store(trace)
    inputs = read_inputs(images or [], prompt or [], conditioning or [])
    names: list[str | int] = [*(sample or []), *(given.image.name for given in inputs)]
    # Read before the queries are captured, which takes long.
    models = read_retrained(retrained, store, len(names))
    if sample:
        gradients = sample_gradients(store, sample)
    else:
        with Console(stderr=True).status("Capturing the gradients of the queries"):
            gradients = capture_queries(
                store,
                [given.image for given in inputs],
                [given.prompt for given in inputs],
                conditioning=[given.conditioning for given in inputs],
                weights=weights,
                command=context.obj,
                edited_script=edited_script,
            )
    with progress_bar() as progress:
        task = progress.add_task("Scoring every sample")
        found = measure_datamodeling(
            store,
            gradients,
            models,
            names,
            score=score,
            seed=seed,
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    _show(found, store, json_path)


def _show(found: Measurement, store: Store, json_path: Path | None) -> None:
    from dmin_trace.views import measure_table, measures_json

    console = Console()
    ascii_only = console.options.ascii_only
    console.print(measure_table(found.title, found.headings, found.rows, found.meaning, ascii_only=ascii_only))
    if json_path is not None:
        json_path.write_text(measures_json([found.values], trace_facts(store.header)), encoding="utf-8")
