"""The commands evaluate labels, duplicates and lds: how good the scores of a trace are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from dmin_trace.cli import options
from dmin_trace.cli.query import read_queries
from dmin_trace.errors import QueryError
from dmin_trace.views import measure_table, measures_json

if TYPE_CHECKING:
    from dmin_trace.audit import Measurement
    from dmin_trace.query import Trace

app = typer.Typer(help="Measure how good the scores of a trace are.", no_args_is_help=True, rich_markup_mode="rich")

MODELS_HELP = "Retrained models, by numpy.savez: subsets, bool (models, samples); losses (models, queries)."
Ks = Annotated[list[int] | None, typer.Option("-k", help="How many best samples; repeatable. Default: 5, 10, 50, 100.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the bootstrap that gives the 95 % intervals.")]

DUPLICATES_HELP = """Recall of duplicates: the fraction of a query's duplicates that are among its k best samples. A
score that misses duplicates is broken. Samples are the queries, so no model is needed."""
LABELS_HELP = """Detection rate: the fraction of the k best samples that have the label of the query. It measures
likeness, not influence. Samples are the queries, so no model is needed."""


@app.command("duplicates", help=DUPLICATES_HELP)
@app.command("labels", help=LABELS_HELP)
def evaluate_column(
    *,
    context: typer.Context,
    trace: options.TracePath,
    column: Annotated[str, typer.Argument(help="A column of labels, or of values that duplicates share.")],
    k: Ks = None,
    queries: Annotated[int, typer.Option(help="Number of samples used as queries, spread evenly.")] = 100,
    seed: Seed = 0,
    score: options.ScoreName = "deflated",
    exact: options.Exact = False,
    json_path: options.JsonPath = None,
) -> None:
    from dmin_trace.audit import measure_column
    from dmin_trace.query import open_trace

    opened = open_trace(trace)
    kind: Literal["labels", "duplicates"] = "labels" if context.info_name == "labels" else "duplicates"
    with Console(stderr=True).status("Scoring the queries"):
        found = measure_column(opened, column, kind, ks=k, queries=queries, score=score, exact=exact, seed=seed)
    _show(found, opened, json_path)


@app.command("lds")
def lds(
    *,
    context: typer.Context,
    trace: options.TracePath,
    models: Annotated[Path, typer.Argument(help=MODELS_HELP)],
    images: options.ImagePaths = None,
    sample: options.Samples = None,
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt of each image, or one for all.")] = None,
    conditioning: options.Conditioning = None,
    weights: options.TracedWeights = None,
    seed: Seed = 0,
    score: options.ScoreName = "deflated",
    json_path: options.JsonPath = None,
    edited_script: options.EditedScript = False,
    no_cache: options.NoCache = False,
) -> None:
    """Linear datamodeling score: how well scores predict which retrained model has the lower loss on a query.

    The queries are images or stored samples, in the order of the losses. It measures the influence of many samples
    together.
    """
    from dmin_trace.audit import measure_datamodeling, read_retrained
    from dmin_trace.query import open_trace, read_inputs

    if bool(images) == bool(sample):
        raise QueryError("Give the queries: images, or stored samples with --sample, and not both.")
    if not images and (prompt or conditioning or weights):
        raise QueryError("--prompt, --conditioning and --weights are for images. Give images, or leave them out.")
    opened = open_trace(trace)
    inputs = read_inputs(images or [], prompt or [], conditioning or [])
    # Read before the queries are captured, which takes long.
    retrained = read_retrained(models, len(opened), len(sample or inputs))
    with Console(stderr=True).status("Reading the queries") as status:
        asked = context.obj, edited_script, False, not no_cache, status.update
        queries = read_queries(opened, sample, inputs, weights, *asked)
        status.update("Scoring every sample")
        found = measure_datamodeling(opened, queries, retrained, score=score, seed=seed)
    _show(found, opened, json_path)


def _show(found: "Measurement", trace: "Trace", json_path: Path | None) -> None:
    console = Console()
    ascii_only = console.options.ascii_only
    console.print(measure_table(found.title, found.headings, found.rows, found.meaning, ascii_only=ascii_only))
    if json_path is not None:
        json_path.write_text(measures_json([found.values], options.trace_facts(trace)), encoding="utf-8")
