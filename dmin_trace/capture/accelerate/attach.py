"""Joins the loop driver and the recorder to a training run with accelerate: `attach`.

    script -> LoopDriver -> Capture -> Recorder -> store

Here is what only a training script with accelerate has: its arguments, its averaged weights (EMA), its processes, the
line in it or the command line that launched it, and a training that must go on if the capture fails.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dmin_trace import store
from dmin_trace.capture.accelerate.driver import Ending, LoopDriver
from dmin_trace.capture.dataset import Columns
from dmin_trace.capture.encoder_cache import EncoderCache
from dmin_trace.capture.host import script_host
from dmin_trace.capture.randomness import PinnedTimestep, pinned_timesteps, seed_of
from dmin_trace.capture.ranks import Ranks
from dmin_trace.capture.recorder import Recorder
from dmin_trace.capture.source import CaptureSource, CaptureTarget
from dmin_trace.capture.step import CaptureStep
from dmin_trace.capture.weights import find_trainable
from dmin_trace.command import Job, Script, current_command, remember, script_of
from dmin_trace.errors import AttachError, CaptureError, DminTraceError, StoppedError
from dmin_trace.project import LOSS_SCALE
from dmin_trace.settings import make_settings
from dmin_trace.store import Header, Store

logger = logging.getLogger(__name__)

_MARK = "_dmin_trace"


def attach(
    accelerator: Accelerator,
    args: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    timesteps: int | Sequence[int] | None = None,
    dimension: int | None = None,
    dtype: str | None = None,
    projection: str | None = None,
    seed: int | None = None,
    draws: int | None = None,
    transform: str | None = None,
    codec: str | None = None,
    columns: Sequence[str] | None = None,
    max_train_steps: int | None = None,
    num_epochs: int | None = None,
    strict: bool = False,
) -> LoopDriver:
    """The one line: captures the compressed gradient of every training sample at the end of this training run.

    Put it right after `accelerator = Accelerator(...)`. Nothing about the training changes: weights, optimizer, random
    numbers, logs and files are the same with and without it. When the last optimizer step is done the script's own
    loop body is run once for each sample and timestep, the trainable weights having first been written beside the
    store. An error during the capture is logged and the training ends as it would have.

    Args:
        accelerator: the script's accelerator, before anything is prepared with it.
        args: the script's arguments; `output_dir`, and `max_train_steps` or `num_epochs` (`num_train_epochs`) are
            read from it.
        out: the store; `<args.output_dir>/trace.zarr` if not given.
        timesteps, dimension, dtype, projection, seed, draws, transform, codec, columns: see `Settings`.
        max_train_steps: the number of optimizer steps after which the script's loop breaks, for scripts without args.
        num_epochs: the number of times it goes through its dataloader, for scripts without args.
        strict: raise an error during the capture, which ends the training where it is.

    Returns:
        The loop driver, whose `remove()` detaches again.

    Raises:
        AttachError: attached already, or no way to know where to write and when the training ends.
        SettingsError: a setting that cannot be meant.
        TraceError: `out` exists already, or cannot be written.
    """
    given = {
        "timesteps": timesteps,
        "dimension": dimension,
        "dtype": dtype,
        "projection": projection,
        "seed": seed,
        "draws": draws,
        "transform": transform,
        "codec": codec,
        "columns": columns,
    }
    job = Job(
        mode="final",
        command=current_command(),
        settings={name: value for name, value in given.items() if value is not None},
        out=None if out is None else str(Path(out).absolute()),
        max_train_steps=max_train_steps,
        num_epochs=num_epochs,
        strict=strict,
    )
    make_settings(job.settings)
    capture: Capture | None = vars(accelerator).get(_MARK)
    if capture is not None:
        capture.join(job, args)
        return capture.driver
    if args is None and max_train_steps is None and num_epochs is None:
        raise AttachError(
            "attach does not know when the training ends. Pass the script's args, or max_train_steps= (for a loop that "
            "breaks after so many optimizer steps) or num_epochs= (for one that runs out)."
        )
    capture = Capture(accelerator, job, args, launched=False)
    capture.check_out()
    return capture.driver


def attach_job(accelerator: Accelerator, job: Job) -> Capture:
    """What the launcher does when the script makes its Accelerator. A line in the script joins it later."""
    capture = Capture(accelerator, job, _find_args(), launched=True)
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


class Capture:
    """One capture, of a training run or of queries: `loop.Work`, and what is known about it."""

    def __init__(self, accelerator: Accelerator, job: Job, args: Any, *, launched: bool) -> None:
        """Attaches to the accelerator.

        Args:
            accelerator: the script's accelerator.
            job: what the run is for.
            args: the script's arguments, or None.
            launched: whether the command line launched the script; a line in the script may then join.
        """
        self.job = job
        self.args = args
        self.like: Store | None = store.open_store(job.like, unfinished=True) if job.like else None
        self.settings = make_settings(self.like.header.settings if self.like else job.settings)
        self.slots: tuple[PinnedTimestep, ...] = pinned_timesteps(self.settings)
        self.error: Exception | None = None
        self._host = script_host()
        self._launched = launched
        self._joined = False
        self._entered = ExitStack()
        self._recorder: Recorder | None = None
        self._frozen = EncoderCache((), ())
        self._sample_ends: list[float] = []
        ending = Ending(self._max_train_steps, self._num_epochs)
        self.driver = LoopDriver(accelerator, ending, self, on_demand=job.mode != "final")
        setattr(accelerator, _MARK, self)
        self.driver.on_remove(lambda: delattr(accelerator, _MARK))
        atexit.register(self._at_exit)
        self.driver.on_remove(lambda: atexit.unregister(self._at_exit))

    def join(self, line: Job, args: Any) -> None:
        """A line in a launched script: its settings count where the command gave none.

        Raises AttachError if the line comes twice, or in a script that is not launched.
        """
        if not self._launched or self._joined:
            raise AttachError("dmin_trace.attach was called twice for one Accelerator. Keep one of the two lines.")
        self._joined = True
        self.args = args if args is not None else self.args
        own = self.job
        self.job = Job(
            mode=own.mode,
            command=own.command,
            settings={**line.settings, **own.settings},
            out=own.out or line.out,
            weights=own.weights,
            like=own.like,
            max_train_steps=own.max_train_steps or line.max_train_steps,
            num_epochs=own.num_epochs or line.num_epochs,
            strict=own.strict or line.strict,
            edited_script=own.edited_script,
        )
        if self.like is None:
            self.settings = make_settings(self.job.settings)
            self.slots = pinned_timesteps(self.settings)
        if self.job.mode == "final":
            self.check_out()

    # -- where and when --------------------------------------------------------------------------------------------

    @property
    def strict(self) -> bool:
        """Whether an error in the capture ends the training."""
        return self.job.strict

    @property
    def item_seed(self) -> int:
        """The seed under which every sample is fetched, so that all get the same augmentation draw."""
        return seed_of(self.settings.seed, 0)

    @property
    def out(self) -> Path | None:
        """The store's path, if it is known yet."""
        if self.job.out is not None:
            return Path(self.job.out)
        folder = getattr(self.args, "output_dir", None)
        return Path(folder).absolute() / "trace.zarr" if folder else None

    def check_out(self) -> Path:
        """The store's path, free and writable as far as can be told.

        Raises AttachError if it is not known, TraceError if it is taken or cannot be written.
        """
        out = self.out
        if out is None:
            raise AttachError("attach does not know where to write: args has no output_dir. Pass out='.../trace.zarr'.")
        store.check_free(out)
        return out

    def _max_train_steps(self) -> int | None:
        return self.job.max_train_steps or getattr(self.args, "max_train_steps", None)

    def _num_epochs(self) -> int | None:
        return (
            self.job.num_epochs
            or getattr(self.args, "num_epochs", None)
            or getattr(self.args, "num_train_epochs", None)
        )

    # -- loop.Work -------------------------------------------------------------------------------------------------

    def begin(self, driver: LoopDriver) -> list[int]:
        """Fixes the weights, saves them, and says which samples this process captures."""
        self._models = [driver.unwrap(model) for model in driver.models]
        trainable = find_trainable(self._models, driver.optimizers)
        variables = driver.variables
        if variables is None:
            raise CaptureError("The loop's variables were not remembered. This is an error of dmin_trace; report it.")
        if (why := self._host.refusal(self.args, variables.named())) is not None:
            raise CaptureError(why)
        self._schedule_length = self._host.schedule_length(variables.values())
        self._entered.enter_context(self._host.pinned_density(variables.globals(), self._pin_density))
        if self.job.mode == "final":
            for ema in self._host.averaged_models(variables.values()):
                self._enter_average(ema, step_first=driver.step_pending)
        if self.job.weights is not None:
            trainable.load(Path(self.job.weights), self._host.parameter_key)
        trial = self.job.mode == "estimate"
        out = Path("trace.zarr") if trial else self.out
        if out is None:
            raise AttachError("There is nowhere to write: the script has no args.output_dir. Give --out.")
        accelerator = driver.accelerator
        dataset = driver.loader.dataset
        self._scale = LOSS_SCALE if accelerator.scaler is not None else 1.0
        source = CaptureSource(
            samples=len(dataset),
            # Queries have no labels: columns that were asked for by name need not be there.
            columns=Columns(dataset, self.settings.columns if self.like is None else None),
            # What never had a gradient has no state. Before the first step nothing has, and a plain SGD keeps none.
            trained=lambda tensor: any(tensor in optimizer.state for optimizer in driver.optimizers),
            fetch=self._batch_of,
            script=self._script(),
            edited_script=self.job.edited_script,
            packages=("accelerate",),
        )
        target = CaptureTarget(
            out=out,
            resume=self.job.mode == "now",
            like=self.like,
            reserve=self._to_save() if self.job.mode == "final" else None,
            trial=trial,
            created=self._remember,
        )
        ranks = Ranks(accelerator.process_index, accelerator.num_processes, lambda words: gather_object([words]))
        self._recorder = Recorder(self.settings, trainable, source, target, ranks)
        samples = self._recorder.begin()
        self._frozen = self._entered.enter_context(EncoderCache(variables.values(), self._models))
        return samples

    @property
    def recorder(self) -> Recorder:
        """What the loop's gradients are recorded by, from `begin` on."""
        if self._recorder is None:
            raise CaptureError("The capture has not begun. This is an error of dmin_trace; report it.")
        return self._recorder

    def batch(self, sample: int, item: Any, batch: Any) -> None:
        """Tells the recorder of a sample that comes."""
        self._frozen.forget()
        self.recorder.sample(sample, item, batch)

    def missing(self, sample: int, error: Exception) -> None:
        """Tells the recorder of a sample that could not be loaded."""
        self.recorder.missing(sample, error)

    def hold(self, error: Exception) -> bool:
        """Whether an error waits until all processes meet."""
        return self._recorder is not None and self._recorder.hold(error)

    def backward(self, body: CaptureStep, loss: torch.Tensor) -> None:
        """The script's `accelerator.backward(loss)` on a capture batch."""
        self.recorder.backward(body, loss, self._scale)

    def take(self, body: CaptureStep) -> None:
        """Has the recorder check and keep what a body gave."""
        self.recorder.take(body)
        if self.recorder.trial and body.slot == self.slots[-1]:
            self._sample_ends.append(time.perf_counter())

    def moved(self, parameters: list[torch.nn.Parameter]) -> bool:
        """Whether these parameters are others than at the beginning."""
        return self.recorder.moved(parameters)

    def finish(self) -> None:
        """Marks the store complete, once every process has written its chunks."""
        self.recorder.finish()

    def leave(self) -> None:
        """Puts back the weights and the script's functions."""
        if self._recorder is not None:
            self._recorder.stop()
        self._entered.close()

    def failed(self, error: Exception) -> None:
        """Keeps the error, and logs it where nobody will raise it later; the training goes on."""
        if self.error is None:
            self.error = error
            if not self._launched:
                what = "stopped capturing" if isinstance(error, StoppedError) else "could not capture"
                logger.error("dmin_trace %s this run; the training goes on. %s", what, self._what_to_do(error))

    @property
    def seconds_a_sample(self) -> float:
        """How long the last sample of a trial took, all its timesteps: the first one warms up."""
        return self._sample_ends[-1] - self._sample_ends[-2]

    # -- the end of a launched script ------------------------------------------------------------------------------

    def report_end(self) -> None:
        """Raises what kept the run from being captured; called when a launched script has ended by itself."""
        if isinstance(self.error, StoppedError):
            raise StoppedError(self._what_to_do(self.error), self.error.signal)
        if self.error is not None:
            kind = type(self.error) if isinstance(self.error, DminTraceError) else CaptureError
            raise kind(self._what_to_do(self.error))
        if not self.driver.captured:
            raise CaptureError(self._why_never_captured())

    def _what_to_do(self, error: Exception) -> str:
        """The error, and how to capture after all if the trained weights were saved before it happened."""
        found = str(error) if isinstance(error, DminTraceError) else f"{type(error).__name__}: {error}."
        kept = self.weights_path
        if kept is None or self._recorder is None or not self._recorder.weights_saved:
            return found
        return f"{found} The trained weights are in {kept}: dmin-trace capture --weights {kept} -- SCRIPT ARGS."

    def _at_exit(self) -> None:
        if not self._launched and self.driver.attached and not self.driver.captured:
            logger.error("dmin_trace captured nothing. %s", self._why_never_captured())

    def _why_never_captured(self) -> str:
        if self.driver.loader is None:
            return "The script never passed a DataLoader to accelerator.prepare, so there were no samples to capture."
        if self.job.mode != "final":
            return (
                "The script ended before its training loop asked for a batch. Does it resume a run that is finished "
                "already? Leave --resume_from_checkpoint out."
            )
        return (
            f"The training ended at a point that was not recognised (max_train_steps is {self._max_train_steps()}, "
            f"num_epochs is {self._num_epochs()}). Give max_train_steps or num_epochs as the loop counts them, or "
            "capture on demand: dmin-trace capture --weights DIR -- SCRIPT ARGS."
        )

    # -- beginning -------------------------------------------------------------------------------------------------

    @property
    def weights_path(self) -> Path | None:
        """Where the trainable tensors are written, beside the store."""
        return None if self.out is None else store.weights_beside(self.out)

    def _pin_density(self, drawn: torch.Tensor, name: str) -> torch.Tensor:
        body = self.driver.body
        if body is None:
            return drawn
        return body.draws.pin(drawn, lambda: self._fraction_of(body.slot), name)

    def _fraction_of(self, slot: PinnedTimestep) -> float:
        """The slot's place in the schedule, from 0 to 1."""
        if slot.timestep is None:
            return slot.fraction
        if self._schedule_length is None:
            raise CaptureError(
                "Timesteps were given as a list, but the length of the script's schedule is not known. Give a count."
            )
        return (slot.index_in(self._schedule_length) + 0.5) / self._schedule_length

    def _enter_average(self, ema: Any, *, step_first: bool) -> None:
        for model in self._models:
            parameters = list(model.parameters())
            shapes = [tuple(shadow.shape) for shadow in ema.shadow_params]
            if [tuple(p.shape) for p in parameters] == shapes:
                self._entered.enter_context(self._host.averaged_weights(ema, parameters, step_first))
                logger.info("The capture is of the averaged (EMA) weights, which the script saves.")
                return
        raise CaptureError(
            "The script averages weights (EMA) that are not all the parameters of a prepared model, so which weights "
            "it will save is not known. Capture on demand from the saved weights: dmin-trace capture."
        )

    def _remember(self, header: Header) -> None:
        """Keeps the command line for later queries; a query itself is not asked about."""
        if self.like is not None:
            return
        try:
            remember(header.id, self.job.command)
        except OSError as error:
            logger.warning(
                "The command of this run could not be kept for queries (%s): give it to them, after --.",
                error.strerror or error,
            )

    def _to_save(self) -> int:
        """Bytes that the script may need at its end: for its models, and for a checkpoint with two moments of each."""
        parameters = (parameter for model in self._models for parameter in model.parameters())
        return 4 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    def _script(self) -> Script:
        """The script whose loop is run; queries have been checked before they were launched."""
        return Script() if self.like is not None else script_of(self.job.command.script)

    def _batch_of(self, sample: int) -> Any:
        """A sample's batch, for the data set's fingerprint."""
        self._frozen.forget()
        return self.driver.fetch(sample)[1]
