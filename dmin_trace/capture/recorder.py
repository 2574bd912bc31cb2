"""Records the gradients of a loop's bodies in a store, whatever loop they come from.

    loss -> Recorder.backward: gradient -> mean of the draws -> transform -> compress
         -> Recorder.take: checks, rows, chunks -> store

The checks are what makes two gradients comparable, so they fail closed. For every sample of a slot the timestep that
reached the denoiser and the sequence of random calls must be the same; they are kept in the store, and a query must
meet them again.

Several processes run as many bodies each, since loops gather in them. They meet after the first sample and after every
chunk: if one of them has failed, or was told to stop, all of them stop there.

A chunk is written while the next one is recorded, so what keeps it from being written is noticed a little later.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dmin_trace import store
from dmin_trace.capture.batches import image_shapes, named_entries, word_shapes
from dmin_trace.capture.columns import Columns
from dmin_trace.capture.provenance import data_fingerprint
from dmin_trace.capture.randomness import Call
from dmin_trace.capture.ranks import Ranks
from dmin_trace.capture.signals import FirstSignal
from dmin_trace.capture.step import CaptureStep
from dmin_trace.capture.weights import Trainable
from dmin_trace.command import Script
from dmin_trace.errors import CaptureError, DminTraceError, QueryError, StoppedError, TraceError, WeightsError
from dmin_trace.project import Mean, compress_gradient, make_plan, take_gradient
from dmin_trace.settings import Dtype, Settings
from dmin_trace.store import Header, NoiseFacts, ParameterFacts, ProjectionFacts, Store, StoreLock, Writer
from dmin_trace.version import VERSION

logger = logging.getLogger(__name__)

FIRST = 20
"""Samples at the beginning of which at most half may fail to load: else it is the data set that is wrong."""
LOGGED = 10
"""Samples that failed to load whose reasons are logged, one by one."""


@dataclass(frozen=True, kw_only=True)
class CaptureSource:
    """What a capture is of, besides the weights and the settings.

    samples: N, the number of training samples or of queries.
    columns: the readable columns of the data set.
    trained: whether the training moved a parameter. The loss must depend on each one that it moved.
    fetch: gives the batch of one sample as the capture fetches it, or None if the data set is not known.
    script: the script whose loop is run; an unknown one if the loop is the user's own code.
    edited_script: the script may differ from the one that began the store.
    packages: further packages whose versions are kept in the header.
    """

    samples: int
    columns: Columns
    trained: Callable[[torch.nn.Parameter], bool]
    fetch: Callable[[int], Any] | None = None
    script: Script = Script()
    edited_script: bool = False
    packages: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class CaptureTarget:
    """Where the rows of a capture go.

    out: the path of the store.
    resume: whether to continue an unfinished store at `out`.
    like: the finished store that the queries are for; None for a capture of training samples.
    reserve: bytes that must stay free on the disk for what the script saves at its end; None for no such limit.
    trial: capture two samples, check them, and write nothing.
    created: called with the header of a new store.
    """

    out: Path
    resume: bool = True
    like: Store | None = None
    reserve: int | None = None
    trial: bool = False
    created: Callable[[Header], None] = lambda header: None


@dataclass
class _Chunk:
    """The rows of one chunk while they come in."""

    number: int
    slots: range
    values: np.ndarray
    scale: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    columns: dict[str, list[Any]]
    filled: int = 0


_Row = tuple[np.ndarray, np.ndarray, np.ndarray] | None
"""A sample's sketches (T, v), norms (T,) and losses (T,); None for one that could not be loaded."""


class Recorder:
    """The rows of one capture, of a training run or of queries, on their way to the store."""

    def __init__(
        self,
        settings: Settings,
        trainable: Trainable,
        source: CaptureSource,
        target: CaptureTarget,
        ranks: Ranks | None = None,
    ) -> None:
        """Fixes what is recorded. The parameters must hold the weights that the capture is of.

        Args:
            settings: what to capture and how.
            trainable: the parameters with respect to which gradients are taken.
            source: what the capture is of.
            target: where its rows go.
            ranks: the processes that fill the store; None if this is the only one.

        Raises:
            QueryError: the parameters or the projection are not those of `target.like`.
            WeightsError: the weights are not those of `target.like`.
        """
        like = target.like
        self.settings = settings
        self.trainable = trainable
        self.columns = source.columns
        self.out = target.out
        self.samples = source.samples
        self.like = like
        self.trial = target.trial
        self.weights_saved = False
        self._source = source
        self._target = target
        self._processes = ranks or Ranks()
        self._signal = FirstSignal()
        self._announced = False
        self._lock: StoreLock | None = None
        self._held: Exception | None = None
        self._meeting = False
        self._bodies = self._rows = self._longest = 0
        self._missing: dict[int, str] = {}
        self._row_missing = False
        self._before_first = 0
        self._writers = tuple(dict.fromkeys(("torch", *source.packages, "zarr", "numpy")))
        self._weights = trainable.weights_fingerprint()
        if like is not None:
            self._check_weights_like(like)
            self._check_header_like(like)
        self._make_plan(None if like is None else like.header.projection.width)
        if like is not None:
            self._check_plan_like(like)
        self._ever_reached = [False] * len(trainable.names)
        self._batch_shapes: dict[str, tuple[int, ...]] = {}
        self._row_columns: Mapping[str, str | int | float] = {}
        self._mean: Mean | None = None
        self._row: list[CaptureStep] = []
        self._first: list[CaptureStep] = []
        self._timesteps: tuple[float, ...] = ()
        self._queue: list[tuple[int, range]] = []
        self._chunk: _Chunk | None = None
        self._writer: Writer | None = None
        # Chunks are written while the next bodies run: most of the time it waits for the disk.
        self._pool = ThreadPoolExecutor(1, "dmin_trace writes")
        self._writing: Future[None] | None = None
        self._progress: Progress | None = None
        self._pending: list[int] = []
        self._kept = 0

    def begin(self) -> list[int]:
        """Saves the weights, and says which samples this process captures, in order.

        Raises:
            CaptureError: there are no samples.
            TraceError: the store's path is taken.
        """
        if self.samples == 0:
            raise CaptureError("The training dataset is empty, so there is nothing to capture.")
        settings, world = self.settings, self._processes.count
        self._dtype: Dtype = "float32" if self.like is not None else settings.dtype
        self._chunk_rows = store.choose_chunk_rows(
            self.samples, settings.timestep_count, settings.dimension, self._dtype, world
        )
        if self.trial:
            return [0, min(1, self.samples - 1)]
        with self._holding():
            self._take_over()
        self._meet()
        pending = self._pending
        with self._holding():
            if self._processes.rank == 0 and self.like is None:
                self._prepare(finished=not pending)
        self._meet()
        rows = self._chunk_rows
        ours = [range(c * rows, min((c + 1) * rows, self.samples)) for c in pending[self._processes.rank :: world]]
        self._queue = [(slots.start // rows, slots) for slots in ours]
        samples = [sample for slots in ours for sample in slots]
        # Loops gather inside their body: every process must run as many bodies, so the shorter ones repeat a sample.
        self._longest = max(
            sum(min((c + 1) * rows, self.samples) - c * rows for c in pending[rank::world]) for rank in range(world)
        )
        self._kept = len(samples)
        if self.like is None:
            self._signal.hold()
        self._meeting = True
        self._show_progress(self._longest)
        return samples + [samples[-1] if samples else 0] * (self._longest - len(samples))

    def hold(self, error: Exception) -> bool:
        """Keeps an error of this process for the next meeting, up to which it must run bodies; False for one alone."""
        if not self._meeting or self._processes.count == 1:
            return False
        self._held = self._held or error
        return True

    def sample(self, number: int, item: Any, batch: Any = None) -> None:
        """A sample comes: keeps its columns, and notes the shapes of the images and words of its batch.

        Args:
            number: its dataset index.
            item: what the dataset gave for it.
            batch: what was collated from it, or None where the loop keeps its batches to itself.

        Raises:
            QueryError: the images are of another shape than those of the trace.
            CaptureError: a column was asked for that the dataset does not have.
        """
        self._row_missing = False
        if batch is not None:
            self._note_shapes(named_entries(batch))
        self._row_columns = self.columns.of(number, item)

    def missing(self, number: int, error: Exception) -> None:
        """A sample could not be loaded: its row says so, whatever its bodies, if it has any, are run on.

        Args:
            number: its dataset index.
            error: why.

        Raises:
            CaptureError: most of the first samples could not.
            Exception: the error itself, for a query.
        """
        if self.like is not None or self.trial:
            raise error
        self._row_missing = True
        if number in self._missing:
            return
        why = f"{type(error).__name__}: {error}"
        self._missing[number] = why
        first = min(FIRST, self.samples)
        if self._rows < FIRST and 2 * len(self._missing) > first:
            raise CaptureError(
                f"{len(self._missing)} of the first samples could not be loaded, among them sample {number}: {why}. "
                "Mend the data set; a capture goes on without single samples, but not without most of them."
            )
        if len(self._missing) <= LOGGED:
            logger.warning(
                "Sample %d could not be loaded: %s. It is never ranked, and dmin-trace info lists it.", number, why
            )
        elif len(self._missing) == LOGGED + 1:
            logger.warning("More samples could not be loaded; dmin-trace info lists them.")

    def skip(self) -> None:
        """Ends the row of a sample that could not be loaded, where no bodies are run for it."""
        if self._writer is None:
            # What the store holds is known from the first sample that can be loaded.
            self._before_first += 1
            return
        self._end_row(None)

    def backward(self, body: CaptureStep, loss: torch.Tensor, scale: float = 1.0) -> None:
        """Takes the gradient of a body's loss, and compresses the mean of its draws.

        Args:
            body: the body that is under way.
            loss: a scalar.
            scale: multiplies the loss before the backward pass and is divided out again.

        Raises CaptureError for a loss that is no scalar, or has no gradient.
        """
        if self._held is not None:
            return
        if loss.numel() != 1:
            raise CaptureError(f"The script's loss has shape {tuple(loss.shape)}; expected a scalar.")
        if not loss.requires_grad:
            raise CaptureError(
                "The script's loss has no gradient: it does not depend on a trainable parameter, or was computed under "
                "torch.no_grad."
            )
        self._announce()
        taken, reached = take_gradient(loss.reshape(()), self.trainable.tensors, scale)
        self._ever_reached = [a or b for a, b in zip(self._ever_reached, reached, strict=True)]
        body.loss = loss.detach().float().reshape(())
        draws = self.settings.draws
        if draws > 1:
            if body.slot.draw == 0:
                self._mean = Mean(draws)
            if self._mean is None:
                raise CaptureError("A timestep's first draw is missing. This is an error of dmin_trace; report it.")
            self._mean.add(taken)
            if body.slot.draw < draws - 1:
                return
            taken, self._mean = self._mean.hand_out(), None
        body.sketch, body.norm = compress_gradient(taken, self._plan, signs=self.settings.transform == "sign")

    def take(self, body: CaptureStep) -> None:
        """Checks a body's random calls, and after the sample's last slot its row."""
        self._announce()
        row = None
        with self._holding():
            self._check_draws(body)
            self._row.append(body)
            if len(self._row) == self.settings.timestep_count * self.settings.draws:
                row, self._row = self._check_row(self._row), []
        self._bodies += 1
        if self._bodies == self.settings.timestep_count * self.settings.draws and not self.trial:
            self._meet()
            self._open_store()
            for _ in range(self._before_first):
                self._end_row(None)
        if self._bodies % (self.settings.timestep_count * self.settings.draws) == 0:
            self._end_row(row)

    def moved(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these parameters are others than at the beginning; what is not trained is taken for moved."""
        ours = {id(tensor) for tensor in self.trainable.tensors}
        return any(id(p) not in ours for p in parameters) or self.trainable.weights_fingerprint() != self._weights

    def finish(self) -> None:
        """Marks the store complete, once every process has written its chunks."""
        if self._writer is None:
            return
        # All have met after their last row.
        with self._holding():
            if self._processes.rank == 0:
                self._writer.finish()
                logger.info("The trace of %d samples is in %s.", self.samples, self.out)
        self._meet()
        if self._missing:
            logger.warning(
                "%d samples could not be loaded; dmin-trace info lists them. To try them again: dmin-trace verify "
                "TRACE --drop-failed, then run the capture again.",
                len(self._missing),
            )

    def stop(self) -> None:
        """Stops showing progress, and lets go of signals and of the store."""
        self._signal.let_go()
        if self._progress is not None:
            self._progress.stop()
        self._pool.shutdown()
        if self._lock is not None:
            self._lock.release()

    # -- beginning -------------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Locks the store, and looks at what is there: which chunks are pending."""
        self._pending = list(range(-(-self.samples // self._chunk_rows)))
        if self._processes.rank == 0 and self.like is None:
            try:
                store.make_folder(self.out.absolute().parent)
            except OSError as error:
                raise TraceError(f"{self.out} cannot be written: {error.strerror or error}.") from None
            lock = StoreLock(self.out.absolute())
            lock.take()
            self._lock = lock
        self._existing = self.out.exists()
        if self._existing and self._target.resume:
            earlier = store.open_store(self.out, unfinished=True)
            self._refuse_another(earlier)
            theirs = earlier.header
            ours = self.settings.projection, self.settings.dimension, self.trainable.length
            if (theirs.projection.kind, theirs.dimension, theirs.projection.length) == ours:
                self._make_plan(theirs.projection.width)
            self._chunk_rows = earlier.header.chunk_rows
            self._pending = [c for c, done in enumerate(earlier.done) if not done]
        elif self._existing:
            store.check_free(self.out)

    def _prepare(self, finished: bool) -> None:
        """Removes what killed captures left, and saves what a query needs besides the store."""
        store.sweep(self.out.absolute())
        if finished:
            # It stopped between its last chunk and the word that it is complete.
            Writer(self.out, store.open_store(self.out, unfinished=True).header).finish()
        self.trainable.save(store.weights_beside(self.out))
        self.weights_saved = True

    def _refuse_another(self, earlier: Store) -> None:
        """Raises TraceError for a store that cannot be gone on with, before what lies beside it is written over."""
        if earlier.complete:
            raise TraceError(
                f"{self.out} exists already and is complete. Give another path (out, --out), or move it away."
            )
        header = earlier.header
        if not self._source.edited_script:
            script = self._source.script
            store.check_script(
                self.out,
                header,
                script.name,
                script.sha256,
                "Run the script as it was; or, if its loss and its data are the same, go on with --edited-script.",
            )
        store.check_data(self.out, header, self.samples, "")
        if header.weights != self._weights:
            raise TraceError(
                f"{self.out} belongs to another capture: its weights are {header.weights[:16]}, those of this run "
                f"{self._weights[:16]}. Give another path (out, --out), or move it away."
            )
        theirs, ours = _treatment(header), _treatment(self.settings)
        if theirs != ours:
            raise TraceError(
                f"{self.out} belongs to another capture: its gradients have {theirs}, those of this run {ours}. Give "
                "another path (out, --out), or move it away."
            )

    def _check_weights_like(self, trace: Store) -> None:
        found, expected = self.trainable, trace.header.parameters
        if found.fingerprint != expected.fingerprint:
            raise QueryError(
                f"The script trains {len(found.names)} tensors with {found.length:,} numbers, but the trace is of "
                f"{len(expected.names)} with {trace.header.projection.length:,}. Repeat the command that made it, or "
                "give the model that it is of."
            )
        if self._weights != trace.header.weights:
            raise WeightsError(
                f"The weights are not those of the trace: their fingerprint is {self._weights[:16]}, that of the trace "
                f"{trace.header.weights[:16]}. Give the weights that were captured, which lie beside the trace."
            )

    def _check_header_like(self, trace: Store) -> None:
        ours, theirs = _treatment(self.settings), _treatment(trace.header)
        if ours != theirs:
            raise QueryError(
                f"The query's gradients have {ours}, those of {trace.path} have {theirs}, so its header contradicts "
                "its settings. The store was changed by hand: capture again."
            )

    def _make_plan(self, width: int | None) -> None:
        """Fixes the projection: a new one, or of the width that a store has."""
        settings = self.settings
        self._plan = make_plan(self.trainable.length, settings.dimension, settings.seed, settings.projection, width)

    def _check_plan_like(self, trace: Store) -> None:
        if self._plan.fingerprint != trace.header.projection.fingerprint:
            raise QueryError(
                f"The projection's fingerprint is {self._plan.fingerprint[:16]}, that of the trace "
                f"{trace.header.projection.fingerprint[:16]}. The trace was made by a version of dmin_trace that "
                "projects otherwise; query it with that version."
            )

    def _show_progress(self, samples: int) -> None:
        console = Console(stderr=True)
        if self._processes.rank != 0 or not console.is_terminal:
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

    def _note_shapes(self, entries: dict[str, Any]) -> None:
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

    def _check_draws(self, body: CaptureStep) -> None:
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
        elif self._first and body.draws.calls != (first := self._first[len(self._row)]).draws.calls:
            raise CaptureError(
                f"On sample {body.sample} the script drew {calls}, on sample {first.sample} "
                f"{_show_calls(first.draws.calls)}, so their noise differs. Samples of different sizes (buckets) or a "
                "random branch cannot be captured."
            )
        elif body.slot.draw and body.draws.calls != (first := self._row[-body.slot.draw]).draws.calls:
            raise CaptureError(
                f"In draw {body.slot.draw} of slot {body.slot.number} the script drew {calls}, in the first "
                f"{_show_calls(first.draws.calls)}. A random branch cannot be captured."
            )

    def _check_row(self, row: list[CaptureStep]) -> _Row:
        """The numbers of a sample's bodies, if they can be compared with those of the others."""
        if not self._first:
            self._check_reached()
        sketches, norms, losses, seen = _to_cpu(row)
        draws = self.settings.draws
        losses = losses.reshape(-1, draws).mean(axis=1)
        timesteps = seen[::draws]
        if any(timestep != timesteps[at // draws] for at, timestep in enumerate(seen)):
            raise CaptureError(
                f"The denoiser saw the timesteps {seen} for sample {row[0].sample}; expected each {draws} times, once "
                "for each draw. The script draws timesteps in a way that is not pinned."
            )
        if not self._first:
            self._first = row
            self._timesteps = timesteps
            if self.like is not None and timesteps != self.like.header.timesteps:
                raise QueryError(
                    f"The denoiser saw the timesteps {timesteps} on the query, {self.like.header.timesteps} on the "
                    "training samples. Repeat the command that made the trace, or its loop."
                )
        elif timesteps != self._timesteps:
            slot = next(k for k, (a, b) in enumerate(zip(timesteps, self._timesteps, strict=True)) if a != b)
            raise CaptureError(
                f"In slot {slot} the denoiser saw timestep {timesteps[slot]} for sample {row[0].sample}, and "
                f"{self._timesteps[slot]} for sample {self._first[0].sample}. The script draws timesteps in a way that "
                "is not pinned."
            )
        return None if self._row_missing else (sketches, norms, losses)

    def _end_row(self, row: _Row) -> None:
        """Keeps a row, if it is not a repeated one, and stops here if that has to be."""
        self._rows += 1
        if self._progress is not None:
            rate = self._progress.tasks[0].speed
            self._progress.update(self._task, advance=1, rate=f"{rate:.1f}/s" if rate else "")
        # What a process that has failed still runs is for the others' sake; its rows are none.
        if self._rows <= self._kept and not self.trial and self._held is None:
            with self._holding():
                self._keep_row(row)
        last = self._rows == self._longest
        if self._writing is not None and (last or self._writing.done()):
            with self._holding():
                self._written()
        if self._processes.count > 1 and not self.trial and (last or self._rows % self._chunk_rows == 0):
            self._meet(stopping=not last)
        elif self._signal.caught and self._chunk is None and not last:
            self._interrupt(self._signal.caught)

    def _check_reached(self) -> None:
        """After the first sample: every tensor that the training moved must have got a gradient."""
        never = [
            (name, tensor)
            for name, tensor, reached in zip(
                self.trainable.names, self.trainable.tensors, self._ever_reached, strict=True
            )
            if not reached
        ]
        names = ", ".join(name for name, _ in never[:3])
        trained = [name for name, tensor in never if self._source.trained(tensor)]
        if trained or len(never) == len(self._ever_reached):
            raise CaptureError(
                f"The loss does not depend on {len(never)} of the {len(self._ever_reached)} trainable tensors, "
                f"among them {names}, though the training moved them. Does the loop body skip a part of the model when "
                "the model is in eval mode, or for some batches? What a plain loop does not train must have "
                "requires_grad=False."
            )
        if never:
            logger.warning(
                "The loss does not depend on %d of the %d trainable tensors, among them %s, and the training did not "
                "move them; their gradients are zero.",
                len(never),
                len(self._ever_reached),
                names,
            )

    def _keep_row(self, row: _Row) -> None:
        if self._chunk is None:
            number, slots = self._queue.pop(0)
            shape = (len(slots), self.settings.timestep_count)
            self._chunk = _Chunk(
                number,
                slots,
                np.zeros((*shape, self.settings.dimension), self._dtype),
                np.ones(shape, np.float32),
                np.full(shape, store.FAILED, np.float32),
                np.full(shape, np.nan, np.float32),
                {name: [] for name in self.columns.kinds},
            )
        chunk = self._chunk
        at = chunk.filled
        if row is not None:
            # Quantised now, so that a chunk that waits takes its stored size.
            quantised, scale = store.quantise(row[0][None], self._dtype)
            chunk.values[at], chunk.scale[at], chunk.norm[at], chunk.loss[at] = quantised[0], scale[0], *row[1:]
        for name, values in chunk.columns.items():
            values.append(None if row is None else self._row_columns[name])
        chunk.filled += 1
        if chunk.filled == len(chunk.slots) and self._writer is not None:
            self._written()
            # Slots are dataset indices here; the column keeps them apart for stores that are not made in order.
            self._writing = self._pool.submit(
                self._writer.write,
                chunk.number,
                chunk.values,
                chunk.scale,
                chunk.norm,
                chunk.loss,
                np.arange(chunk.slots.start, chunk.slots.stop, dtype=np.int64),
                chunk.columns,
            )
            self._chunk = None

    def _written(self) -> None:
        """Waits for the chunk that is being written, if one is. Raises what kept it from being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _open_store(self) -> None:
        """Creates the store, or goes on with one, now that the first sample has shown what is in it."""
        with self._holding():
            header = self.header()
            if self._processes.rank == 0:
                if not self._existing:
                    self._check_room(header)
                self._writer = store.resume(self.out, header) if self._existing else store.create(self.out, header)
                self._target.created(self._writer.header)
        self._meet()
        with self._holding():
            if self._processes.rank != 0:
                self._writer = store.resume(self.out, header)
        self._meet()

    def _check_room(self, header: Header) -> None:
        """Raises CaptureError if the store would take the room that the script needs to save what it trained."""
        needed, free = store.bytes_of(header), shutil.disk_usage(self.out.absolute().parent).free
        if self._target.reserve is not None and free < needed + self._target.reserve:
            raise CaptureError(
                f"The trace would take {needed:,} bytes, and its disk has {free:,} free, of which the script may need "
                f"{self._target.reserve:,} to save what it trained. Make room, or capture to another disk (out, --out)."
            )
        if free < needed:
            logger.warning(
                "The trace will take %s bytes, and its disk has %s free. A full disk stops a capture, which goes on "
                "when there is room again.",
                f"{needed:,}",
                f"{free:,}",
            )

    # -- stopping --------------------------------------------------------------------------------------------------

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Where there are several processes, an error in the block is kept until they meet, and later blocks are
        passed over in so far as they raise because of it."""
        try:
            yield
        except Exception as error:
            if self._processes.count == 1:
                raise
            self._held = self._held or error

    def _meet(self, stopping: bool = False) -> None:
        """Waits for the other processes, and raises if one of them has failed: all of them stop at the same body.

        Args:
            stopping: stop if one of them was told to by a signal.

        Raises:
            CaptureError: one of them has failed, or has ended.
            StoppedError: one of them was told to stop.
        """
        if self._processes.count == 1:
            return
        own = {"error": "" if self._held is None else _words(self._held), "signal": self._signal.caught}
        try:
            told = [json.loads(words) for words in self._processes.gather(json.dumps(own))]
        except Exception as error:
            self._meeting = False
            raise CaptureError(
                f"Process {self._processes.rank} of {self._processes.count} no longer reaches the others, so one of "
                f"them has ended ({_words(error).splitlines()[0][:200]}). What is in the store is kept, and left out "
                "when the capture is run again."
            ) from None
        if any(words["error"] for words in told):
            self._meeting = False
            if self._held is not None:
                raise self._held
            number, words = next((number, words) for number, words in enumerate(told) if words["error"])
            raise CaptureError(f"Process {number} of {self._processes.count} could not go on: {words['error']}")
        signal = max(words["signal"] for words in told)
        if stopping and signal:
            with self._holding():
                self._written()
            # All have done what they were writing, or tell why not; so it is counted.
            self._meet()
            self._meeting = False
            self._interrupt(signal)

    def _announce(self) -> None:
        """Says once that a signal was noticed, and what comes of it."""
        if self._signal.caught and not self._announced:
            self._announced = True
            chunk = self._chunk
            left = len(chunk.slots) - chunk.filled if chunk is not None else self._chunk_rows
            logger.warning(
                "%s: the chunk in hand is finished first, %d more samples; a second one stops at once.",
                self._signal.name,
                left,
            )

    def _interrupt(self, signal: int) -> None:
        self._written()
        done = (
            0
            if self._writer is None
            else self.samples - sum(len(self._writer.rows(chunk)) for chunk in self._writer.pending())
        )
        name = self._signal.name or "a signal to another process"
        raise StoppedError(
            f"The capture was stopped by {name}: {done:,} of {self.samples:,} samples are in {self.out}. It goes on "
            "where it stopped when it is run again.",
            signal,
        )

    def header(self) -> Header:
        """What is known of the capture once its first sample is recorded."""
        settings, batch = self.settings, None if self.like is not None else self._source.fetch
        return Header(
            id=uuid.uuid4().hex,
            samples=self.samples,
            timesteps=self._timesteps,
            dimension=settings.dimension,
            dtype=self._dtype,
            chunk_rows=self._chunk_rows,
            projection=ProjectionFacts(
                kind=settings.projection,
                seed=settings.seed,
                length=self._plan.length,
                width=self._plan.width,
                fingerprint=self._plan.fingerprint,
            ),
            parameters=ParameterFacts(
                names=self.trainable.names,
                shapes=self.trainable.shapes,
                fingerprint=self.trainable.fingerprint,
            ),
            weights=self._weights,
            noise=NoiseFacts(
                seed=settings.seed,
                # They are the same in every draw.
                draws=tuple(tuple(body.draws.calls) for body in self._first if body.slot.draw == 0),
            ),
            transform=settings.transform,
            draws=settings.draws,
            codec="none" if self.like is not None else settings.codec,
            batch=self._batch_shapes,
            columns=self.columns.kinds,
            settings=_settings_facts(settings),
            writers={"dmin_trace": VERSION} | {name: version(name) for name in self._writers},
            script=self._source.script.name,
            script_sha256=self._source.script.sha256,
            data_sha256="" if batch is None else data_fingerprint(self.samples, batch),
            unreached=tuple(
                name for name, reached in zip(self.trainable.names, self._ever_reached, strict=True) if not reached
            ),
        )


def _words(error: Exception) -> str:
    """An error in words, for another process or for a line of ours."""
    return str(error) if isinstance(error, DminTraceError) else f"{type(error).__name__}: {error}"


def _settings_facts(settings: Settings) -> dict[str, Any]:
    """The settings as JSON keeps them."""
    facts = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


def _treatment(facts: Settings | Header) -> str:
    """What is done to gradients before they are compressed, for a person to read."""
    return f"draws {facts.draws} and transform {facts.transform}"


def _to_cpu(row: list[CaptureStep]) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, ...]]:
    """A row's sketches (T, v), norms (T,), losses (T x D,) and timesteps, T x D: one transfer each, once a sample."""
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
