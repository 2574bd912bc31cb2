"""The line in a script that trains with accelerate: `attach`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Unpack

from accelerate import Accelerator

from dmin_trace.capture.accelerate.driver import LoopDriver
from dmin_trace.capture.accelerate.script_capture import ATTRIBUTE, ScriptCapture
from dmin_trace.command import Job, current_command
from dmin_trace.errors import AttachError
from dmin_trace.settings import Settings, SettingsOverrides, given_settings


def attach(
    accelerator: Accelerator,
    args: Any = None,
    *,
    settings: Settings | None = None,
    out: str | os.PathLike[str] | None = None,
    max_train_steps: int | None = None,
    num_epochs: int | None = None,
    strict: bool = False,
    **overrides: Unpack[SettingsOverrides],
) -> LoopDriver:
    """Captures the projected gradient of every training sample at the end of this training run.

    Put this line right after `accelerator = Accelerator(...)`. Nothing about the training changes: weights, optimizer,
    random numbers, logs and files are the same with and without it. After the last optimizer step the script's own
    training step is run once for each sample and timestep; the trainable weights are written beside the store first.
    An error during the capture is logged, and the training ends as it would have.

    Args:
        accelerator: the script's accelerator, before anything is prepared with it.
        args: the script's arguments; `output_dir`, and `max_train_steps` or `num_epochs` (`num_train_epochs`) are
            read from it.
        settings: what to capture.
        out: the store; `<args.output_dir>/trace.zarr` if not given.
        max_train_steps: the number of optimizer steps after which the script's loop breaks, for scripts without args.
        num_epochs: the number of times it goes through its dataloader, for scripts without args.
        strict: raise an error during the capture, which ends the training where it is.
        overrides: single settings by their names, instead of those in `settings`.

    Returns:
        The loop driver, whose `remove()` detaches again.

    Raises:
        AttachError: attached already, or it is not known where to write or when the training ends.
        SettingsError: an invalid setting.
        TraceError: `out` exists already, or cannot be written.
        ScriptError: no host for training scripts is installed.
    """
    job = Job(
        mode="final",
        command=current_command(),
        settings=given_settings(settings, overrides),
        out=None if out is None else str(Path(out).absolute()),
        max_train_steps=max_train_steps,
        num_epochs=num_epochs,
        strict=strict,
    )
    capture: ScriptCapture | None = vars(accelerator).get(ATTRIBUTE)
    if capture is not None:
        capture.join(job, args)
        return capture.driver
    if args is None and max_train_steps is None and num_epochs is None:
        raise AttachError(
            "attach does not know when the training ends. Pass the script's args, or max_train_steps= (for a loop that "
            "breaks after so many optimizer steps) or num_epochs= (for one that runs out)."
        )
    capture = ScriptCapture(accelerator, job, args, launched=False)
    capture.check_out()
    return capture.driver


def attach_job(accelerator: Accelerator, job: Job) -> ScriptCapture:
    """Attaches a job of the launcher when the script makes its Accelerator. A line in the script joins it later."""
    capture = ScriptCapture(accelerator, job, _find_args(), launched=True)
    if job.mode == "final" and capture.out is not None:
        capture.check_out()
    return capture


def _find_args() -> Any:
    """The `args` of the function or module that is making its Accelerator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        args = frame.f_locals.get("args")
        if any(hasattr(args, name) for name in ("output_dir", "max_train_steps", "num_epochs", "num_train_epochs")):
            return args
        frame = frame.f_back
    return None
