"""The line in a script that trains with accelerate, `attach`, and the capture of the script: `ScriptCapture`.

Only a script with accelerate has what is here: arguments, averaged weights (EMA), processes, and a training that must
go on if the capture fails.
"""

import atexit
import logging
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Unpack

import msgspec
from accelerate import Accelerator
from accelerate.utils import gather_object

from dmin_trace import store
from dmin_trace.capture.accelerate.driver import ENDED_EARLY, ON_DEMAND, LoopDriver
from dmin_trace.capture.accelerate.final_weights import FinalWeights
from dmin_trace.capture.accelerate.loop_variables import LoopVariables, replace_attribute
from dmin_trace.capture.dataset import CaptureSource, Columns
from dmin_trace.capture.host import script_host
from dmin_trace.capture.output import CaptureOutput
from dmin_trace.capture.pinning import PinnedTimestep, pinned_timesteps
from dmin_trace.capture.random_calls import RandomCalls
from dmin_trace.capture.random_state import seed_of
from dmin_trace.capture.ranks import Ranks
from dmin_trace.capture.recorder import Recorder
from dmin_trace.capture.subsets import DrawnSubsets
from dmin_trace.capture.weights import find_trainable
from dmin_trace.command import Job, Script, current_command, remember, script_of
from dmin_trace.errors import (
    AttachError,
    CaptureError,
    DminTraceError,
    QueryError,
    SettingsError,
    StoppedError,
    message_of,
)
from dmin_trace.settings import Settings, SettingsOverrides, given_settings, make_settings
from dmin_trace.start import GRADIENTS, tell_stage
from dmin_trace.store import Header, Store

logger = logging.getLogger(__name__)
_ATTRIBUTE = "_dmin_trace"
"""The attribute of an Accelerator that holds its capture."""
_GIVEN_BY_EITHER = ("out", "max_train_steps", "num_epochs", "strict")


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
    An error is logged, and the training goes on and ends as it would have: what cannot be captured is trained all the
    same.

    Args:
        accelerator: the script's accelerator, before anything is prepared with it.
        args: the script's arguments: its `output_dir`, and `max_train_steps` or `num_epochs` (`num_train_epochs`).
        settings, overrides: what to capture; a single setting by its name replaces that in `settings`.
        out: the store; `<args.output_dir>.trace/trace.zarr` if not given. One that lies there is kept, as
            `trace-1.zarr`.
        max_train_steps: the number of optimizer steps after which the script's loop breaks, for scripts without args.
        num_epochs: the number of times it goes through its dataloader, for scripts without args.
        strict: raise an error, which ends the training where it is.

    Returns the loop driver, whose `remove()` detaches again. Raises SettingsError for an invalid setting. If `strict`,
    also AttachError for a line in a wrong place or without what it must know, or for data without indices;
    CaptureError for a loop that cannot take capture batches; TraceError if `out` cannot be written; ScriptError if no
    host for training scripts is installed.
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
    capture: ScriptCapture | None = vars(accelerator).get(_ATTRIBUTE)
    if capture is None:
        return ScriptCapture(accelerator, job, args, launched=False).driver
    capture.join(job, args)
    return capture.driver


def find_args() -> Any:
    """The `args` of the function or module that is making its Accelerator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        args = frame.f_locals.get("args")
        if any(hasattr(args, name) for name in ("output_dir", "max_train_steps", "num_epochs", "num_train_epochs")):
            return args
        frame = frame.f_back
    return None


class ScriptCapture:
    """When a script's training ends, where its store is, and what is done with the losses of capture batches.

    settings, timesteps: what to capture, and the training steps of each sample.
    recorder: what records the gradients, from `begin` on.
    final_weights: which weights a capture at the end of a training is of.
    error: what ended the capture, or kept it from being made, or None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        job: Job,
        args: Any,
        *,
        launched: bool,
        subsets: DrawnSubsets | None = None,
        draws_before: RandomCalls | None = None,
    ) -> None:
        """Attaches to a script's accelerator. A line may join later if the command line `launched` the script.

        `subsets`: the subsets that the script draws, noted since it began. `draws_before` sees the random calls that
        the script makes before its loop; it is stopped there.
        """
        self.job = job
        self._draws_before = draws_before
        self.error: DminTraceError | None = None
        self._args = args
        self._like: Store | None = store.open_store(job.like, unfinished=True) if job.like else None
        self._launched, self._joined, self._subsets = launched, False, subsets
        self._begun = False
        rank, count = accelerator.process_index, accelerator.num_processes
        self.ranks = Ranks(rank, count, lambda message: gather_object([message]))
        self.driver = LoopDriver(accelerator, self)
        self.final_weights = FinalWeights(self.driver.run)
        self.driver.undo.callback(replace_attribute(accelerator, _ATTRIBUTE, self))
        atexit.register(self._at_exit)
        self.driver.undo.callback(atexit.unregister, self._at_exit)
        try:
            self._host = script_host()
            self._check_line(accelerator)
            self._settle()
        except DminTraceError as error:
            self.refuse(error)

    def refuse(self, error: DminTraceError) -> None:
        """Leaves the training alone, and logs why. Raises the error on demand, if `strict`, and for a setting."""
        self.driver.let_go()
        if self.on_demand or self.job.strict or isinstance(error, SettingsError):
            raise error
        self.failed(error)

    def _check_line(self, accelerator: Accelerator) -> None:
        """Raises AttachError for a line that cannot work where it stands."""
        if self._launched:
            return
        # Private, and so is every other sign of it.
        if any(getattr(accelerator, name, None) for name in ("_models", "_optimizers", "_dataloaders")):
            raise AttachError(
                "The line stands after accelerator.prepare, so it does not know what was prepared. Put it right after "
                f"accelerator = Accelerator(...). {ON_DEMAND}"
            )
        if self._args is None and self.job.max_train_steps is None and self.job.num_epochs is None:
            raise AttachError(
                "attach does not know when the training ends. Pass the script's args, or max_train_steps= (for a loop "
                "that breaks after so many optimizer steps) or num_epochs= (for one that runs out)."
            )

    def join(self, line: Job, args: Any) -> None:
        """Joins a line in a launched script: it says what the command leaves open. A second line changes nothing."""
        if not self._launched or self._joined:
            twice = "dmin_trace.attach was called twice for one Accelerator; the first line counts. Remove the second."
            if line.strict:
                raise AttachError(twice)
            logger.warning(twice)
            return
        self._joined = True
        self._args = args if args is not None else self._args
        own = self.job
        either = {name: getattr(own, name) or getattr(line, name) for name in _GIVEN_BY_EITHER}
        self.job = msgspec.structs.replace(own, settings={**line.settings, **own.settings}, **either)
        try:
            self._settle()
        except DminTraceError as error:
            self.refuse(error)

    def _settle(self) -> None:
        """Fixes the settings. Raises an error if the store cannot be written, or if it will never be known where."""
        self.settings: Settings = make_settings(self._like.header.settings if self._like else self.job.settings)
        self.timesteps: tuple[PinnedTimestep, ...] = pinned_timesteps(self.settings)
        if self.on_demand:
            return
        if self.out is not None:
            store.check_writable(self.out)
        elif self._joined or not self._launched:
            raise AttachError("attach does not know where to write: args has no output_dir. Pass out='.../trace.zarr'.")

    @property
    def on_demand(self) -> bool:
        """Whether the capture begins at the first batch, and ends the script."""
        return self.job.mode != "final"

    @property
    def max_train_steps(self) -> int | None:
        """The number of optimizer steps of the training. Scripts overwrite theirs after `prepare`."""
        return self.job.max_train_steps or getattr(self._args, "max_train_steps", None)

    @property
    def num_epochs(self) -> int | None:
        own = getattr(self._args, "num_epochs", None) or getattr(self._args, "num_train_epochs", None)
        return self.job.num_epochs or own

    @property
    def out(self) -> Path | None:
        """The store's path, if it is known yet."""
        if self.job.out is not None:
            return Path(self.job.out)
        folder = getattr(self._args, "output_dir", None)
        # Beside the folder: scripts upload all that is in it (--push_to_hub).
        return Path(f"{Path(folder).resolve()}.trace") / "trace.zarr" if folder else None

    def begin(self, variables: LoopVariables, undo: ExitStack) -> list[int]:
        """Fixes and saves the weights, and gives this process's samples. What restores the script goes on `undo`."""
        if self._draws_before is not None:
            self._draws_before.stop()
        run = self.driver.run
        models = [run.unwrap(model) for model in run.models]
        trainable = find_trainable(models, run.optimizers)
        if (why := self._host.refusal(self._args, variables.named())) is not None:
            raise CaptureError(why)
        if not self.on_demand and (drawn := self._host.drawn_before_loop(self._args, variables.named())) is not None:
            raise CaptureError(
                f"The script drew {drawn} once for each sample, before its loop, so a query cannot be given what its "
                "sample was. Capture on demand, which draws the same for all: dmin-trace capture --weights DIR -- "
                "SCRIPT ARGS."
            )
        if (rows := self._host.rows_of_sample(self._args)) > 1:
            logger.info("A row of the trace is of a training sample and of its class picture (prior preservation).")
        weights_of = f"those in {Path(self.job.weights).name}" if self.job.weights is not None else ""
        if self.job.mode == "final":
            weights_of = self.final_weights.enter(
                trainable, variables, self._host, undo, step_pending=self.driver.step_pending
            )
        if self.job.weights is not None:
            trainable.load(Path(self.job.weights), self._host.parameter_key)
        trial = self.job.mode == "estimate"
        out = Path("trace.zarr") if trial else self.out
        if out is None:
            raise AttachError("There is nowhere to write: the script has no args.output_dir. Give --out.")
        if self._subsets is not None and self._like is None:
            self._subsets.refuse(len(run.loader.dataset))
        # As argparse understood the command line, which may abbreviate.
        read, args = self._host.query_columns(self.job.command.arguments, ()), self._args
        image, caption = (getattr(args, f"{name}_column", None) for name in ("image", "caption"))
        repeats = getattr(args, "repeats", None) or 1
        pictures = run.find_pictures(seed_of(self.settings.seed, 0), image or read.image, repeats)
        if len(pictures) < len(run.loader.dataset):
            logger.info("%d samples repeat %d pictures; each is captured once.", len(run.loader.dataset), len(pictures))
        if self.job.samples is not None and len(pictures) != self.job.samples:
            raise QueryError(
                f"The script has {len(pictures):,} samples on {self.job.samples} queries, so it did not read its data "
                "where it was told to. Give its command after the images, with {data} where it takes its data: "
                "dmin-trace query TRACE IMAGE -- SCRIPT ARGS {data}. A script that takes no data can be recorded: "
                "dmin_trace.recording, and Trace.query_loss."
            )
        self.driver.models.variables = variables.named()
        source = CaptureSource(
            samples=len(pictures) // (2 if self.job.differences else 1),
            columns=Columns(
                run.loader.dataset,
                # Queries have no labels: columns that the settings name need not be there.
                self.settings.columns if self._like is None else None,
                caption=caption or read.caption,
                pictures=pictures,
                reading=lambda: run.reading,
            ),
            files_sha256="" if self._like is not None else pictures.fingerprint,
            # What never had a gradient has no state. Before the first step nothing has, and a plain SGD keeps none.
            optimizers=run.optimizers,
            fetch=lambda sample: self.driver.batches.fetch(sample)[1],
            # Queries were checked before they were launched.
            script=Script() if self._like is not None else script_of(self.job.command.script),
            edited_script=self.job.edited_script,
            packages=("accelerate",),
            models=self.driver.models,
            launch=run.launch,
            any_device=self.job.any_device,
            weights_of=weights_of,
            rows=rows,
            differences=self.job.differences,
        )
        size_of_models = (p.numel() * p.element_size() for model in models for p in model.parameters())
        output = CaptureOutput(
            out=out,
            resume=self.job.mode == "now",
            like=self._like,
            # For the models, and for a checkpoint with two moments of each parameter.
            reserve=4 * sum(size_of_models) if self.job.mode == "final" else None,
            trial=trial,
            created=self._remember if self._like is None else lambda header: None,
            progressed=partial(tell_stage, self.job, GRADIENTS),
            ranks=self.ranks,
        )
        self.recorder = Recorder(self.settings, trainable, source, output)
        self._begun = True
        undo.callback(self.recorder.stop)
        return self.recorder.begin()

    def failed(self, error: Exception) -> None:
        """Keeps the error that ended the capture, and logs it if no caller will raise it later."""
        if self.error is not None:
            return
        self.error = error if isinstance(error, DminTraceError) else CaptureError(f"{message_of(error)}.")
        if self.out is not None and self._begun and self.recorder.weights_saved:
            kept = store.weights_beside(self.out)
            how = f"The trained weights are in {kept}: dmin-trace capture --weights {kept} -- SCRIPT ARGS."
            self.error.args = (f"{self.error} {how}",)
        if not self._launched:
            what = "stopped capturing" if isinstance(error, StoppedError) else "could not capture"
            logger.error("dmin_trace %s this run; the training continues. %s", what, self.error)
        elif not self._begun:
            # The training may take days more before the command can end with this error.
            logger.warning("dmin_trace will not capture this run. %s", self.error)

    def check_final_weights(self) -> None:
        """Marks the trace if the weights are not those that were captured; at the end of the training, and at exit."""
        ended = self.job.mode == "final" and self._begun and self.error is None and self.recorder.finished
        if ended and self.ranks.rank == 0 and self.out is not None:
            self.final_weights.check(self.recorder.trainable, self.out)

    def report_end(self) -> None:
        """Raises what kept the run from being captured; called when a launched script has ended by itself."""
        self.check_final_weights()
        if self.final_weights.moved:
            raise CaptureError("The capture came before the end of the training. Its trace is marked so.")
        if self.error is not None:
            raise self.error
        if not self.driver.captured:
            raise CaptureError(self._why_never_captured())
        if self.on_demand and self._begun and not self.recorder.finished:
            raise CaptureError(ENDED_EARLY)

    def _at_exit(self) -> None:
        # After an exception of the script's own, which python has shown, nothing of ours is worth a line.
        if getattr(sys, "last_value", None) is not None:
            return
        self.check_final_weights()
        if not self._launched and not self.driver.captured:
            logger.error("dmin_trace captured nothing. %s", self._why_never_captured())

    def _why_never_captured(self) -> str:
        run = self.driver.run
        if not run.loaders:
            return "The script never passed a DataLoader to accelerator.prepare, so there were no samples to capture."
        if self.on_demand:
            return (
                "The script ended before its training loop took a batch. Does it resume a run that is finished? Leave "
                "--resume_from_checkpoint out."
            )
        if not run.backwards:
            return (
                "The script never called accelerator.backward(loss), which is where gradients are taken. Does it "
                "resume a run that is finished? Then capture it on demand: dmin-trace capture --weights DIR -- SCRIPT "
                "ARGS. Or does it call loss.backward()? Then have it call accelerator.backward(loss)."
            )
        return (
            f"The training ended at a point that was not recognised (max_train_steps is {self.max_train_steps}, "
            f"num_epochs is {self.num_epochs}). Give max_train_steps or num_epochs as the loop counts them, or capture "
            "on demand: dmin-trace capture --weights DIR -- SCRIPT ARGS."
        )

    def _remember(self, header: Header) -> None:
        """Keeps the command line of the run that made a trace, for later queries."""
        if not self.job.command.script:
            logger.warning(
                "This run is no script with a command line (a notebook, say), so queries will not know how to repeat "
                "it: give them a command after --, or record the loop by dmin_trace.recording and query it by "
                "Trace.query_loss."
            )
            return
        try:
            remember(header.id, self.job.command)
        except OSError as error:
            why = f"({error.strerror or error}): give it to them, after --."
            logger.warning("The command of this run could not be kept for queries %s", why)
