"""The command query: which training samples influenced an image most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dmin_trace.cli.console import print_note
from dmin_trace.cli.options import (
    Conditioning,
    CsvPath,
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
    import numpy as np
    from numpy.typing import NDArray

    from dmin_trace.query import Answer, QueryInput
    from dmin_trace.store import Store
    from dmin_trace.views import QueryLabel


def query(
    *,
    context: typer.Context,
    trace: TracePath,
    images: ImagePaths = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The prompt of each image, repeated in their order, or one for all. Without images: images are made "
            "from the prompts with the saved model, and are the queries."
        ),
    ] = None,
    conditioning: Conditioning = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first image made from a prompt. Default: 0.")] = None,
    num: Annotated[int | None, typer.Option(help="Number of images made from each prompt. Default: 1.")] = None,
    made: Annotated[
        Path | None, typer.Option(help="A folder for the images made. Default: generated, beside the store.")
    ] = None,
    sample: Annotated[
        list[int] | None, typer.Option(help="A training sample as the query. May be repeated. Needs no model.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of training samples to show.")] = 10,
    weights: TracedWeights = None,
    json_path: JsonPath = None,
    csv_path: CsvPath = None,
    score: ScoreName = "deflated",
    exact: Exact = False,
    edited_script: EditedScript = False,
) -> None:
    """Show the most influential training samples for each image.

    dmin-trace query TRACE a.png b.png --prompt "a cat" --prompt "a dog"

    dmin-trace query TRACE folder-with-metadata.jsonl

    dmin-trace query TRACE --prompt "a cat" --num 4

    The script's command is remembered from the capture on this machine. Elsewhere give it after --.
    """
    from dmin_trace.query import (
        answer_queries,
        check_score,
        generate_images,
        read_inputs,
        sample_gradients,
    )
    from dmin_trace.search import check_k
    from dmin_trace.store import open_store
    from dmin_trace.views import QueryLabel

    if bool(images or prompt) == bool(sample):
        raise QueryError("Give images or prompts as queries, or training samples with --sample, and not both.")
    if conditioning and not images:
        raise QueryError("--conditioning says what images were made from. Give the images too.")
    for_prompts = {"--seed": seed, "--num": num, "--made": made}
    if (unused := [name for name, value in for_prompts.items() if value is not None]) and (images or sample):
        raise QueryError(f"{', '.join(unused)} is for images made from a prompt alone. Leave it out here.")
    # A capture that still runs can be queried for the samples that are done; the answer says how many.
    store = open_store(trace, unfinished=True)
    check_score(store, score)
    check_k(store, k)
    if sample:
        labels = [QueryLabel(name=f"sample {number}", prompt=None) for number in sample]
        gradients = sample_gradients(store, sample)
    else:
        with Console(stderr=True).status("Reading the queries") as status:
            if images:
                inputs = read_inputs(images, prompt or [], conditioning or [])
            else:
                status.update("Making images")
                folder = made or trace.absolute().parent / "generated"
                inputs = generate_images(
                    store, prompt or [], folder, num=1 if num is None else num, seed=seed or 0, command=context.obj
                )
            status.update("Capturing the gradients of the queries")
            gradients = capture_images(store, inputs, weights, context.obj, edited_script)
        labels = [QueryLabel(name=given.image.name, prompt=given.prompt) for given in inputs]
    with Console(stderr=True).status("Scoring"):
        answer = answer_queries(store, gradients, k=k, score=score, exact=exact)
    _print_answer(store, labels, answer)
    _write_answer(store, labels, answer, json_path, csv_path)


def capture_images(
    store: Store, inputs: Sequence[QueryInput], weights: Path | None, command: Sequence[str], edited_script: bool
) -> NDArray[np.float32]:
    """The gradients of images, (Q, T, v); `command` is the script's command line, or empty for the remembered one."""
    from dmin_trace.query import capture_queries

    return capture_queries(
        store,
        [given.image for given in inputs],
        [given.prompt for given in inputs],
        conditioning=[given.conditioning for given in inputs],
        weights=weights,
        command=command,
        edited_script=edited_script,
    )


def _print_answer(store: Store, labels: list[QueryLabel], answer: Answer) -> None:
    from dmin_trace.views import hits_table

    console = Console()
    for label, hits in zip(labels, answer.hits, strict=True):
        ascii_only = console.options.ascii_only
        console.print(hits_table(label, hits, store.header.timesteps, score=answer.score, ascii_only=ascii_only))
        console.print()
    print_note(console, answer.said)
    if answer.taken_out:
        print_note(console, f"{answer.score} scores: took out {answer.taken_out}")


def _write_answer(
    store: Store, labels: list[QueryLabel], answer: Answer, json_path: Path | None, csv_path: Path | None
) -> None:
    from dmin_trace.views import hits_csv, hits_json

    timesteps, score = store.header.timesteps, answer.score
    if json_path is not None:
        facts = {
            **trace_facts(store),
            "answered_by": "scan" if answer.recall is None else "index",
            "index_recall": answer.recall,
            "taken_out": answer.taken_out,
            "complete": store.complete,
            "samples_searched": len(store.rows_done),
        }
        json_path.write_text(hits_json(labels, answer.hits, timesteps, facts, score=score), encoding="utf-8")
    if csv_path is not None:
        text = hits_csv(labels, answer.hits, timesteps, score=score)
        csv_path.write_text(text, encoding="utf-8", newline="")
