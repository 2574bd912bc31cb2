"""The command line: parses, calls, prints; nothing else.

dmin-trace estimate -- SCRIPT ARGS              what a capture would take: time, disk, memory
dmin-trace run -- SCRIPT ARGS                   train, and capture at the end
dmin-trace capture --weights DIR -- SCRIPT ARGS capture a trained model
dmin-trace query TRACE IMAGE...                 which training samples made this image?
dmin-trace index TRACE                          make queries fast
dmin-trace info TRACE                           what a store holds
dmin-trace evaluate TRACE --label COLUMN        how good its attributions are
dmin-trace verify TRACE                         whether anything in it is damaged
dmin-trace pack TRACE --out NEW                 rewrite a store: smaller, or with another codec
dmin-trace demo                                 all of it on handwritten digits
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dmin_trace.errors import DminTraceError, QueryError, ScriptError, SettingsError, StoppedError
from dmin_trace.version import VERSION

LONGEST_ERROR = 4000

app = typer.Typer(
    name="dmin-trace",
    help="Which training samples made the diffusion model make this image?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path | None, typer.Option(help="The store. Default: trace.zarr in the script's output_dir.")]
Timesteps = Annotated[str | None, typer.Option(help="A count, or a list such as 100,500,900. Default: 10.")]
Dimension = Annotated[int | None, typer.Option(help="Length of a compressed gradient, a power of two. Default: 16384.")]
Dtype = Annotated[str | None, typer.Option(help="int8, float16 or float32. Default: int8.")]
ProjectionKind = Annotated[str | None, typer.Option(help="rotation or uniform. Default: rotation.")]
Codec = Annotated[str | None, typer.Option(help="none, or blosc for archives: smaller and slower. Default: none.")]
TransformKind = Annotated[
    str | None, typer.Option("--transform", help="What is done to gradients: sign, or none (the paper). Default: sign.")
]
Draws = Annotated[int | None, typer.Option(help="Noises drawn at each timestep, gradients averaged. Default: 1.")]
Seed = Annotated[int | None, typer.Option(help="Of the projection and the shared noise. Default: 0.")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="A dataset column to keep. May be repeated.")]
EditedScript = Annotated[
    bool,
    typer.Option(
        "--edited-script",
        help="The script was edited since the trace was begun, but neither its loss nor its data: go on with it.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens.")]


@app.command("run")
def run_command(
    context: typer.Context,
    out: Out = None,
    timesteps: Timesteps = None,
    dimension: Dimension = None,
    dtype: Dtype = None,
    projection: ProjectionKind = None,
    codec: Codec = None,
    seed: Seed = None,
    draws: Draws = None,
    transform: TransformKind = None,
    columns: Columns = None,
    max_train_steps: Annotated[int | None, typer.Option(help="Optimizer steps at which the loop breaks.")] = None,
    num_epochs: Annotated[int | None, typer.Option(help="Times the loop goes through its data.")] = None,
    strict: Annotated[bool, typer.Option(help="An error in the capture ends the training.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train with SCRIPT ARGS (after --), and capture at the end of the training. The script needs no change."""
    from dmin_trace.capture.launch import run_script
    from dmin_trace.command import Job

    _log(verbose)
    run_script(
        Job(
            mode="final",
            command=_script(context),
            settings=_settings(timesteps, dimension, dtype, projection, codec, seed, draws, transform, columns),
            out=None if out is None else str(out.absolute()),
            max_train_steps=max_train_steps,
            num_epochs=num_epochs,
            strict=strict,
        )
    )


@app.command("capture")
def capture_command(
    context: typer.Context,
    weights: Annotated[Path, typer.Option(help="The trained weights: a safetensors file, or a folder with one.")],
    out: Out = None,
    timesteps: Timesteps = None,
    dimension: Dimension = None,
    dtype: Dtype = None,
    projection: ProjectionKind = None,
    codec: Codec = None,
    seed: Seed = None,
    draws: Draws = None,
    transform: TransformKind = None,
    columns: Columns = None,
    edited_script: EditedScript = False,
    verbose: Verbose = False,
) -> None:
    """Capture a trained model: SCRIPT ARGS (after --) with the saved weights. Resumes an unfinished store."""
    from dmin_trace.capture.launch import run_script
    from dmin_trace.command import Job

    _log(verbose)
    run_script(
        Job(
            mode="now",
            command=_script(context),
            settings=_settings(timesteps, dimension, dtype, projection, codec, seed, draws, transform, columns),
            out=None if out is None else str(out.absolute()),
            weights=str(weights.absolute()),
            edited_script=edited_script,
        )
    )


@app.command("estimate")
def estimate_command(
    context: typer.Context,
    timesteps: Timesteps = None,
    dimension: Dimension = None,
    dtype: Dtype = None,
    projection: ProjectionKind = None,
    seed: Seed = None,
    draws: Draws = None,
    transform: TransformKind = None,
    columns: Columns = None,
    verbose: Verbose = False,
) -> None:
    """Capture two samples of SCRIPT ARGS (after --), keep nothing of them, and say what a whole capture would take."""
    from dmin_trace import views as report
    from dmin_trace.capture.estimate import describe_cost, estimate_cost
    from dmin_trace.capture.launch import run_script
    from dmin_trace.command import Job

    _log(verbose)
    settings = _settings(timesteps, dimension, dtype, projection, None, seed, draws, transform, columns)
    capture = run_script(Job(mode="estimate", command=_script(context), settings=settings))
    folder = Path() if capture.out is None else capture.out.parent
    cost = describe_cost(estimate_cost(capture.recorder, capture.seconds_a_sample, folder))
    console = Console()
    title = "A capture of this script, as two samples show"
    console.print(report.facts_table(cost, title, ascii_only=console.options.ascii_only))


@app.command("query")
def query_command(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(help="The store.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGES]...",
            help="Generated images; folders of them, with prompts in metadata.jsonl; or JSON-lines files of "
            '{"file_name": FILE, "text": PROMPT}.',
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The prompt of each image, repeated in their order, or one for all. Without images: make one from "
            "the saved model, and ask about that."
        ),
    ] = None,
    conditioning: Annotated[
        list[Path] | None,
        typer.Option(help="What each image was made from (ControlNet, InstructPix2Pix), likewise."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first image made from a prompt. Default: 0.")] = None,
    num: Annotated[int | None, typer.Option(help="How many images to make from each prompt. Default: 1.")] = None,
    made: Annotated[
        Path | None, typer.Option(help="A folder for the images made. Default: generated, beside the store.")
    ] = None,
    sample: Annotated[list[int] | None, typer.Option(help="Ask with a training sample; needs no model.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many training samples to show.")] = 10,
    weights: Annotated[Path | None, typer.Option(help="The traced weights. Default: those beside the store.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the answer as JSON.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Also write the answer as CSV.")] = None,
    score: Annotated[
        str,
        typer.Option(
            help="deflated: without what all samples share, nearest to what caused it. dmin, the paper's: what looks "
            "like it, mostly."
        ),
    ] = "deflated",
    exact: Annotated[bool, typer.Option("--exact", help="Scan every sample, even if there is an index.")] = False,
    edited_script: EditedScript = False,
) -> None:
    """Show the training samples that made the model make each image.

    dmin-trace query TRACE a.png b.png --prompt "a cat" --prompt "a dog"

    dmin-trace query TRACE folder-with-metadata.jsonl

    dmin-trace query TRACE --prompt "a cat" --num 4

    The script's command is remembered from the capture on this machine; elsewhere give it after --.
    """
    from dmin_trace import query, store
    from dmin_trace import query as questions
    from dmin_trace import views as report
    from dmin_trace.search import check_k

    if bool(images or prompt) == bool(sample):
        raise QueryError("Give images or prompts to ask about, or training samples with --sample, and not both.")
    if conditioning and not images:
        raise QueryError("--conditioning says what images were made from. Give the images too.")
    making = {"--seed": seed, "--num": num, "--made": made}
    if (unused := [name for name, value in making.items() if value is not None]) and (images or sample):
        raise QueryError(f"{', '.join(unused)} is for images made from a prompt alone. Leave it out here.")
    for path in (json_path, csv_path):
        if path is not None and not path.parent.is_dir():
            raise QueryError(f"There is no folder {path.parent} to write {path.name} to.")
    # While the capture runs, what is done can be asked; the answer says how much that is.
    opened = store.open_store(trace, unfinished=True)
    scored = query.check_score(opened, score)
    check_k(opened, k)
    console = Console()
    if sample:
        shown = [report.Question(name=f"sample {number}", prompt=None) for number in sample]
        gradients = query.sample_queries(opened, sample).gradients
    else:
        with Console(stderr=True).status("Reading the questions") as status:
            if images:
                asked = questions.read_inputs(images, prompt or [], conditioning or [])
            else:
                status.update("Making images")
                folder = made or trace.absolute().parent / "generated"
                asked = query.generate_images(
                    opened, prompt or [], folder, num=1 if num is None else num, seed=seed or 0, command=context.obj
                )
            status.update("Capturing the gradients of the queries")
            files, prompts = [a.image for a in asked], [a.prompt for a in asked]
            behind = [a.conditioning for a in asked]
            gradients = query.capture_queries(
                opened,
                files,
                prompts,
                conditioning=behind,
                weights=weights,
                command=context.obj,
                edited_script=edited_script,
            ).gradients
        shown = [report.Question(name=a.image.name, prompt=a.prompt) for a in asked]
    with Console(stderr=True).status("Scoring"):
        answer = query.answer_queries(opened, gradients, k=k, score=scored, exact=exact)
    hits, timesteps = answer.hits, opened.header.timesteps
    for question, found in zip(shown, hits, strict=True):
        table = report.hits_table(question, found, timesteps, score=scored, ascii_only=console.options.ascii_only)
        console.print(table)
        console.print()
    console.print(Text(report.harmless(answer.answered_by.description, 400), style="dim"))
    if answer.deflation:
        console.print(Text(report.harmless(f"{scored} scores: took out {answer.deflation}", 400), style="dim"))
    if json_path is not None:
        facts = {"id": opened.header.id, "samples": opened.header.samples, "weights": opened.header.weights}
        facts |= {"answered_by": "scan" if answer.answered_by.recall is None else "index"}
        facts["index_recall"] = answer.answered_by.recall
        facts["taken_out"] = answer.deflation
        facts |= {"complete": opened.complete, "samples_searched": len(opened.rows_done)}
        json_path.write_text(report.to_json(shown, hits, timesteps, facts, score=scored), encoding="utf-8")
    if csv_path is not None:
        csv_path.write_text(report.to_csv(shown, hits, timesteps, score=scored), encoding="utf-8", newline="")


@app.command("index")
def index_command(
    trace: Annotated[Path, typer.Argument(help="The store.")],
    recall: Annotated[float, typer.Option(help="What part of the true 10 best a query is to find.")] = 0.99,
    fold: Annotated[
        str, typer.Option(help="Numbers of a timestep in the index, or auto: as few as the recall allows.")
    ] = "auto",
    m: Annotated[int, typer.Option("--M", help="HNSW: links of a sample.")] = 16,
    ef_construction: Annotated[int, typer.Option(help="HNSW: samples in view when one is linked.")] = 200,
    directions: Annotated[
        int | None,
        typer.Option(help="Deflated scores: directions to take out; 0 keeps none. Default: those that samples share."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Build an index beside a store, so that queries need not scan it. Measures the recall that it reaches."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from dmin_trace import search as index
    from dmin_trace import store
    from dmin_trace import views as report
    from dmin_trace.views import describe

    _log(verbose)
    if fold != "auto" and not fold.isdecimal():
        raise SettingsError(f"--fold is {fold!r}; expected auto, or a number such as 128.")
    opened = store.open_store(trace)
    console, to_errors = Console(), Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=to_errors, transient=True, disable=not to_errors.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, of: int) -> None:
            task = tasks[what] if what in tasks else tasks.setdefault(what, progress.add_task(what))
            progress.update(task, completed=done, total=of)

        facts = index.build_index(
            opened,
            recall=recall,
            fold=None if fold == "auto" else int(fold),
            m=m,
            ef_construction=ef_construction,
            directions=directions,
            progress=show,
        )
    title = str(index.index_beside(trace))
    console.print(report.facts_table(describe.index_facts(facts, opened), title, ascii_only=console.options.ascii_only))


@app.command("info")
def info_command(trace: Annotated[Path, typer.Argument(help="The store.")]) -> None:
    """Show what a store holds and how complete it is."""
    from dmin_trace import search as index
    from dmin_trace import store
    from dmin_trace import views as report
    from dmin_trace.views import describe

    opened = store.open_store(trace, unfinished=True)
    console = Console()
    facts = [*describe.store_facts(opened), ("index", describe.index_summary(index.read_facts(opened)))]
    table = report.facts_table(facts, str(trace), ascii_only=console.options.ascii_only)
    console.print(table)


@app.command("verify")
def verify_command(
    trace: Annotated[Path, typer.Argument(help="The store.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write what was found as JSON.")] = None,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="Mark damaged chunks as not done: a capture makes them anew.")
    ] = False,
    drop_failed: Annotated[
        bool, typer.Option("--drop-failed", help="Likewise the chunks with samples that could not be loaded.")
    ] = False,
) -> None:
    """Read all of a store, its index and the weights beside it, and name every chunk and file that is damaged.

    Exit code 0 if nothing is damaged, 1 otherwise. To repair a store: verify --drop-damaged, then dmin-trace capture.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from dmin_trace import audit as verify
    from dmin_trace import views as report

    if json_path is not None and not json_path.parent.is_dir():
        raise QueryError(f"There is no folder {json_path.parent} to write {json_path.name} to.")
    console, to_errors = Console(), Console(stderr=True)
    bars = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*bars, console=to_errors, transient=True, disable=not to_errors.is_terminal) as progress:
        task = progress.add_task("verify", total=None)
        found = verify.verify_store(trace, progress=lambda done, of: progress.update(task, completed=done, total=of))
    if found.damages:
        console.print(report.damage_table(found, str(trace), ascii_only=console.options.ascii_only))
    for note in found.notes:
        console.print(Text(report.harmless(note, 400), style="dim"))
    checked = f"{found.files:,} files, {found.bytes:,} bytes were compared with their checksums"
    count = len(found.damages)
    said = f"{count} {'file is' if count == 1 else 'files are'} damaged" if count else "all is whole"
    style = "red" if found.damages else "green"
    console.print(Text(report.harmless(f"{trace}: {said}; {checked}.", 400), style=style))
    if json_path is not None:
        json_path.write_text(report.verified_json(found), encoding="utf-8")
    from dmin_trace import store

    for wanted, drop in ((drop_damaged, store.drop_damaged), (drop_failed, store.drop_failed)):
        if wanted:
            chunks = drop(trace)
            console.print(Text(f"{len(chunks)} chunks are no longer done. Run dmin-trace capture to make them anew."))
    if found.damages:
        raise typer.Exit(1)


@app.command("evaluate")
def evaluate_command(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(help="The store.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGES]...", help="For --lds: the queries, in the order of the losses, as query takes them."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Detection rate by this column: stored samples ask; what part of their k best bear their label? Needs "
            "no model. It says whether what is found is alike; likeness is not cause."
        ),
    ] = None,
    duplicates: Annotated[
        str | None,
        typer.Option(
            help="Recall of copies: samples with the same value in this column are copies of one another; what part of "
            "them is among their k best? Needs no model. A score that misses them is broken; one that finds them "
            "may rank the rest badly."
        ),
    ] = None,
    lds: Annotated[
        Path | None,
        typer.Option(
            help="Linear datamodeling score, on models that you trained again on subsets of the samples: a file of "
            "numpy.savez with subsets, bool (models, samples), and losses (models, queries). Do scores foretell "
            "which model has the lower loss on a query? It says whether what is found are causes, of many samples "
            "together."
        ),
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="For --lds: stored samples as queries instead of images, such as 3,17,40.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="For --lds: the prompt of each image, or one for all.")] = (
        None
    ),
    conditioning: Annotated[
        list[Path] | None, typer.Option(help="For --lds: what each image was made from, likewise.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="For --lds: the traced weights. Default: those beside the store.")
    ] = None,
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            "-k",
            help="How many of the best to look at. Default: 5,10,50,100. An index is asked for one more, the sample "
            "that asks.",
        ),
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="How many stored samples ask, spread evenly. Default: 100.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap that gives the 95 % intervals.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write all figures, of every query too, as JSON.")
    ] = None,
    score: Annotated[str, typer.Option(help="The score that is measured: deflated or dmin, as query has them.")] = (
        "deflated"
    ),
    exact: Annotated[bool, typer.Option("--exact", help="Scan every sample, even if there is an index.")] = False,
    edited_script: EditedScript = False,
) -> None:
    """Measure how good the attributions of a trace are. Likeness and cause are different things; measure both.

    dmin-trace evaluate TRACE --label label

    dmin-trace evaluate TRACE --duplicates file_name --k 1,10

    dmin-trace evaluate TRACE queries/ --lds retrained.npz
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from dmin_trace import audit as examine
    from dmin_trace import query, store
    from dmin_trace import query as questions
    from dmin_trace import views as report

    if label is None and duplicates is None and lds is None:
        raise QueryError("Nothing was asked for. Give one of --label, --duplicates and --lds, or several.")
    if lds is not None and bool(images) == bool(samples):
        raise QueryError("--lds needs its queries: give the images, or stored samples with --samples, and not both.")
    for_lds = {"images": images, "--samples": samples, "--weights": weights}
    if lds is None and (unused := [name for name, value in for_lds.items() if value]):
        raise QueryError(f"{', '.join(unused)} is for --lds, which was not given. Leave it out.")
    for_images = {"--prompt": prompt, "--conditioning": conditioning}
    if not images and (unused := [name for name, value in for_images.items() if value]):
        raise QueryError(f"{', '.join(unused)} is for the images of --lds. Give them too.")
    for_columns = {"--k": k, "--queries": queries}
    if (
        label is None
        and duplicates is None
        and (unused := [n for n, value in for_columns.items() if value is not None])
    ):
        raise QueryError(f"{', '.join(unused)} is for --label and --duplicates. Leave it out.")
    if seed < 0:
        raise SettingsError(f"--seed is {seed}; expected 0 or more.")
    ks = None if k is None else _numbers("--k", k, "5,10,50")
    chosen = None if samples is None else _numbers("--samples", samples, "3,17,40")
    if json_path is not None and not json_path.parent.is_dir():
        raise QueryError(f"There is no folder {json_path.parent} to write {json_path.name} to.")
    opened = store.open_store(trace)
    kind = query.check_score(opened, score)
    count = examine.QUERIES if queries is None else queries
    console, to_errors = Console(), Console(stderr=True)
    findings, gradients = [], None
    if lds is not None:
        asked = questions.read_inputs(images or [], prompt or [], conditioning or [])
        names: list[str | int] = [*(chosen or []), *(a.image.name for a in asked)]
        # Before the queries are captured, which takes long.
        retrained = examine.read_retrained(lds, opened, len(names))
        if chosen is not None:
            gradients = examine.stored_gradients(opened, chosen)
        else:
            with to_errors.status("Capturing the gradients of the queries"):
                gradients = query.capture_queries(
                    opened,
                    [a.image for a in asked],
                    [a.prompt for a in asked],
                    conditioning=[a.conditioning for a in asked],
                    weights=weights,
                    command=context.obj,
                    edited_script=edited_script,
                ).gradients
    bars = TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()
    with Progress(*bars, console=to_errors, transient=True, disable=not to_errors.is_terminal) as progress:

        def show(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what)
            return lambda done, of: progress.update(task, completed=done, total=of)

        for column, measure in ((label, examine.detection), (duplicates, examine.copies)):
            if column is not None:
                shown = show(f"Asking by {report.harmless(column)}")
                findings.append(
                    measure(opened, column, ks=ks, queries=count, kind=kind, exact=exact, seed=seed, progress=shown)
                )
        if gradients is not None:
            shown = show("Scoring every sample")
            findings.append(
                examine.datamodeling(opened, gradients, retrained, names, kind=kind, seed=seed, progress=shown)
            )
    for found in findings:
        table = report.measure_table(
            found.title, found.headings, found.rows, found.meaning, ascii_only=console.options.ascii_only
        )
        console.print(table)
        console.print()
    if json_path is not None:
        facts = {"id": opened.header.id, "samples": opened.header.samples, "weights": opened.header.weights}
        json_path.write_text(report.measures_json([found.facts for found in findings], facts), encoding="utf-8")


@app.command("pack")
def pack_command(
    trace: Annotated[Path, typer.Argument(help="The store.")],
    out: Annotated[Path, typer.Option(help="The new store.")],
    codec: Annotated[
        str | None, typer.Option(help="none or blosc. Default: that of the store, as for the rest.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="int8, float16 or float32.")] = None,
    dimension: Annotated[int | None, typer.Option(help="v, v/2, v/4 and so on: sketches are folded.")] = None,
) -> None:
    """Rewrite a finished store with another codec, dtype or fewer dimensions. It answers the same questions."""
    from rich.progress import Progress

    from dmin_trace import store
    from dmin_trace import store as pack
    from dmin_trace.settings import make_settings

    given = {"codec": codec, "dtype": dtype, "dimension": dimension}
    checked = make_settings(given)
    opened = store.open_store(trace)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("pack", total=opened.header.samples)
        packed = pack.pack_store(
            opened,
            out,
            codec=None if codec is None else checked.codec,
            dtype=None if dtype is None else checked.dtype,
            dimension=dimension,
            progress=lambda samples: progress.advance(task, samples),
        )
    before, after = opened.bytes, packed.bytes
    console.print(Text(f"{out}: {after:,} bytes, {100 * after / before:.1f}% of {before:,}."))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="A folder for the model, the trace and the picture.")] = Path(
        "dmin-trace-demo"
    ),
) -> None:
    """Train on handwritten digits, generate some, and show which training digits they come from. Takes minutes."""
    from dmin_trace.cli.demo import run_demo

    run_demo(out, Console())


def _version(value: bool) -> None:
    if value:
        print(f"dmin-trace {VERSION}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None:
    pass


def _settings(
    timesteps: str | None,
    dimension: int | None,
    dtype: str | None,
    projection: str | None,
    codec: str | None,
    seed: int | None,
    draws: int | None,
    transform: str | None,
    columns: Sequence[str] | None,
) -> dict[str, Any]:
    """The settings that were given, checked before anything runs."""
    from dmin_trace.settings import make_settings

    steps: int | list[int] | None = None
    if timesteps is not None:
        try:
            steps = [int(t) for t in timesteps.split(",")] if "," in timesteps else int(timesteps)
        except ValueError:
            raise SettingsError(
                f"--timesteps is {timesteps!r}; expected a count, or a list such as 100,500,900."
            ) from None
    given = {
        "timesteps": steps,
        "dimension": dimension,
        "dtype": dtype,
        "projection": projection,
        "codec": codec,
        "seed": seed,
        "draws": draws,
        "transform": transform,
        "columns": list(columns) if columns else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    make_settings(given)
    return given


def _numbers(option: str, given: str, example: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise SettingsError(f"{option} is {given!r}; expected whole numbers such as {example}.") from None


def _script(context: typer.Context) -> Any:
    """The command line after `--`."""
    from dmin_trace.command import Command

    if not context.obj:
        raise ScriptError(
            f"No script was given. Write it after two dashes: dmin-trace {context.info_name} -- SCRIPT ARGS."
        )
    return Command(str(Path(context.obj[0]).absolute()), tuple(context.obj[1:]), str(Path.cwd()))


def _one_line(message: str) -> str:
    """A message as one line that does nothing to a terminal: it may quote a file or a data set from anybody."""
    # NumPy comes with it, which --help is not to wait for.
    from dmin_trace.views import harmless

    return harmless(message, LONGEST_ERROR)


class _OneLine(logging.Formatter):
    """A log's lines, each harmless; and behind one its traceback, if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        first, *more = super().format(record).split("\n") if record.exc_info else [super().format(record)]
        return "\n".join([_one_line(first), *more])


def _log(verbose: bool) -> None:
    """Shows the library's warnings and errors, and with --verbose all that it says."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("dmin-trace: %(message)s"))
    library = logging.getLogger("dmin_trace")
    library.addHandler(handler)
    library.setLevel(logging.DEBUG if verbose else logging.WARNING)
    library.propagate = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code. A known error is one red line and exit code 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows `--` is the script's own command line, which typer must not look into.
    at = given.index("--") if "--" in given else len(given)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=given[:at], obj=given[at + 1 :], standalone_mode=False, prog_name="dmin-trace")
    except DminTraceError as error:
        Console(stderr=True).print(Text(_one_line(str(error)), style="red"), soft_wrap=True)
        return 128 + error.signal if isinstance(error, StoppedError) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # typer's own complaints about the command line know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        raise
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
