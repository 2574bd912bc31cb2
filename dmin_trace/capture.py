"""Joins the loop driver, the gradients, the compressor and the store to a training run: `attach`.

    script -> LoopDriver -> Capture.backward: gradient -> compress -> Capture.take: checks, rows -> store

The checks are what makes two gradients comparable, so they fail closed. For every sample of a slot the timestep that
reached the denoiser and the sequence of random calls must be the same; they are kept in the store, and a query must
meet them again.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dmin_trace import store
from dmin_trace.columns import Columns
from dmin_trace.commands import Job, current_command, remember
from dmin_trace.compress import Plan, compress, make_plan
from dmin_trace.errors import AttachError, CaptureError, DminTraceError, QueryError, TraceError, WeightsError
from dmin_trace.gradients import LOSS_SCALE, gradients
from dmin_trace.integrations import diffusers
from dmin_trace.loop import Body, Ending, LoopDriver
from dmin_trace.randomness import Call, Slot, make_slots, seed_of
from dmin_trace.settings import Settings, make_settings
from dmin_trace.store import Header, Trace, Writer
from dmin_trace.weights import find_trainable

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
    precondition: str | None = None,
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
        timesteps, dimension, dtype, projection, seed, precondition, codec, columns: see `Settings`.
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
        "precondition": precondition,
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


@dataclass
class _Chunk:
    """The rows of one chunk while they come in."""

    number: int
    slots: range
    grad: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    columns: dict[str, list[Any]]
    filled: int = 0


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
        self.like: Trace | None = store.open_trace(job.like) if job.like else None
        self.settings = make_settings(self.like.header.settings if self.like else job.settings)
        self.slots: tuple[Slot, ...] = make_slots(self.settings)
        self.error: Exception | None = None
        self._launched = launched
        self._joined = False
        self._weights_saved = False
        self._entered = ExitStack()
        self._writer: Writer | None = None
        self._progress: Progress | None = None
        self._row: list[Body] = []
        self._first: list[Body] = []
        self._batch_shapes: dict[str, tuple[int, ...]] = {}
        self._ever_reached: list[bool] = []
        ending = Ending(self._max_train_steps, self._num_epochs)
        self.driver = LoopDriver(accelerator, ending, self, on_demand=job.mode == "now")
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
        )
        if self.like is None:
            self.settings = make_settings(self.job.settings)
            self.slots = make_slots(self.settings)
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
        self._trainable = find_trainable(self._models, driver.optimizers)
        self._ever_reached = [False] * len(self._trainable.names)
        self._scale = LOSS_SCALE if driver.accelerator.scaler is not None else 1.0
        self._plan: Plan = make_plan(
            self._trainable.length, self.settings.dimension, self.settings.seed, self.settings.projection
        )
        variables = driver.variables
        if variables is None:
            raise CaptureError("The loop's variables were not remembered. This is an error of dmin_trace; report it.")
        if (why := diffusers.refusal(self.args, variables.named())) is not None:
            raise CaptureError(why)
        self._schedule_length = diffusers.schedule_length(variables.values())
        self._entered.enter_context(diffusers.pinned_density(variables.globals(), self._pin_density))
        if self.job.mode == "final":
            for ema in diffusers.averaged_models(variables.values()):
                self._enter_average(ema, step_first=driver.step_pending)
        if self.job.weights is not None:
            self._trainable.load(Path(self.job.weights), diffusers.parameter_key)
        self._weights = self._trainable.weights_fingerprint()
        if self.like is not None:
            self._check_like(self.like)
        self._columns = Columns(driver.loader.dataset, self.settings.columns)
        return self._plan_chunks(driver)

    def batch(self, sample: int, item: Any, batch: Any) -> None:
        """Notes the shapes of the images and words of a batch, and keeps the sample's columns."""
        entries = named_entries(batch)
        shapes = image_shapes(entries)
        if self.like is not None:
            # Words may be of any number.
            expected = {name: shape for name, shape in self.like.header.batch.items() if len(shape) >= 3}
            if shapes != expected:
                raise QueryError(
                    f"The query has images of shape {_show(shapes)}, but those of the trace have "
                    f"{_show(expected)}. Give an image of the size that the model was trained on."
                )
        self._batch_shapes = self._batch_shapes or shapes | word_shapes(entries)
        self._row_columns = self._columns.of(sample, item)

    def backward(self, body: Body, loss: torch.Tensor) -> None:
        """The script's `accelerator.backward(loss)` on a capture batch."""
        if loss.numel() != 1:
            raise CaptureError(f"The script's loss has shape {tuple(loss.shape)}; expected a scalar.")
        taken, reached = gradients(loss.reshape(()), self._trainable.tensors, self._scale)
        self._ever_reached = [a or b for a, b in zip(self._ever_reached, reached, strict=True)]
        body.sketch, body.norm = compress(taken, self._plan)
        body.loss = loss.detach().float().reshape(())

    def take(self, body: Body) -> None:
        """Checks a body's draws, and after the sample's last slot its row."""
        self._check_draws(body)
        self._row.append(body)
        if len(self._row) == len(self.slots):
            row, self._row = self._row, []
            self._take_row(row)

    def moved(self, parameters: list[torch.nn.Parameter]) -> bool:
        """Whether these parameters are others than at the beginning; what is not trained is taken for moved."""
        ours = {id(tensor) for tensor in self._trainable.tensors}
        return any(id(p) not in ours for p in parameters) or self._trainable.weights_fingerprint() != self._weights

    def finish(self) -> None:
        """Marks the store complete, once every process has written its chunks."""
        if self._writer is None:
            return
        self.driver.accelerator.wait_for_everyone()
        if self.driver.accelerator.is_main_process:
            self._writer.finish()
            logger.info("The trace of %d samples is in %s.", self._samples, self.out)
        self.driver.accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Puts back the weights and the script's functions."""
        if self._progress is not None:
            self._progress.stop()
        self._entered.close()

    def failed(self, error: Exception) -> None:
        """Keeps the error, and logs it where nobody will raise it later; the training goes on."""
        if self.error is None:
            self.error = error
            if not self._launched:
                logger.error("dmin_trace could not capture this run; the training goes on. %s", self._what_to_do(error))

    # -- the end of a launched script ------------------------------------------------------------------------------

    def report_end(self) -> None:
        """Raises what kept the run from being captured; called when a launched script has ended by itself."""
        if self.error is not None:
            kind = type(self.error) if isinstance(self.error, DminTraceError) else CaptureError
            raise kind(self._what_to_do(self.error))
        if not self.driver.captured:
            raise CaptureError(self._why_never_captured())

    def _what_to_do(self, error: Exception) -> str:
        """The error, and how to capture after all if the trained weights were saved before it happened."""
        found = str(error) if isinstance(error, DminTraceError) else f"{type(error).__name__}: {error}."
        kept = self.weights_path
        if kept is None or not self._weights_saved:
            return found
        return f"{found} The trained weights are in {kept}: dmin-trace capture --weights {kept} -- SCRIPT ARGS."

    def _at_exit(self) -> None:
        if not self._launched and self.driver.attached and not self.driver.captured:
            logger.error("dmin_trace captured nothing. %s", self._why_never_captured())

    def _why_never_captured(self) -> str:
        if self.driver.loader is None:
            return "The script never passed a DataLoader to accelerator.prepare, so there were no samples to capture."
        if self.job.mode == "now":
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

    def _fraction_of(self, slot: Slot) -> float:
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
                self._entered.enter_context(diffusers.averaged_weights(ema, parameters, step_first))
                logger.info("The capture is of the averaged (EMA) weights, which the script saves.")
                return
        raise CaptureError(
            "The script averages weights (EMA) that are not all the parameters of a prepared model, so which weights "
            "it will save is not known. Capture on demand from the saved weights: dmin-trace capture."
        )

    def _check_like(self, trace: Trace) -> None:
        found, expected = self._trainable, trace.header.parameters
        if found.fingerprint != expected.fingerprint:
            raise QueryError(
                f"The script trains {len(found.names)} tensors with {found.length:,} numbers, but the trace is of "
                f"{len(expected.names)} with {trace.header.projection.length:,}. Repeat the command that made it."
            )
        if self._weights != trace.header.weights:
            raise WeightsError(
                f"The weights are not those of the trace: their fingerprint is {self._weights[:16]}, that of the trace "
                f"{trace.header.weights[:16]}. Give the weights that were captured, which lie beside the trace."
            )
        if self._plan.fingerprint != trace.header.projection.fingerprint:
            raise QueryError(
                f"The projection's fingerprint is {self._plan.fingerprint[:16]}, that of the trace "
                f"{trace.header.projection.fingerprint[:16]}. The trace was made by a version of dmin_trace that "
                "projects otherwise; query it with that version."
            )

    def _plan_chunks(self, driver: LoopDriver) -> list[int]:
        """Gives this process its chunks, and the samples that lie in them."""
        accelerator = driver.accelerator
        self._samples = len(driver.loader.dataset)
        if self._samples == 0:
            raise CaptureError("The training dataset is empty, so there is nothing to capture.")
        world = accelerator.num_processes
        settings = self.settings
        self._dtype = "float32" if self.like is not None else settings.dtype
        self._chunk_rows = store.choose_chunk_rows(
            self._samples, settings.slots, settings.dimension, self._dtype, world
        )
        count = -(-self._samples // self._chunk_rows)
        pending = list(range(count))
        out = self.out
        if out is None:
            raise AttachError("There is nowhere to write: the script has no args.output_dir. Give --out.")
        self._existing = out.exists()
        if self._existing and self.job.mode == "now":
            earlier = store.open_trace(out, unfinished=True)
            if earlier.complete:
                raise TraceError(f"{out} exists already and is complete. Give another --out, or move it away.")
            self._chunk_rows = earlier.header.chunk_rows
            pending = [c for c, done in enumerate(earlier.done) if not done]
        elif self._existing:
            store.check_free(out)
        if accelerator.is_main_process and self.like is None:
            path = store.weights_beside(out)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._trainable.save(path)
            self._weights_saved = True
        rows = self._chunk_rows
        ours = [
            range(c * rows, min((c + 1) * rows, self._samples)) for c in pending[accelerator.process_index :: world]
        ]
        self._queue = [(start // rows, slots) for slots in ours for start in (slots.start,)]
        self._chunk: _Chunk | None = None
        samples = [sample for slots in ours for sample in slots]
        # Loops gather inside their body: every process must run as many bodies, so the shorter ones repeat a sample.
        longest = max(
            sum(min((c + 1) * rows, self._samples) - c * rows for c in pending[rank::world]) for rank in range(world)
        )
        self._kept = len(samples)
        self._taken = 0
        self._show_progress(accelerator, longest)
        return samples + [samples[-1] if samples else 0] * (longest - len(samples))

    def _show_progress(self, accelerator: Accelerator, samples: int) -> None:
        console = Console(stderr=True)
        if not accelerator.is_main_process or not console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("capture"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TextColumn("[dim]{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=False,
        )
        self._task = self._progress.add_task("capture", total=samples, rate="")
        self._progress.start()

    # -- rows ------------------------------------------------------------------------------------------------------

    def _check_draws(self, body: Body) -> None:
        calls = _show_calls(body.draws.calls)
        if body.timestep is None:
            raise CaptureError(
                "No prepared model was called with a timestep on a capture batch (an argument named timestep, "
                "timesteps or t), so it cannot be told whether the timestep was the slot's. Is this a diffusion model?"
            )
        if body.draws.pins == 0:
            raise CaptureError(
                "The script's timestep draw was not pinned, so every sample would have its own timestep. Pinned are "
                "torch.randint(0, steps, (batch,)), torch.multinomial(weights, batch) and diffusers' "
                f"compute_density_for_timestep_sampling; the loop body drew {calls}."
            )
        if self.like is not None:
            expected = self.like.header.noise.draws[body.slot.number]
            if tuple(body.draws.calls) != expected:
                raise QueryError(
                    f"On the query the script drew {calls}, on the training samples {_show_calls(expected)}, so their "
                    "noise differs. Give an image of the size that the model was trained on, and the same arguments."
                )
        elif self._first and body.draws.calls != self._first[body.slot.number].draws.calls:
            first = self._first[body.slot.number]
            raise CaptureError(
                f"On sample {body.sample} the script drew {calls}, on sample {first.sample} "
                f"{_show_calls(first.draws.calls)}, so their noise differs. Samples of different sizes (buckets) or a "
                "random branch cannot be captured."
            )

    def _take_row(self, row: list[Body]) -> None:
        if not self._first:
            self._check_reached()
        sketches, norms, losses, timesteps = _to_cpu(row)
        if not self._first:
            self._first = row
            self._timesteps = timesteps
            self._open_store()
        elif timesteps != self._timesteps:
            slot = next(k for k, (a, b) in enumerate(zip(timesteps, self._timesteps, strict=True)) if a != b)
            raise CaptureError(
                f"In slot {slot} the denoiser saw timestep {timesteps[slot]} for sample {row[0].sample}, and "
                f"{self._timesteps[slot]} for sample {self._first[0].sample}. The script draws timesteps in a way that "
                "is not pinned."
            )
        self._taken += 1
        if self._progress is not None:
            rate = self._progress.tasks[0].speed
            self._progress.update(self._task, advance=1, rate=f"{rate:.1f}/s" if rate else "")
        if self._taken <= self._kept:
            self._keep_row(row[0].sample, sketches, norms, losses)

    def _check_reached(self) -> None:
        """After the first sample: every tensor that the training moved must have got a gradient."""
        never = [
            (name, tensor)
            for name, tensor, reached in zip(
                self._trainable.names, self._trainable.tensors, self._ever_reached, strict=True
            )
            if not reached
        ]
        names = ", ".join(name for name, _ in never[:3])
        # What never had a gradient has no state. Before the first step nothing has, and a plain SGD keeps none.
        trained = [n for n, tensor in never if any(tensor in o.state for o in self.driver.optimizers)]
        if trained or len(never) == len(self._ever_reached):
            raise CaptureError(
                f"The loss does not depend on {len(never)} of the {len(self._ever_reached)} trainable tensors, among "
                f"them {names}, though the training moved them. Does the loop body skip a part of the model when the "
                "model is in eval mode, or for some batches?"
            )
        if never:
            logger.warning(
                "The loss does not depend on %d of the %d trainable tensors, among them %s, and the training did not "
                "move them; their gradients are zero.",
                len(never),
                len(self._ever_reached),
                names,
            )

    def _keep_row(self, sample: int, sketches: np.ndarray, norms: np.ndarray, losses: np.ndarray) -> None:
        if self._chunk is None:
            number, slots = self._queue.pop(0)
            shape = (len(slots), len(self.slots))
            self._chunk = _Chunk(
                number,
                slots,
                np.zeros((*shape, self.settings.dimension), np.float32),
                np.zeros(shape, np.float32),
                np.zeros(shape, np.float32),
                {name: [] for name in self._columns.kinds},
            )
        chunk = self._chunk
        at = chunk.filled
        chunk.grad[at], chunk.norm[at], chunk.loss[at] = sketches, norms, losses
        for name, values in chunk.columns.items():
            values.append(self._row_columns[name])
        chunk.filled += 1
        if chunk.filled == len(chunk.slots) and self._writer is not None:
            # Slots are dataset indices here; the column keeps them apart for stores that are not made in order.
            self._writer.write(
                chunk.number,
                chunk.grad,
                chunk.norm,
                chunk.loss,
                np.arange(chunk.slots.start, chunk.slots.stop, dtype=np.int64),
                chunk.columns,
            )
            self._chunk = None

    def _open_store(self) -> None:
        """Creates the store, or goes on with one, now that the first sample has shown what is in it."""
        accelerator = self.driver.accelerator
        out = self.out
        if out is None:
            raise AttachError("There is nowhere to write: give out.")
        if self.like is not None and self._timesteps != self.like.header.timesteps:
            raise QueryError(
                f"The denoiser saw the timesteps {self._timesteps} on the query, {self.like.header.timesteps} on the "
                "training samples. Repeat the command that made the trace."
            )
        header = self._header()
        if accelerator.is_main_process:
            self._writer = store.resume(out, header) if self._existing else store.create(out, header)
            if self.like is None:
                remember(self._writer.header.id, self.job.command)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            self._writer = store.resume(out, header)

    def _header(self) -> Header:
        settings = self.settings
        return Header(
            id=uuid.uuid4().hex,
            samples=self._samples,
            timesteps=self._timesteps,
            dimension=settings.dimension,
            dtype=self._dtype,
            codec="none" if self.like is not None else settings.codec,
            chunk_rows=self._chunk_rows,
            projection=store.ProjectionFacts(
                kind=settings.projection,
                seed=settings.seed,
                length=self._plan.length,
                fingerprint=self._plan.fingerprint,
            ),
            parameters=store.ParameterFacts(
                names=self._trainable.names,
                shapes=self._trainable.shapes,
                fingerprint=self._trainable.fingerprint,
            ),
            weights=self._weights,
            noise=store.NoiseFacts(seed=settings.seed, draws=tuple(tuple(body.draws.calls) for body in self._first)),
            precondition=settings.precondition,
            batch=self._batch_shapes,
            columns=self._columns.kinds,
            settings=settings_facts(settings),
            writers={name: version(name) for name in ("dmin_trace", "torch", "accelerate", "zarr", "numpy")},
        )


def settings_facts(settings: Settings) -> dict[str, Any]:
    """The settings as JSON keeps them."""
    facts = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


def named_entries(batch: Any) -> dict[str, Any]:
    """The entries of a collated batch by their names, or by their numbers where they have none."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    values = batch if isinstance(batch, (list, tuple)) else [batch]
    return {str(k): value for k, value in enumerate(values)}


def image_shapes(entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the image-like tensors (floating, three dimensions or more) of a batch."""
    return {
        name: tuple(value.shape)
        for name, value in entries.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3
    }


def word_shapes(entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of what is made of words in a batch: rows of tokens (integers in two dimensions), lists of text.

    A named list of text is one of prompts only if its name says so: a batch may have file names.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in entries.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            shapes[name] = tuple(value.shape)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
            if not name.isdigit() and not any(word in name for word in ("caption", "prompt", "text")):
                continue
            shapes[name] = (len(value),)
    return shapes


def _to_cpu(row: list[Body]) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, ...]]:
    """A row's sketches (T, v), norms (T,), losses (T,) and timesteps: one transfer each, once a sample."""
    sketches = torch.stack([body.sketch for body in row if body.sketch is not None]).cpu().numpy()
    norms = torch.stack([body.norm.float() for body in row if body.norm is not None]).cpu().numpy()
    losses = torch.stack([body.loss for body in row if body.loss is not None]).cpu().numpy()
    # A batch of several rows (prior preservation) shows the same timestep in each.
    timesteps = torch.stack([body.timestep[0] for body in row if body.timestep is not None]).cpu().tolist()
    return sketches, norms, losses, tuple(timesteps)


def _show(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{'x'.join(map(str, shape))} ({name})" for name, shape in shapes.items()) or "no images"


def _show_calls(calls: Sequence[Call]) -> str:
    return ", ".join(f"{name}({', '.join(map(str, shape))})" for name, shape in calls) or "nothing from torch"
