"""Runs a training script for a capture: at the end of its training, on demand, or for a query.

The script is run as `python script.py ARGS` or `python -m module ARGS` runs it. The job attaches when the script makes
its Accelerator; a line of ours in the script joins the same capture. `python -m dmin_trace.capture.launch JOB.json`
runs a job in a process of its own, as for queries: a script may change any global state of its process, and end it.
"""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dmin_trace.capture.accelerate.attach import ScriptCapture, find_args
from dmin_trace.capture.accelerate.driver import CaptureFinished
from dmin_trace.capture.host import script_host
from dmin_trace.capture.random_calls import medians
from dmin_trace.capture.read_files import ReadFiles
from dmin_trace.capture.subsets import DrawnSubsets
from dmin_trace.capture.write_guard import protect_older_files
from dmin_trace.command import Command, Job
from dmin_trace.errors import DminTraceError, ScriptError
from dmin_trace.start import COST_FILE, LOADING, READ_FILE, tell_stage, write_refusal


class _ScriptExitError(ScriptError):
    """Raised if a script ends itself, as argparse does; it has said why. `code` is its exit code."""

    def __init__(self, script: str, code: object) -> None:
        super().__init__(f"{script} stopped with exit code {code}.")
        self.code = code if isinstance(code, int) else 1


def run_script(job: Job) -> ScriptCapture:
    """Runs the job's script in this process, attached. Returns the capture of the script's last Accelerator.

    Raises ScriptError if there is no such script, it failed, or it made no Accelerator; another DminTraceError if the
    capture was refused or failed, or never began.
    """
    command = job.command
    if not Path(command.script).is_file():
        raise ScriptError(f"There is no script at {command.script}. Give the training script's path after `--`.")
    captures: list[ScriptCapture] = []
    with _as_main(job, captures):
        try:
            if job.mode != "final":
                script_host().forget_drawn(Path(command.script))
            if command.module:
                runpy.run_module(command.module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command.script, run_name="__main__")
        except CaptureFinished:
            return captures[-1]
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise _ScriptExitError(command.script, stop.code) from None
        except Exception as error:
            if job.mode == "final" or isinstance(error, DminTraceError):
                # If the user's training failed, its traceback is what they need.
                raise
            failure = f"{command.script} failed on a capture batch: {type(error).__name__}: {error}"
            raise ScriptError(failure + _advice(command, error)) from error
    if not captures:
        raise ScriptError(
            f"{command.script} ended without making an accelerate.Accelerator, so nothing could be captured. "
            "The script must train with accelerate."
        )
    captures[-1].report_end()
    return captures[-1]


@contextmanager
def _as_main(job: Job, captures: list[ScriptCapture]) -> Iterator[None]:
    """Sets what `python script.py` sets: arguments, import path, folder. Attaches the job to each new Accelerator."""
    make, command, before = Accelerator.__init__, job.command, (sys.argv, sys.path[:])
    # A capture at the end of the training is of what was trained on, whatever that was.
    subsets = None if job.mode == "final" else DrawnSubsets()
    draws_before = medians()

    def make_and_attach(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if subsets is not None:
            subsets.watch_datasets()
        tell_stage(job, LOADING)
        captures.append(
            ScriptCapture(self, job, find_args(), launched=True, subsets=subsets, draws_before=draws_before)
        )

    with chdir(command.folder), nullcontext() if subsets is None else subsets.watching():
        on_demand = job.mode != "final" and job.like is None
        arguments = script_host().on_demand_arguments(command.arguments) if on_demand else command.arguments
        sys.argv = [command.script, *arguments]
        sys.path.insert(0, command.folder if command.module else str(Path(command.script).parent))
        Accelerator.__init__ = make_and_attach
        if job.mode != "final":
            # Some scripts draw flips, crops and empty captions once, before their loop.
            draws_before.start()
        try:
            yield
        finally:
            draws_before.stop()
            Accelerator.__init__ = make
            sys.argv, sys.path[:] = before


def _advice(command: Command, error: Exception) -> str:
    """What to do about an import that fails because a part of a package was started as a file."""
    package = Path(command.script).parent
    if command.module or not isinstance(error, ImportError) or not (package / "__init__.py").is_file():
        return ""
    names = [Path(command.script).stem]
    while (package / "__init__.py").is_file():
        names, package = [package.name, *names], package.parent
    return f". It is part of a package: start it in {package} as python -m {'.'.join(names)} ARGS."


def main() -> int:
    """Runs the job in the file that the first argument names. A refusal goes to a file beside it."""
    path = Path(sys.argv[1])
    # For this process alone, and not for what the script starts.
    os.environ.pop("PYTHONSAFEPATH", None)
    job = Job.from_json(path.read_text(encoding="utf-8"))
    try:
        read = None
        if job.like is not None:
            protect_older_files(path.parent)
            read = ReadFiles()
        capture = run_script(job)
        if read is not None:
            (path.parent / READ_FILE).write_text(json.dumps(read.names()), encoding="utf-8")
        if job.mode == "estimate":
            from dmin_trace.capture.estimate import estimate_cost

            folder = Path() if capture.out is None else capture.out.parent
            (path.parent / COST_FILE).write_text(json.dumps(estimate_cost(capture.recorder, folder)))
    except _ScriptExitError as stop:
        return stop.code
    except DminTraceError as error:
        write_refusal(path.parent, error)
        # A launcher would print an error of its own behind ours; of several processes it must end the others.
        return 0 if os.environ.get("WORLD_SIZE", "1") == "1" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
