"""Runs a training script for a capture: at the end of its training, on demand, or for a query.

The script is run as `python script.py ARGS` runs it. The job attaches when the script makes its Accelerator; a line of
ours in the script joins the same capture. `python -m dmin_trace.capture.launch JOB.json` runs a job in a process of its
own, as for queries: a script may change any global state of its process, and may end it.
"""

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dmin_trace.capture.accelerate.attach import ScriptCapture, find_args
from dmin_trace.capture.accelerate.driver import CaptureFinished
from dmin_trace.capture.host import script_host
from dmin_trace.capture.random_calls import medians
from dmin_trace.command import Job
from dmin_trace.errors import DminTraceError, ScriptError


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
            runpy.run_path(command.script, run_name="__main__")
        except CaptureFinished:
            return captures[-1]
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise ScriptError(f"{command.script} stopped with exit code {stop.code}.") from None
        except Exception as error:
            if job.mode == "final" or isinstance(error, DminTraceError):
                # If the user's training failed, its traceback is what they need.
                raise
            raise ScriptError(f"{command.script} failed on a capture batch: {type(error).__name__}: {error}") from error
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
    draws_before = medians()

    def make_and_attach(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        captures.append(ScriptCapture(self, job, find_args(), launched=True, draws_before=draws_before))

    with chdir(command.folder):
        sys.argv = [command.script, *command.arguments]
        sys.path.insert(0, str(Path(command.script).parent))
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


def main() -> int:
    """Runs the job in the file that the first argument names. Prints a refusal to standard error as one JSON line."""
    job = Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        run_script(job)
    except DminTraceError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
