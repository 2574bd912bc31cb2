"""Records a plain PyTorch loop, without accelerate and without a trainer: `recording`.

    with dmin_trace.recording(model, samples=len(dataset), out="trace.zarr") as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss = training_loss(model, dataset[i])
                    loss.backward()

The loss is the script's own; nothing of it is rebuilt. In a body the generators are seeded alike for every sample, the
timestep draw is pinned, and `loss.backward()` hands the gradient to the recorder instead of `.grad`. Afterwards
everything stands as it did before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dmin_trace import query
from dmin_trace.capture.dataset import Columns
from dmin_trace.capture.randomness import (
    PinnedDraws,
    PinnedTimestep,
    RandomState,
    pinned_timesteps,
    seed_everything,
    seed_of,
)
from dmin_trace.capture.recorder import Recorder
from dmin_trace.capture.source import CaptureSource, CaptureTarget
from dmin_trace.capture.step import TIMESTEP_ARGUMENTS, CaptureStep, takes_timestep
from dmin_trace.capture.weights import Trainable, find_named, find_trainable
from dmin_trace.errors import CaptureError, QueryError, SettingsError
from dmin_trace.project import LOSS_SCALE
from dmin_trace.query import Hit
from dmin_trace.search import Score, check_k
from dmin_trace.settings import Settings, make_settings
from dmin_trace.store import Queries, Store, open_store

Values = Sequence[str | int | float] | np.ndarray | torch.Tensor


def recording(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    *,
    samples: int,
    out: str | os.PathLike[str] | None = None,
    like: Store | str | os.PathLike[str] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    timesteps: int | Sequence[int] | None = None,
    dimension: int | None = None,
    dtype: str | None = None,
    projection: str | None = None,
    seed: int | None = None,
    draws: int | None = None,
    transform: str | None = None,
    codec: str | None = None,
    columns: Mapping[str, Values] | None = None,
) -> Recording:
    """Records the compressed gradient of every sample of a plain PyTorch loop, or those of queries.

    Use it as a context manager once the training is done, with the weights that are to be explained in the model:

        with dmin_trace.recording(model, samples=len(dataset), out="trace.zarr", timesteps=10) as recording:
            for i in recording.samples:                 # those that are not in the store yet
                for k in recording.timesteps:               # the timesteps
                    with recording.step(i, k):
                        loss = training_loss(model, dataset[i])     # draws noise and timestep as in training
                        loss.backward()                             # goes to the store; nothing reaches .grad

    The weights are written beside the store before anything is recorded. A recording that was interrupted goes on
    where it stopped when it is run again. To ask, run the same loop over the images in question, `like` the trace:

        with dmin_trace.recording(model, samples=len(images), like="trace.zarr") as recording:
            ...
        recording.hits(k=10)

    Args:
        model: what was trained, one module or several; the modules inside DistributedDataParallel and torch.compile.
        samples: N, how many samples there are.
        out: the store.
        like: for queries, the trace that is asked, instead of `out` and of the settings.
        optimizer: one or several; what they train is recorded. Without it, every parameter with `requires_grad`.
        timesteps, dimension, dtype, projection, seed, draws, transform, codec: see `Settings`.
        columns: what a person reads about the samples, such as captions: N values for each name.

    Raises:
        SettingsError: an argument that cannot be meant.
        TraceError: `like` is no finished store.
    """
    trace = None if like is None else like if isinstance(like, Store) else open_store(Path(like))
    if not isinstance(samples, int) or samples < 0:
        raise SettingsError(f"samples is {samples!r}; expected how many there are.")
    columns = dict(columns or {})
    given = {
        "timesteps": timesteps,
        "dimension": dimension,
        "dtype": dtype,
        "projection": projection,
        "seed": seed,
        "draws": draws,
        "transform": transform,
        "codec": codec,
        "columns": tuple(columns) or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if (trace is None) == (out is None):
        raise SettingsError("recording takes out='...', where a new trace is to be written, or like='...', to ask one.")
    if trace is not None and given:
        raise SettingsError(f"{', '.join(given)} was given with like: a query has the settings of its trace.")
    for name, values in columns.items():
        if len(values) != samples:
            raise SettingsError(f"The column {name} has {len(values)} values, but there are {samples} samples.")
    settings = make_settings(trace.header.settings if trace is not None else given)
    return Recording(
        _listed(model, torch.nn.Module, "model", "modules"),
        settings,
        Columns(None, settings.columns if trace is None else None),
        samples=samples,
        out=None if out is None else Path(out),
        like=trace,
        optimizers=None if optimizer is None else _listed(optimizer, torch.optim.Optimizer, "optimizer", "optimizers"),
        item=None if trace is not None else lambda i: {name: values[i] for name, values in columns.items()},
    )


class Place:
    """Where in the schedule a loop's body stands: what `Recording.body` gives.

    For code that does not draw its timestep by torch.randint, which is pinned by itself, but takes it from outside.
    """

    def __init__(self, slot: PinnedTimestep, draws: PinnedDraws) -> None:
        """The place of a slot; that it was asked for is noted among the body's draws."""
        self._slot = slot
        self._draws = draws
        self.given: float | None = None

    def timestep(self, steps: int) -> int:
        """The timestep, in a schedule of so many steps.

        Raises CaptureError if it was given as a number (`timesteps=[...]`) that lies beyond the schedule.
        """
        timestep = self._slot.index_in(steps)
        self._hand_out(timestep)
        return timestep

    def fraction(self) -> float:
        """The time, in a schedule that runs from 0 to 1.

        Raises CaptureError if timesteps were given as a list, which has no place on such a schedule.
        """
        if self._slot.timestep is not None:
            raise CaptureError("Timesteps were given as a list, which says nothing of fractions. Give a count.")
        self._hand_out(self._slot.fraction)
        return self._slot.fraction

    def _hand_out(self, timestep: float) -> None:
        if self.given is None:
            self.given = timestep
        self._draws.hand_out("timestep")


class Recording:
    """A recording under way; made by `recording`."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        settings: Settings,
        columns: Columns,
        *,
        samples: int,
        out: Path | None,
        like: Store | None,
        optimizers: Sequence[torch.optim.Optimizer] | None,
        item: Callable[[int], Any] | None,
        writers: Sequence[str] = (),
        batch: Callable[[int], Any] | None = None,
    ) -> None:
        """Begins nothing yet; that is `__enter__`.

        Args:
            models: what was trained.
            settings: those of the trace, for queries.
            columns: of the dataset.
            samples: N.
            out: the store, or None for queries.
            like: the trace, for queries.
            optimizers: what they train is recorded; None for all parameters with `requires_grad`.
            item: gives the dataset's item for a sample, where `columns` are looked for; None if `describe` is called.
            writers: packages that take part, whose versions are kept in the store.
            batch: gives the batch of a sample, by a few of which the data set is known again; None if that is not
                known here.
        """
        self._models = list(models)
        self._settings = settings
        self._columns = columns
        self._samples = samples
        self._out = out
        self._like = like
        self._optimizers = None if optimizers is None else list(optimizers)
        self._item = item
        self._writers = writers
        self._batch = batch
        self._all_slots = pinned_timesteps(settings)
        self._entered: ExitStack | None = None
        self._recorder: Recorder | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._pending: list[int] = []
        self._done = 0
        self._body: CaptureStep | None = None
        self._scaled = False
        self._failed = False
        self._asked: np.ndarray | None = None

    # -- what the loop calls ---------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> range:
        """The numbers of a sample's bodies, from 0 to T - 1; to T x D - 1 where each timestep has D draws."""
        return range(len(self._all_slots))

    @property
    def samples(self) -> Iterator[int]:
        """The samples that are still to be recorded, in order.

        Before each the generators are seeded alike, so that all samples get the same augmentation when they are
        fetched.
        """
        for sample in self._pending[self._done // len(self._all_slots) :]:
            seed_everything(seed_of(self._settings.seed, 0))
            yield sample

    @contextmanager
    def step(self, sample: int, slot: int) -> Iterator[Place]:
        """The run of the loss on one sample at one timestep: call `loss.backward()` in it, once.

        Args:
            sample: its index, the next of `samples`.
            slot: the slot's number, the next of `slots`.

        Raises:
            CaptureError: it is not this one's turn; or the body gave no gradient, or one that cannot be compared with
                those of other samples, or changed the model.
            QueryError: a query's body did not draw what the bodies of the trace drew.
        """
        recorder = self._check_turn(sample, slot)
        if slot == 0 and self._item is not None:
            recorder.sample(sample, self._item(sample))
        pinned = self._all_slots[slot]
        body = CaptureStep(sample, pinned, PinnedDraws(pinned, backward=self._backward), versions=self._versions())
        place = Place(pinned, body.draws)
        self._body, self._scaled = body, False
        seed_everything(pinned.seed)
        body.draws.start()
        try:
            yield place
        finally:
            body.draws.stop()
            self._body = None
        if body.timestep is None and place.given is not None:
            body.timestep = torch.tensor([place.given], dtype=torch.float32)
        # Until it is known that all is well: a row that lost a body must not be filled up with others'.
        self._failed = True
        self._close(recorder, body)
        self._failed = False

    def describe(self, sample: int, item: Any, batch: Any) -> None:
        """Tells of the sample that comes, before its first body: for loops that have dataset items and batches.

        Args:
            sample: its index.
            item: what the dataset gave for it, where columns are looked for.
            batch: what was collated from it; a query's images must have the shapes of the trace's.
        """
        self._check_turn(sample, 0).sample(sample, item, batch)

    def missing(self, sample: int, error: Exception) -> None:
        """Tells of a sample that cannot be loaded, instead of its bodies: its place in the trace stays empty.

        It is never ranked, and `dmin-trace info` lists it.

        Args:
            sample: its index, the next of `samples`.
            error: why.

        Raises:
            CaptureError: it is not this one's turn, or most of the first samples could not be loaded.
            Exception: the error itself, for a query.
        """
        recorder = self._check_turn(sample, 0)
        recorder.missing(sample, error)
        recorder.skip()
        self._done += len(self._all_slots)
        self._finish_if_over(recorder)

    def hits(self, k: int = 10, *, score: Score = "deflated", exact: bool = False) -> list[list[Hit]]:
        """After a recording `like` a trace: the training samples with the largest influence on each query, best first.

        Args:
            k: how many training samples for each query.
            score: "dmin" or "deflated", as for `dmin_trace.attribute`.
            exact: scan all samples even if the trace has an index.

        Raises QueryError if this was no recording of queries or is not over, k is out of range, or the trace cannot be
        asked for this score.
        """
        if self._like is None or self._asked is None:
            raise QueryError(
                "There are no hits: this recording makes a trace, or has not recorded all its queries. Ask with "
                "recording(model, like='...', samples=...), and for hits when its loop is over."
            )
        check_k(self._like, k)
        answer = query.answer_queries(self._like, self._asked, k=k, score=score, exact=exact)
        return query.hits_of(self._like, answer.ranking)

    @property
    def queries(self) -> Queries:
        """The gradients of the queries, after a recording `like` a trace."""
        assert self._like is not None and self._asked is not None
        names = tuple(f"query {k}" for k in range(self._samples))
        return Queries(self._asked, names, (None,) * len(names), self._like.header.id)

    # -- beginning and end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Recording:
        if self._entered is not None:
            raise CaptureError("This recording was entered already. Make another with recording(...).")
        self._refuse_what_cannot_be_recorded()
        with ExitStack() as entering:
            entering.callback(RandomState.take().restore)
            out = self._out
            if out is None:
                out = Path(entering.enter_context(tempfile.TemporaryDirectory(prefix="dmin-trace-"))) / "queries.zarr"
            optimizers = self._optimizers
            trainable = self._find_trainable()
            source = CaptureSource(
                samples=self._samples,
                columns=self._columns,
                # Who trains what is not known here: what is not trained can be said by requires_grad.
                trained=lambda tensor: optimizers is None or any(tensor in o.state for o in optimizers),
                fetch=None if self._batch is None else self._batch_of,
                packages=self._writers,
            )
            recorder = Recorder(self._settings, trainable, source, CaptureTarget(out=out, like=self._like))
            self._prepare_models(entering)
            entering.callback(recorder.stop)
            self._pending = recorder.begin()
            self._recorder, self._entered = recorder, entering.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._entered is None:
            return
        self._recorder = None
        with self._entered:
            left = len(self._pending) - self._done // len(self._all_slots)
            if kind is None and left:
                raise CaptureError(
                    f"{left} of {self._samples} samples were not recorded. Loop over all of recording.samples and "
                    "recording.timesteps. What is in the store is kept, and left out when the recording is run again."
                )

    def _refuse_what_cannot_be_recorded(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_rank() != 0:
            raise CaptureError("A recording runs in one process. Make it in the one of rank 0 alone.")
        for model in self._models:
            if isinstance(model, torch.nn.parallel.DistributedDataParallel) or hasattr(model, "_fsdp_wrapped_module"):
                raise CaptureError(f"The model is inside {type(model).__name__}. Give the module inside, model.module.")

    def _find_trainable(self) -> Trainable:
        if self._like is None:
            return find_trainable(self._models, self._optimizers)
        # Which parameters were trained is known, and a model that was loaded to be asked need not say it again.
        found = find_named(self._models, self._like.header.parameters.names)
        if not all(tensor.requires_grad for tensor in found.tensors):
            raise QueryError(
                "The trace is of parameters that have requires_grad=False now, so they have no gradients. Set it, as "
                "it was in the training: model.requires_grad_(True)."
            )
        return found

    def _prepare_models(self, entering: ExitStack) -> None:
        """Eval mode, empty `.grad`, eyes on timesteps and optimizers, until the recording is over."""
        self._parameters = [parameter for model in self._models for parameter in model.parameters()]
        for parameter in self._parameters:
            # What lands here in spite of all is then seen, and what was there is as it was.
            entering.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        for model in self._models:
            for module in model.modules():
                entering.callback(setattr, module, "training", module.training)
            model.eval()
        for module in _denoisers(self._models):
            entering.callback(module.register_forward_pre_hook(self._see_timestep, with_kwargs=True).remove)
        entering.callback(register_optimizer_step_pre_hook(self._refuse_step).remove)
        scale = torch.amp.GradScaler.scale
        entering.callback(setattr, torch.amp.GradScaler, "scale", scale)
        torch.amp.GradScaler.scale = self._scale  # type: ignore[method-assign,assignment]

    # -- in a body -------------------------------------------------------------------------------------------------

    def _check_turn(self, sample: int, slot: int) -> Recorder:
        """Raises CaptureError unless this sample and slot are the next."""
        if self._recorder is None:
            raise CaptureError(
                "The recording is not under way. Loop inside: with dmin_trace.recording(...) as recording."
            )
        if self._failed:
            raise CaptureError("An earlier body failed. Mend what its error said, and make another recording.")
        if self._body is not None:
            raise CaptureError(
                f"A body was opened inside that of sample {self._body.sample}, slot {self._slot}. Close that one first."
            )
        if not 0 <= sample < self._samples or slot not in self.timesteps:
            raise CaptureError(
                f"There is no sample {sample}, slot {slot}: samples go from 0 to {self._samples - 1}, slots from 0 to "
                f"{len(self._all_slots) - 1}."
            )
        row, next_slot = divmod(self._done, len(self._all_slots))
        expected = (self._pending[row], next_slot) if row < len(self._pending) else None
        if expected == (sample, slot):
            return self._recorder
        before = self._pending[:row]
        if (
            sample in before
            or sample not in self._pending
            or expected is None
            or expected[0] == sample
            and slot < next_slot
        ):
            raise CaptureError(
                f"Sample {sample}, slot {slot} was recorded already. Loop over recording.samples, which are those that "
                "are not, and over recording.timesteps."
            )
        raise CaptureError(
            f"Sample {sample}, slot {slot} came where sample {expected[0]}, slot {expected[1]} is next. Loop over "
            "recording.samples and recording.timesteps, in their order."
        )

    def _backward(self, loss: torch.Tensor, *args: Any, **options: Any) -> None:
        """The loop's `loss.backward()`."""
        body, recorder = self._body, self._recorder
        if body is None or recorder is None:
            raise CaptureError("loss.backward() was called outside a body. This is an error of dmin_trace; report it.")
        body.backwards += 1
        if body.backwards > 1:
            raise CaptureError(
                f"loss.backward() was called twice in the body of sample {body.sample}, slot {self._slot}; "
                "expected once. Add the losses up first."
            )
        if args or options.get("gradient") is not None or options.get("inputs") is not None:
            raise CaptureError("loss.backward() was given a gradient or inputs; expected none, on a scalar loss.")
        # A loop may call it where its autocast has not ended.
        with torch.autocast(loss.device.type, enabled=False):
            recorder.backward(body, loss, LOSS_SCALE if self._scaled else 1.0)

    def _scale(self, losses: Any) -> Any:
        """The loop's `scaler.scale(loss)`: a scale that moves during training is no good here."""
        self._scaled = True
        return losses

    def _see_timestep(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._body is not None:
            self._body.see_timestep(module, args, kwargs)

    def _refuse_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        raise CaptureError(
            "An optimizer stepped inside the recording, which is of a model that is trained already. Compute the loss "
            "and call loss.backward() in it, and nothing else of the training."
        )

    @property
    def _slot(self) -> int:
        """The number of the next body, or of that which is under way."""
        return self._done % len(self._all_slots)

    def _batch_of(self, sample: int) -> Any:
        """A sample's batch, fetched as `samples` has them fetched."""
        seed_everything(seed_of(self._settings.seed, 0))
        return self._batch(sample) if self._batch is not None else None

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]

    def _close(self, recorder: Recorder, body: CaptureStep) -> None:
        """Checks what a body did, and hands it to the recorder."""
        if body.draws.error is not None:
            raise body.draws.error
        which = f"the body of sample {body.sample}, slot {self._slot}"
        landed = [parameter for parameter in self._parameters if parameter.grad is not None]
        for parameter in landed:
            parameter.grad = None
        if landed:
            raise CaptureError(
                f"Gradients reached .grad in {which}, by another way than loss.backward(), such as "
                "torch.autograd.backward. Call loss.backward()."
            )
        if not body.backwards:
            raise CaptureError(f"loss.backward() was not called in {which}; expected once.")
        written = [p for p, before in zip(self._parameters, body.versions, strict=True) if p._version != before]
        if written and recorder.moved(written):
            raise CaptureError(f"The model's parameters were changed in {which}. Compute the loss in it, and no more.")
        if not body.draws.pins:
            raise CaptureError(
                f"The timestep was not pinned in {which}, so every sample would have its own. Pinned are "
                "torch.randint(0, steps, (batch,)) and torch.multinomial(weights, batch); other code can ask for it: "
                "with recording.step(i, k) as place, place.timestep(steps) or place.fraction()."
            )
        if body.timestep is None:
            raise CaptureError(
                f"The model was not called with a timestep in {which} (an argument named "
                f"{', '.join(TIMESTEP_ARGUMENTS)}), so it cannot be told whether it was the slot's. Ask for it: with "
                "recording.step(i, k) as place, place.timestep(steps) or place.fraction()."
            )
        recorder.take(body)
        self._done += 1
        self._finish_if_over(recorder)

    def _finish_if_over(self, recorder: Recorder) -> None:
        if self._done == len(self._pending) * len(self._all_slots):
            recorder.finish()
            if self._like is not None:
                names = [f"query {k}" for k in range(self._samples)]
                self._asked = query.query_rows(open_store(recorder.out), names)


def _denoisers(models: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The outermost modules that are called with a timestep."""
    found: list[torch.nn.Module] = []
    for model in models:
        found += [model] if takes_timestep(model) else _denoisers(list(model.children()))
    return list(dict.fromkeys(found))


def _listed(given: Any, kind: type, name: str, names: str) -> list[Any]:
    """One thing or several as a list. Raises SettingsError if they are of another kind."""
    listed = [given] if isinstance(given, kind) else list(given) if isinstance(given, (list, tuple)) else []
    if not listed or not all(isinstance(one, kind) for one in listed):
        raise SettingsError(f"{name} is a {type(given).__name__}; expected a {kind.__name__}, or a list of {names}.")
    return listed
