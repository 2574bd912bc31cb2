"""The commands that run a training script: run, capture, estimate."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dmin_trace.cli.options import EditedScript, Out, Verbose, absolute, script_command, with_settings
from dmin_trace.command import Job
from dmin_trace.start import COST_FILE, start_job
from dmin_trace.views import facts_table

TRAINED_WEIGHTS = "The trained weights: a safetensors file, or a folder with one."


@with_settings
def run(
    *,
    context: typer.Context,
    settings: dict[str, Any],
    out: Out = None,
    max_train_steps: Annotated[int | None, typer.Option(help="Optimizer steps, if the script has no argument.")] = None,
    num_epochs: Annotated[int | None, typer.Option(help="Epochs, if the script has no argument for them.")] = None,
    strict: Annotated[bool, typer.Option(help="An error in the capture ends the training.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train with SCRIPT ARGS (after --), and capture at the end of the training. The script needs no change.

    dmin-trace run -- train.py --output_dir out

    dmin-trace run --timesteps 5 -- accelerate launch --mixed_precision bf16 train.py --output_dir out
    """
    if out is not None:
        from dmin_trace.store import check_writable

        # Before the training: its end is too late to learn of it.
        check_writable(Path(out))
    job = Job(
        mode="final",
        command=script_command(context),
        settings=settings,
        out=out,
        max_train_steps=max_train_steps,
        num_epochs=num_epochs,
        strict=strict,
    )
    _run(job)


@with_settings
def capture(
    *,
    context: typer.Context,
    weights: Annotated[str, typer.Option(parser=absolute, metavar="PATH", help=TRAINED_WEIGHTS)],
    settings: dict[str, Any],
    out: Out = None,
    edited_script: EditedScript = False,
    verbose: Verbose = False,
) -> None:
    """Capture a trained model: SCRIPT ARGS (after --) with the saved weights. Resumes an unfinished store.

    dmin-trace capture --weights out/unet -- train.py --output_dir out
    """
    command = script_command(context)
    job = Job(mode="now", command=command, settings=settings, out=out, weights=weights, edited_script=edited_script)
    _run(job)


@with_settings
def estimate(*, context: typer.Context, settings: dict[str, Any], verbose: Verbose = False) -> None:
    """Capture two samples of SCRIPT ARGS (after --), keep nothing of them, and show what a whole capture would take.

    dmin-trace estimate -- train.py --output_dir out
    """
    job = Job(mode="estimate", command=script_command(context), settings=settings)
    cost = _run(job)
    console = Console()
    title = "A whole capture of this script, estimated from two samples"
    console.print(facts_table(cost, title, ascii_only=console.options.ascii_only))


def _run(job: Job) -> list[tuple[str, str]]:
    """Runs a job, in this process if it has no launcher. Returns the cost that an estimate finds.

    Raises typer.Exit if the script failed, which has said why.
    """
    if job.command.launcher:
        with tempfile.TemporaryDirectory(prefix="dmin-trace-job-") as temporary:
            if code := start_job(job, Path(temporary)):
                raise typer.Exit(code)
            cost = Path(temporary, COST_FILE)
            return [(name, value) for name, value in json.loads(cost.read_text())] if cost.is_file() else []
    from dmin_trace.capture.estimate import estimate_cost
    from dmin_trace.capture.launch import run_script

    done = run_script(job)
    if job.mode != "estimate":
        return []
    return estimate_cost(done.recorder, Path() if done.out is None else done.out.parent)
