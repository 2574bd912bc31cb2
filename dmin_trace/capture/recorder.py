"""Records the gradients of training steps in a store, for every kind of loop.

    loss -> Recorder.backward: gradient, or difference -> pooled with those of its row -> transform -> projection
         -> Recorder.take: checks -> row -> chunk -> store

The drivers run the training steps: `recording` for a loop of one's own, `accelerate` for scripts.
"""

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dmin_trace.capture.checks import RowChecks, check_place, query_plan, refuse_other_capture
from dmin_trace.capture.chunk_queue import ChunkQueue, Row
from dmin_trace.capture.dataset import CaptureSource, FailedSamples, Value, data_fingerprint
from dmin_trace.capture.output import CaptureOutput
from dmin_trace.capture.pinning import Draw, PinnedTimestep, pin_among, pinned_timesteps
from dmin_trace.capture.pooling import GradientPool
from dmin_trace.capture.probe import TimestepProbe
from dmin_trace.capture.ranks import FirstSignal
from dmin_trace.capture.run_checks import RunChecks
from dmin_trace.capture.step import CaptureStep
from dmin_trace.capture.thumbnails import SampleThumbnails
from dmin_trace.capture.weights import Trainable
from dmin_trace.errors import CaptureError, StoppedError
from dmin_trace.project import LOSS_SCALE, compress_gradient, make_plan, take_gradient
from dmin_trace.settings import Dtype, Settings
from dmin_trace.store import FILE_COLUMN, Header, ParameterFacts, ProjectionFacts, Store, choose_chunk_rows
from dmin_trace.version import VERSION

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One training step of a capture, before it is opened by `StepGuard.open`.

    stored: whether its gradient goes to the store.
    begins, last: whether its sample's batch is made for it, and whether it is the last of the capture.
    sign: as in `CaptureStep`.
    """

    sample: int
    timestep: PinnedTimestep
    pin: Draw | None
    observed: bool = False
    kept: bool = True
    stored: bool = False
    begins: bool = False
    last: bool = False
    sign: int = 0


class Recorder:
    """Takes the gradients of one capture, of training samples or of queries, to the store.

    probe: finds the draw of the timestep.
    subtracted: of a difference, the step that was taken last, while the one that it is subtracted from comes next.
    rehearsals: the samples that are recorded before the rows, to be compared; their rows go nowhere.
    weights_saved: whether this process has saved the trained weights beside the store.
    finished: whether the store is complete.
    row_ends: in a trial, the time in seconds at which each sample's last training step ended.
    """

    def __init__(self, settings: Settings, trainable: Trainable, source: CaptureSource, output: CaptureOutput) -> None:
        """Fixes weights and projection. Raises QueryError or WeightsError if they, or the precision or the device, are
        not those of `output.like`."""
        like = output.like
        self.settings, self.trainable, self.samples = settings, trainable, source.samples
        self._source, self.output, self._ranks = source, output, output.ranks
        # Before the weights, which have other values in another precision.
        self._run = RunChecks(trainable, source, like)
        self._weights = trainable.weights_fingerprint()
        if like is None:
            self._plan = make_plan(trainable.length, settings.dimension, settings.seed, settings.projection)
        else:
            self._plan = query_plan(settings, trainable, self._weights, like)
        self._dtype: Dtype = settings.dtype if like is None else "float32"
        self._checks = RowChecks(settings, trainable, source, like)
        self.probe = TimestepProbe()
        if like is not None:
            self.probe = TimestepProbe(pin_among(like.header.noise.draws[0]), done=True)
        self.rehearsals: list[int] = []
        self._rehearsed = 0
        self._rehearsal: tuple[int, Row] | None = None
        self._shape = settings.timestep_count, settings.dimension, self._dtype
        self._chunk_rows = choose_chunk_rows(self.samples, *self._shape, self._ranks.count, settings.group_count)
        self._row_steps = settings.timestep_count * settings.draws
        self._steps = self._rows = self._longest = self._kept = self._before_first = 0
        self._row: list[CaptureStep] = []
        self.subtracted: CaptureStep | None = None
        # None for a sample that could not be loaded.
        self._row_columns: dict[str, Value | None] | None = {}
        self._thumbnails = SampleThumbnails(settings.thumbnails if like is None else 0)
        self._failed = FailedSamples(self.samples)
        self._pool = GradientPool(settings)
        self._chunks: ChunkQueue | None = None
        self._signal = FirstSignal()
        self.row_ends: list[float] = []
        self._announced = self.weights_saved = self.finished = False
        self._progress = _sample_bar()

    def begin(self) -> list[int]:
        """Saves the weights, and returns this process's samples. Raises TraceError if the path is another capture's."""
        if self.samples == 0:
            raise CaptureError("The training dataset is empty, so there is nothing to capture.")
        self._source.models.watch_steps(self.trainable.tensors)
        if self.output.trial:
            self.rehearsals = [0]
            self._longest = 2
            return [0, min(1, self.samples - 1)]
        ranks = self._ranks
        ranks.meeting = True
        with ranks.holding():
            earlier = self.output.find()
            pending = self._continue(earlier)
        ranks.meet()
        with ranks.holding():
            self.weights_saved = self.output.prepare(self.trainable, earlier)
        ranks.meet()
        size = self._chunk_rows
        chunks = [(c, range(c * size, min((c + 1) * size, self.samples))) for c in pending]
        ours = [chunks[rank :: ranks.count] for rank in range(ranks.count)]
        self._chunks = ChunkQueue(ours[ranks.rank], *self._shape, self.settings.group_count)
        samples = [row for _, rows in ours[ranks.rank] for row in rows]
        # Every process must run as many training steps: one with fewer rows repeats its last sample.
        self._longest = max(sum(len(rows) for _, rows in share) for share in ours)
        self._kept = len(samples)
        if self.output.like is None:
            self._signal.hold()
        if ranks.rank == 0:
            self._progress.add_task("capture", total=self._longest, rate="")
            self._progress.start()
        self.output.progressed(0, self._longest)
        samples += [samples[-1] if samples else 0] * (self._longest - len(samples))
        # The last is recorded again, as the first row. The first sample of a store that is continued must be as it was.
        if samples and self.output.like is None:
            first = [] if earlier is None else [earlier.header.noise.first_sample]
            self.rehearsals = first + samples[:1]
        return samples

    def _continue(self, earlier: Store | None) -> list[int]:
        """Takes over the projection and the chunks of the store that is continued, and returns the chunks to fill."""
        if earlier is None:
            return list(range(-(-self.samples // self._chunk_rows)))
        self._run.continue_from(earlier)
        refuse_other_capture(self.output.out, earlier, self.settings, self._source, self._weights)
        header, plan = earlier.header, self._plan
        self._checks.continue_from(header)
        theirs = header.projection.kind, header.dimension, header.projection.length
        if theirs == (plan.kind, plan.dimension, plan.length):
            self._plan = replace(plan, width=header.projection.width)
        self._chunk_rows = header.chunk_rows
        return [chunk for chunk, done in enumerate(earlier.done) if not done]

    @property
    def steps_needed(self) -> int:
        """How many training steps the capture takes, once the probe is done."""
        passes = 2 if self._source.differences else 1
        return self.probe.steps + (len(self.rehearsals) + self._longest) * self._row_steps * passes

    @property
    def observes(self) -> bool:
        """Whether it must be seen what the training steps draw: until the first row."""
        return self._checks.noise is None

    def turns(self, samples: Sequence[int]) -> Iterator[Turn]:
        """The training steps of the capture in order: those of the probe, of the rehearsals, and of the rows."""
        timesteps = pinned_timesteps(self.settings)
        while samples and not self.probe.done:
            timestep, pin = self.probe.next(timesteps[0])
            yield Turn(self.rehearsals[-1], timestep, pin, observed=True, kept=False)
        pin, observed = self.probe.pin, self.observes
        for sample, timestep in product(self.rehearsals, timesteps):
            yield Turn(sample, timestep, pin, observed=observed, begins=timestep is timesteps[0])
        for n, (sample, timestep) in enumerate(product(samples, timesteps), 1):
            begins, last = timestep is timesteps[0], n == len(samples) * len(timesteps)
            turn = Turn(sample, timestep, pin, observed=self.observes, stored=True, begins=begins, last=last)
            if self._source.differences:
                turn = replace(turn, sample=2 * sample, begins=True, sign=1)
                yield replace(turn, sample=2 * sample + 1, last=False, sign=-1)
            yield turn

    def header(self) -> Header:
        """Returns the store's header, after the first sample. Queries are not compressed, and have no fingerprint."""
        settings, source, plan, checks = self.settings, self._source, self._plan, self._checks
        of_queries, trained = self.output.like is not None, self.trainable
        fetch = None if of_queries else source.fetch
        if checks.noise is None:
            raise CaptureError("No sample was recorded before its header. This is an error of dmin_trace; report it.")
        reached = zip(trained.names, checks.reached, strict=True)
        watched = self._thumbnails.watch
        data_sha256 = "" if fetch is None else data_fingerprint(source.samples, watched(fetch, source.columns.file))
        self._thumbnails.decide()
        return Header(
            id=uuid.uuid4().hex,
            samples=self.samples,
            timesteps=checks.timesteps,
            dimension=settings.dimension,
            dtype=self._dtype,
            chunk_rows=self._chunk_rows,
            projection=ProjectionFacts(
                kind=plan.kind, seed=plan.seed, length=plan.length, width=plan.width, fingerprint=plan.fingerprint
            ),
            parameters=ParameterFacts(names=trained.names, shapes=trained.shapes, fingerprint=trained.fingerprint),
            weights=self._weights,
            noise=checks.noise,
            transform=settings.transform,
            draws=settings.draws,
            group_count=settings.group_count,
            codec="none" if of_queries else settings.codec,
            batch=checks.batch_shapes,
            columns=source.columns.kinds,
            # As many rows as timesteps are the same as a row for each.
            settings=asdict(settings) | {"rows": settings.group_count},
            writers={"dmin_trace": VERSION} | {name: version(name) for name in ("torch", *source.packages, "numpy")},
            script=source.script.name,
            script_sha256=source.script.sha256,
            data_sha256=data_sha256,
            weights_of=source.weights_of[:1000],
            unreached=tuple(name for name, was_reached in reached if not was_reached),
            files_sha256=source.files_sha256,
            run=self._run.facts,
            thumbnails=self._thumbnails.facts,
        )

    def sample(self, number: int, item: Any, batch: Any = None) -> None:
        """Begins a sample: keeps the columns of its item, and checks the shapes in its batch, if that is known.

        Raises QueryError for other shapes than those of the trace, or if the two samples of a difference cannot be
        told; CaptureError if a named column is missing.
        """
        if batch is not None:
            self._checks.check_batch(number, batch)
        self._row_columns = self._source.columns.of(number, item)
        self._thumbnails.begin(batch, self._row_columns.get(FILE_COLUMN))
        if self._source.differences:
            check_place(number, self._row_columns.get(FILE_COLUMN))

    def missing(self, number: int, error: Exception) -> None:
        """Begins a sample that failed to load; its row stays empty. Raises an error for a query, or if most fail."""
        if self.output.like is not None or self.output.trial:
            raise error
        self._row_columns = None
        self._thumbnails.begin(None)
        self._failed.add(number, error, self._rows)

    def skip(self) -> None:
        """Ends the row of a sample that could not be loaded, and for which no training steps are run."""
        if self._chunks is None or self._chunks.writer is None:
            # The store is made after the first sample that can be loaded.
            self._before_first += 1
        else:
            self._end_row(None)

    def backward(self, step: CaptureStep, loss: torch.Tensor, *, scaled: bool) -> None:
        """Takes the gradient of a training step's loss, and after the last step of a row compresses the row's gradient.

        Of a difference, the gradient that is subtracted comes first. `scaled`: the loop has a GradScaler. Raises
        CaptureError if the loss is not a scalar, or has no gradient.
        """
        if self._ranks.error is not None or not step.kept:
            return
        if loss.numel() != 1:
            raise CaptureError(f"The script's loss has shape {tuple(loss.shape)}; expected a scalar.")
        if not loss.requires_grad:
            raise CaptureError(
                "The script's loss has no gradient: it does not depend on a trainable parameter, or was computed under "
                "torch.no_grad."
            )
        self._announce_signal()
        taken, reached = take_gradient(loss.reshape(()), self.trainable.tensors, LOSS_SCALE if scaled else 1.0)
        self._checks.note_reached(reached)
        step.loss = loss.detach().float().reshape(())
        if (whole := self._pool.add(step.pinned, taken, step.sign)) is not None:
            step.gradient, step.norm = compress_gradient(whole, self._plan, signs=self.settings.transform == "sign")

    def take(self, step: CaptureStep) -> None:
        """Checks the random calls of a training step, and ends the row after the sample's last step.

        The rows of `rehearsals` come first.
        """
        self._announce_signal()
        row = None
        subtracted, self.subtracted = self.subtracted, step if step.sign < 0 else None
        with self._ranks.holding():
            self._checks.check_step(step, self._row)
            self._checks.check_difference(step, subtracted, self._row)
            if step.sign < 0:
                return
            self._row.append(step)
            if len(self._row) == self._row_steps:
                steps, self._row = self._row, []
                row = self._checks.check_row(steps)
        self._steps += 1
        if self._steps % self._row_steps:
            return
        if self._rehearsed < len(self.rehearsals):
            self._rehearsed += 1
            self._steps = 0
            self._rehearsal = None if row is None else (step.sample, row)
            return
        if self._steps == self._row_steps:
            with self._ranks.holding():
                self._run.finish()
        if row is not None and self._rehearsal is not None:
            (sample, before), self._rehearsal = self._rehearsal, None
            if sample == step.sample:
                with self._ranks.holding():
                    self._checks.check_again(sample, before, row)
        if self._steps == self._row_steps and self._chunks is not None:
            self._ranks.meet()
            self._chunks.writer = self.output.open(self.header)
            # Those of the store, which another process or an earlier capture may have begun.
            self._thumbnails.facts = self._chunks.writer.header.thumbnails
            self._checks.check_continued()
            for _ in range(self._before_first):
                self._end_row(None)
        self._end_row(None if self._row_columns is None else row)

    def _end_row(self, row: Row | None) -> None:
        """Keeps a row, unless it is a repeated one, and stops here after a signal."""
        self._rows += 1
        self.output.progressed(self._rows, self._longest)
        for task in self._progress.tasks:
            self._progress.update(task.id, advance=1, rate=f"{task.speed:.1f}/s" if task.speed else "")
        chunks, ranks = self._chunks, self._ranks
        if chunks is None:
            self.row_ends.append(time.perf_counter())
            return
        last = self._rows == self._longest
        # A process that has failed runs on for the others; its rows are discarded.
        if self._rows <= self._kept and ranks.error is None:
            with ranks.holding():
                columns = None if row is None else self._row_columns
                thumbnail = b"" if row is None else self._thumbnails.make()
                chunks.add(row, columns or dict.fromkeys(self._source.columns.kinds), thumbnail)
        with ranks.holding():
            chunks.check(wait=last)
        if last or self._rows % self._chunk_rows == 0:
            signal = ranks.meet(self._signal.caught)
            if signal and not last:
                self._interrupt(signal, chunks)

    def moved(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these parameters have changed since the beginning. For those that are not trained it returns True."""
        ours = {id(tensor) for tensor in self.trainable.tensors}
        return any(id(p) not in ours for p in parameters) or self.trainable.weights_fingerprint() != self._weights

    def finish(self) -> None:
        """Marks the store complete, after every process has written its chunks."""
        writer = None if self._chunks is None else self._chunks.writer
        if writer is None:
            return
        with self._ranks.holding():
            if self._ranks.rank == 0:
                writer.finish()
                logger.info("The trace of %d samples is in %s.", self.samples, self.output.out)
        self._ranks.meet()
        self.finished = True
        if self._failed:
            logger.warning(
                "%d samples could not be loaded; dmin-trace info lists them. To try them again: dmin-trace verify "
                "TRACE --drop-failed, then run the capture again.",
                len(self._failed),
            )

    def stop(self) -> None:
        """Ends the progress bar, and releases the signals and the store."""
        self._source.models.stop()
        self._signal.let_go()
        self._progress.stop()
        if self._chunks is not None:
            self._chunks.close()
        self.output.lock.release()

    def _announce_signal(self) -> None:
        if self._signal.caught and not self._announced:
            self._announced = True
            left = self._chunks.missing_rows if self._chunks is not None else None
            what = f"the current chunk is finished first, {left or self._chunk_rows} more samples"
            logger.warning("%s: %s; a second one stops at once.", self._signal.name, what)

    def _interrupt(self, signal: int, chunks: ChunkQueue) -> None:
        with self._ranks.holding():
            chunks.wait()
        # After this meeting every process has written its chunks, so they can be counted.
        self._ranks.meet()
        self._ranks.meeting = False
        writer = chunks.writer
        done = 0 if writer is None else self.samples - sum(len(writer.header.rows(chunk)) for chunk in writer.pending())
        raise StoppedError(
            f"The capture was stopped by {self._signal.name or 'a signal to another process'}: {done:,} of "
            f"{self.samples:,} samples are in {self.output.out}. Run it again: it continues where it stopped.",
            signal,
        )


def _sample_bar() -> Progress:
    """A bar on standard error that counts samples; nothing is shown if that is not a terminal."""
    console = Console(stderr=True)
    texts = TextColumn("capture"), BarColumn(), MofNCompleteColumn(), TextColumn("samples")
    times = TextColumn("[dim]{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*texts, *times, console=console, disable=not console.is_terminal)
