"""Records the gradients of a loop's bodies in a store, whatever loop they come from.

    loss -> Recorder.backward: objective -> gradient -> mean of the draws -> precondition -> compress
         -> Recorder.take: checks, rows, chunks -> store

The checks are what makes two gradients comparable, so they fail closed. For every sample of a slot the timestep that
reached the denoiser and the sequence of random calls must be the same; they are kept in the store, and a query must
meet them again.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dmin_trace import store
from dmin_trace.batches import image_shapes, named_entries, word_shapes
from dmin_trace.body import Body
from dmin_trace.columns import Columns
from dmin_trace.compress import compress, make_plan
from dmin_trace.errors import CaptureError, QueryError, TraceError, WeightsError
from dmin_trace.gradients import Mean, gradients
from dmin_trace.objective import squared_output
from dmin_trace.precondition import Preconditioner
from dmin_trace.randomness import Call
from dmin_trace.settings import Settings
from dmin_trace.store import Header, Trace, Writer
from dmin_trace.verify import mendable
from dmin_trace.weights import Trainable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """The processes that fill one store together, each its own chunks.

    number: this one's, from 0; the first makes the store, which the others open.
    count: how many there are.
    wait: waits until all of them have come as far.
    """

    number: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


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


class Recorder:
    """The rows of one capture, of a training run or of queries, on their way to the store."""

    def __init__(
        self,
        settings: Settings,
        trainable: Trainable,
        preconditioner: Preconditioner,
        columns: Columns,
        *,
        out: Path,
        samples: int,
        resuming: bool,
        trained: Callable[[torch.nn.Parameter], bool],
        created: Callable[[Header], None] = lambda header: None,
        like: Trace | None = None,
        processes: Processes | None = None,
        writers: Sequence[str] = (),
        trial: bool = False,
        repairing: bool = False,
    ) -> None:
        """Fixes what is recorded. The trainables must hold the weights that the capture is of.

        Args:
            settings: what to capture and how.
            trainable: with respect to what gradients are taken.
            preconditioner: what is done to them.
            columns: of the dataset.
            out: the store.
            samples: N.
            resuming: go on with an unfinished store at `out`, if one is there.
            trained: whether the training moved a parameter, which the loss must then depend on.
            created: called with the header of a new store.
            like: a finished store, for a query: the capture must be of the same kind as that one.
            processes: those that fill the store; this one alone if not given.
            writers: packages that take part, whose versions are kept.
            trial: record two samples, check them, and write nothing.
            repairing: record the damaged chunks of the store at `out` anew, which may be complete.

        Raises:
            QueryError: the trainables or the projection are not those of `like`.
            WeightsError: the weights are not, or adam's divisors.
        """
        self.settings = settings
        self.trainable = trainable
        self.preconditioner = preconditioner
        self.columns = columns
        self.out = out
        self.samples = samples
        self.like = like
        self.trial = trial
        self.weights_saved = False
        self._resuming = resuming
        self._repairing = repairing
        self._damaged: list[int] = []
        self._trained = trained
        self._created = created
        self._processes = processes or Processes()
        self._writers = tuple(dict.fromkeys(("dmin_trace", "torch", *writers, "zarr", "numpy")))
        self._weights = trainable.weights_fingerprint()
        self._divisors = preconditioner.fingerprint
        if like is not None:
            self._check_weights_like(like)
            self._check_preconditioner_like(like)
            self._check_objective_like(like)
        self._plan = make_plan(trainable.length, settings.dimension, settings.seed, settings.projection)
        if like is not None:
            self._check_plan_like(like)
        self._ever_reached = [False] * len(trainable.names)
        self._batch_shapes: dict[str, tuple[int, ...]] = {}
        self._row_columns: Mapping[str, str | int | float] = {}
        self._mean: Mean | None = None
        self._row: list[Body] = []
        self._first: list[Body] = []
        self._timesteps: tuple[float, ...] = ()
        self._queue: list[tuple[int, range]] = []
        self._chunk: _Chunk | None = None
        self._writer: Writer | None = None
        self._progress: Progress | None = None
        self._kept = self._taken = 0

    def begin(self) -> list[int]:
        """Saves the weights, and adam's divisors, and says which samples this process captures, in order.

        Raises:
            CaptureError: there are no samples.
            TraceError: the store's path is taken.
        """
        if self.samples == 0:
            raise CaptureError("The training dataset is empty, so there is nothing to capture.")
        settings, world = self.settings, self._processes.count
        self._dtype = "float32" if self.like is not None else settings.dtype
        self._chunk_rows = store.choose_chunk_rows(self.samples, settings.slots, settings.dimension, self._dtype, world)
        if self.trial:
            return [0, min(1, self.samples - 1)]
        pending = list(range(-(-self.samples // self._chunk_rows)))
        self._existing = self.out.exists()
        if self._existing and self._resuming:
            if self._repairing:
                self._damaged = mendable(self.out)
            earlier = store.open_trace(self.out, unfinished=True)
            self._refuse_another(earlier)
            self._chunk_rows = earlier.header.chunk_rows
            pending = [c for c, done in enumerate(earlier.done) if not done or c in set(self._damaged)]
            if not pending and self._processes.number == 0:
                # It stopped between its last chunk and the word that it is complete.
                Writer(self.out, earlier.header).finish()
        elif self._existing:
            store.check_free(self.out)
        if self._processes.number == 0 and self.like is None:
            path = store.weights_beside(self.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.trainable.save(path)
            self.preconditioner.save(store.precondition_beside(self.out), self._weights)
            self.weights_saved = True
        rows = self._chunk_rows
        ours = [range(c * rows, min((c + 1) * rows, self.samples)) for c in pending[self._processes.number :: world]]
        self._queue = [(slots.start // rows, slots) for slots in ours]
        samples = [sample for slots in ours for sample in slots]
        # Loops gather inside their body: every process must run as many bodies, so the shorter ones repeat a sample.
        longest = max(
            sum(min((c + 1) * rows, self.samples) - c * rows for c in pending[rank::world]) for rank in range(world)
        )
        self._kept = len(samples)
        self._show_progress(longest)
        return samples + [samples[-1] if samples else 0] * (longest - len(samples))

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
        if batch is not None:
            self._note_shapes(named_entries(batch))
        self._row_columns = self.columns.of(number, item)

    def backward(self, body: Body, loss: torch.Tensor, scale: float = 1.0) -> None:
        """Takes the gradient of a body's loss, or of what else is the objective, and compresses the mean of its draws.

        Args:
            body: the body that is under way.
            loss: a scalar.
            scale: multiplies the objective before the backward pass and is divided out again.

        Raises CaptureError for a loss that is none, or has no gradient, or where the denoiser's output cannot be told.
        """
        if loss.numel() != 1:
            raise CaptureError(f"The script's loss has shape {tuple(loss.shape)}; expected a scalar.")
        if not loss.requires_grad:
            raise CaptureError(
                "The script's loss has no gradient: it does not depend on a trainable parameter, or was computed under "
                "torch.no_grad."
            )
        target = loss.reshape(()) if self.settings.objective == "loss" else squared_output(body.outputs, loss)
        # The graph must not outlive the body.
        body.outputs.clear()
        taken, reached = gradients(target, self.trainable.tensors, scale)
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
        signs = self.preconditioner.kind == "sign"
        body.sketch, body.norm = compress(self.preconditioner.apply(taken), self._plan, signs=signs)

    def take(self, body: Body) -> None:
        """Checks a body's random calls, and after the sample's last slot its row."""
        self._check_draws(body)
        self._row.append(body)
        if len(self._row) == self.settings.slots * self.settings.draws:
            row, self._row = self._row, []
            self._take_row(row)

    def moved(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these parameters are others than at the beginning; what is not trained is taken for moved."""
        ours = {id(tensor) for tensor in self.trainable.tensors}
        return any(id(p) not in ours for p in parameters) or self.trainable.weights_fingerprint() != self._weights

    def finish(self) -> None:
        """Marks the store complete, once every process has written its chunks."""
        if self._writer is None:
            return
        self._processes.wait()
        if self._processes.number == 0:
            self._writer.finish()
            logger.info("The trace of %d samples is in %s.", self.samples, self.out)
        self._processes.wait()

    def stop(self) -> None:
        """Stops showing progress."""
        if self._progress is not None:
            self._progress.stop()

    # -- beginning -------------------------------------------------------------------------------------------------

    def _refuse_another(self, earlier: Trace) -> None:
        """Raises TraceError for a store that cannot be gone on with, before what lies beside it is written over."""
        if earlier.complete and not self._repairing:
            raise TraceError(
                f"{self.out} exists already and is complete. Give another path (out, --out), or move it away."
            )
        header = earlier.header
        if header.weights != self._weights:
            raise TraceError(
                f"{self.out} belongs to another capture: its weights are {header.weights[:16]}, those of this run "
                f"{self._weights[:16]}. Give another path (out, --out), or move it away."
            )
        facts = _aim(header.objective, header.draws), _aim(self.settings.objective, self.settings.draws)
        if facts[0] != facts[1]:
            raise TraceError(
                f"{self.out} belongs to another capture: its gradients are of {facts[0]}, those of this run of "
                f"{facts[1]}. Give another path (out, --out), or move it away."
            )
        theirs = header.precondition, header.preconditioner
        ours = self.settings.precondition, self._divisors
        if theirs != ours:
            raise TraceError(
                f"{self.out} belongs to another capture: its gradients are preconditioned by {_named(*theirs)}, those "
                f"of this run by {_named(*ours)}. Give another path (out, --out), or move it away."
            )

    def _check_weights_like(self, trace: Trace) -> None:
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

    def _check_preconditioner_like(self, trace: Trace) -> None:
        if (self.settings.precondition, self._divisors) != (trace.header.precondition, trace.header.preconditioner):
            raise WeightsError(
                f"{store.precondition_beside(trace.path)} is not what the trace's gradients were divided by: its "
                f"fingerprint is {self._divisors[:16] or 'none'}, that of the trace "
                f"{trace.header.preconditioner[:16] or 'none'}. Put the file back that the capture left there."
            )

    def _check_objective_like(self, trace: Trace) -> None:
        ours = _aim(self.settings.objective, self.settings.draws)
        theirs = _aim(trace.header.objective, trace.header.draws)
        if ours != theirs:
            raise QueryError(
                f"The query's gradients are of {ours}, those of {trace.path} of {theirs}, so its header contradicts "
                "its settings. The store was changed by hand: capture again."
            )

    def _check_plan_like(self, trace: Trace) -> None:
        if self._plan.fingerprint != trace.header.projection.fingerprint:
            raise QueryError(
                f"The projection's fingerprint is {self._plan.fingerprint[:16]}, that of the trace "
                f"{trace.header.projection.fingerprint[:16]}. The trace was made by a version of dmin_trace that "
                "projects otherwise; query it with that version."
            )

    def _show_progress(self, samples: int) -> None:
        console = Console(stderr=True)
        if self._processes.number != 0 or not console.is_terminal:
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

    def _take_row(self, row: list[Body]) -> None:
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
            self._keep_row(sketches, norms, losses)

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
        objective = "loss" if self.settings.objective == "loss" else "denoiser's output"
        trained = [name for name, tensor in never if self._trained(tensor)]
        if trained or len(never) == len(self._ever_reached):
            raise CaptureError(
                f"The {objective} does not depend on {len(never)} of the {len(self._ever_reached)} trainable tensors, "
                f"among them {names}, though the training moved them. Does the loop body skip a part of the model when "
                "the model is in eval mode, or for some batches? What a plain loop does not train must have "
                "requires_grad=False."
            )
        if never:
            logger.warning(
                "The %s does not depend on %d of the %d trainable tensors, among them %s, and the training did not "
                "move them; their gradients are zero.",
                objective,
                len(never),
                len(self._ever_reached),
                names,
            )

    def _keep_row(self, sketches: np.ndarray, norms: np.ndarray, losses: np.ndarray) -> None:
        if self._chunk is None:
            number, slots = self._queue.pop(0)
            shape = (len(slots), self.settings.slots)
            self._chunk = _Chunk(
                number,
                slots,
                np.zeros((*shape, self.settings.dimension), np.float32),
                np.zeros(shape, np.float32),
                np.zeros(shape, np.float32),
                {name: [] for name in self.columns.kinds},
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
        if self.like is not None and self._timesteps != self.like.header.timesteps:
            raise QueryError(
                f"The denoiser saw the timesteps {self._timesteps} on the query, {self.like.header.timesteps} on the "
                "training samples. Repeat the command that made the trace, or its loop."
            )
        if self.trial:
            return
        header = self.header()
        if self._processes.number == 0:
            self._writer = store.resume(self.out, header) if self._existing else store.create(self.out, header)
            if self._damaged:
                # Not before it is known that this run is the one that can make them anew.
                self._writer.undo(self._damaged)
            self._created(self._writer.header)
        self._processes.wait()
        if self._processes.number != 0:
            self._writer = store.resume(self.out, header)

    def header(self) -> Header:
        """What is known of the capture once its first sample is recorded."""
        settings = self.settings
        return Header(
            id=uuid.uuid4().hex,
            samples=self.samples,
            timesteps=self._timesteps,
            dimension=settings.dimension,
            dtype=self._dtype,
            chunk_rows=self._chunk_rows,
            projection=store.ProjectionFacts(
                kind=settings.projection,
                seed=settings.seed,
                length=self._plan.length,
                fingerprint=self._plan.fingerprint,
            ),
            parameters=store.ParameterFacts(
                names=self.trainable.names,
                shapes=self.trainable.shapes,
                fingerprint=self.trainable.fingerprint,
            ),
            weights=self._weights,
            noise=store.NoiseFacts(
                seed=settings.seed,
                # They are the same in every draw.
                draws=tuple(tuple(body.draws.calls) for body in self._first if body.slot.draw == 0),
            ),
            precondition=settings.precondition,
            objective=settings.objective,
            draws=settings.draws,
            codec="none" if self.like is not None else settings.codec,
            preconditioner=self._divisors,
            batch=self._batch_shapes,
            columns=self.columns.kinds,
            settings=_settings_facts(settings),
            writers={name: version(name) for name in self._writers},
        )


def _settings_facts(settings: Settings) -> dict[str, Any]:
    """The settings as JSON keeps them."""
    facts = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


def _aim(objective: str, draws: int) -> str:
    """What a gradient is of, for a person to read."""
    return f"{objective}, draws {draws}"


def _named(kind: str, fingerprint: str) -> str:
    """A way of preconditioning, for a person to read."""
    return f"{kind} {fingerprint[:16]}".strip()


def _to_cpu(row: list[Body]) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, ...]]:
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
